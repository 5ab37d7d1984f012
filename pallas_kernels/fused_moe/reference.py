"""The routed experts as grouped matmuls over rows sorted by expert: the truth, and the way of many tokens.

Axes: T tokens, D model, k experts per token, E experts whose matrices are given, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_swiglu.api import grouped_swiglu


def forward(
    x, matrices, scales, indices, weights, offset, layer, *,
    transpose_rhs, implementation: Implementation = "reference", chip: str | None = None, sort=None,
):  # fmt: skip
    """[T, D] -> [T, D], differentiable; see `api.fused_moe`.

    Args:
      implementation, chip: of the grouped matmuls.
      sort: in place of `by_expert`.
    """
    (gate, up, down), (gate_scale, up_scale, down_scale) = matrices, scales
    num_experts, top_k = gate.shape[1], indices.shape[1]
    sizes, place, row = (sort or by_expert)(local_experts(indices, offset, num_experts).reshape(-1), num_experts)
    how = {"layer": layer, "transpose_rhs": transpose_rhs, "implementation": implementation, "chip": chip}
    hidden = grouped_swiglu(x[row // top_k], gate, up, sizes, gate_scale=gate_scale, up_scale=up_scale, **how)
    answers = grouped_matmul(
        hidden, down, sizes, rhs_scale=down_scale, preferred_element_type=jnp.float32, **how
    )  # fmt: skip
    weighted = answers[place].reshape(*indices.shape, -1) * weights[..., None]
    return weighted.sum(1).astype(x.dtype)


def by_expert(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How many rows each expert has, where each row stands among the rows sorted by expert, and which stands there.

    Rows of the expert numbered `num_experts` come last.
    """
    row = jnp.argsort(expert, stable=True)
    return jnp.bincount(expert, length=num_experts + 1)[:num_experts], jnp.argsort(row), row


def local_experts(indices: jax.Array, offset: jax.Array | None, num_experts: int) -> jax.Array:
    """Which of the given experts each is, `num_experts` for those of other shards."""
    local = indices - (0 if offset is None else offset)
    return jnp.where((local >= 0) & (local < num_experts), local, num_experts)
