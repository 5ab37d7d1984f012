"""What every implementation of flash_attention is told beside its arrays, and what it is given and returns.

Axes: B batch, H query heads, K kv heads, G query heads per kv head, S queries, T keys, D head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The log-sum-exp of a query that sees no key. Finite, so that pieces that see nothing combine without NaN.
SEES_NOTHING = -1e30

Segments = tuple[Int[Array, "B S"], Int[Array, "B T"]] | None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Blocks of the TPU kernels.

    Attributes:
      block_q: queries of each head that a step of the grid takes; all heads of a kv head take part in it.
      block_kv: keys that meet them at a time.
      resident: keys that lie in VMEM at once, a multiple of `block_kv`.
      rows: queries of one head that are computed together; divides `block_q`.
    """

    block_q: int
    block_kv: int
    resident: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static.

    Attributes:
      scale: of the scores, before the softmax.
      q_offset: None where it is only known when the program runs.
      all_see_a_key: known of every query; on CPU it saves a seventh of the forward pass.
    """

    causal: bool
    scale: float
    q_offset: int | None = 0
    chip: str | None = None
    tiling: Tiling | None = None
    all_see_a_key: bool = False

    def last_key(self, query: Array, keys: int, q_offset: Int[Array, ""] | int) -> Array:
        """The last key that a query may see for its place: -1, or below, for none."""
        return jnp.minimum(query + q_offset, keys - 1) if self.causal else jnp.full_like(query, keys - 1)


def seen(
    problem: Problem,
    queries: int,
    keys: int,
    q_offset: Int[Array, ""] | int,
    segments: Segments,
    start: int | Array = 0,
) -> Array:
    """Which of the first `keys` keys the queries from `start` on see: [B, S, T], or [1, S, T] without segments."""
    limit = problem.last_key(start + jnp.arange(queries), keys, q_offset)
    visible = (jnp.arange(keys) <= limit[:, None])[None]
    if segments is None:
        return visible
    return visible & (segments[0][..., None] == segments[1][:, None])


def dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Contracts one axis of each, accumulating in float32; float32 factors keep all of their bits on a TPU too."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    contract = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contract, precision=exact, preferred_element_type=jnp.float32)


def einsum(equation: str, left: Any, right: Any) -> Float[Array, "*n"]:
    """In float32; with all bits of float32 factors, which a TPU would else round to bfloat16."""
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
