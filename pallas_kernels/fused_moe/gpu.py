"""The routed experts of a few tokens by two Pallas Mosaic GPU kernels, for Hopper: SwiGLU, then down.

The rows of an expert are one tile, so that its weights are read once, and no other's. Sorting and the weighted
sum are XLA's. Axes as in `api.py`, R = T k rows.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.fused_moe.reference import local_experts
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_swiglu.api import grouped_swiglu


def forward(x, matrices, scales, indices, weights, offset, layer, *, transpose_rhs):
    """[T, D] -> [T, D]; see `api.fused_moe`."""
    (gate, up, down), (gate_scale, up_scale, down_scale) = matrices, scales
    num_experts, top_k = gate.shape[1], indices.shape[1]
    sizes, place, row = by_expert(local_experts(indices, offset, num_experts).reshape(-1), num_experts)
    how = {"layer": layer, "transpose_rhs": transpose_rhs, "implementation": "gpu"}
    hidden = grouped_swiglu(x[row // top_k], gate, up, sizes, gate_scale=gate_scale, up_scale=up_scale, **how)
    answers = grouped_matmul(hidden, down, sizes, rhs_scale=down_scale, preferred_element_type=jnp.float32, **how)
    weighted = answers[place].reshape(*indices.shape, -1) * weights[..., None]
    return weighted.sum(1).astype(x.dtype)


def by_expert(
    expert: Int[Array, " R"], num_experts: int
) -> tuple[Int[Array, " E"], Int[Array, " R"], Int[Array, " R"]]:
    """How many rows each expert has, where each row stands among the rows sorted by expert, and which stands there.

    By comparing all with all, in a few fused reductions: of so few rows, a sort and a histogram are a dozen kernels,
    each of which takes longer to start than to run. Rows of the expert numbered `num_experts` come last.
    """
    row = jnp.arange(expert.shape[0], dtype=jnp.int32)
    before = (expert[None] < expert[:, None]) | ((expert[None] == expert[:, None]) & (row[None] < row[:, None]))
    place = before.sum(1, dtype=jnp.int32)
    standing = jnp.where(place[None] == row[:, None], row[None], 0).sum(1, dtype=jnp.int32)
    sizes = (expert[None] == jnp.arange(num_experts, dtype=expert.dtype)[:, None]).sum(1, dtype=jnp.int32)
    return sizes, place, standing
