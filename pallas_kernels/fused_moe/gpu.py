"""The routed experts of a few tokens by two Pallas Mosaic GPU kernels, for Hopper: SwiGLU, then down.

The rows of an expert are one tile, so that its weights are read once, and no other's. Sorting and the weighted
sum are XLA's. Axes as in `api.py`, R = T k rows.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.fused_moe import reference


def by_expert(
    expert: Int[Array, " R"], num_experts: int
) -> tuple[Int[Array, " E"], Int[Array, " R"], Int[Array, " R"]]:
    """`reference.by_expert` by comparing all with all, in a few fused reductions.

    Of so few rows, a sort and a histogram are a dozen kernels, each of which takes longer to start than to run.
    """
    row = jnp.arange(expert.shape[0], dtype=jnp.int32)
    before = (expert[None] < expert[:, None]) | ((expert[None] == expert[:, None]) & (row[None] < row[:, None]))
    place = before.sum(1, dtype=jnp.int32)
    standing = jnp.where(place[None] == row[:, None], row[None], 0).sum(1, dtype=jnp.int32)
    sizes = (expert[None] == jnp.arange(num_experts, dtype=expert.dtype)[:, None]).sum(1, dtype=jnp.int32)
    return sizes, place, standing


forward = functools.partial(reference.forward, implementation="gpu", sort=by_expert)
