"""What every implementation of linear_cross_entropy is told beside its arrays.

Axes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A block of logits in the TPU kernel. `tokens` and `vocabulary` are multiples of 128."""

    tokens: int
    vocabulary: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static; the logits are `scale * hidden @ head`, and only the first `vocabulary` columns exist.

    Attributes:
      transpose_head: the head is [V, D], else [D, V].
      with_entropy: whether the entropy of the softmax is wanted.
    """

    scale: float
    vocabulary: int
    transpose_head: bool
    with_entropy: bool
    chip: str | None = None
    tiling: Tiling | None = None

    @property
    def vocabulary_axis(self) -> int:
        return 0 if self.transpose_head else 1

    def logits(self, hidden: Float[Array, "T D"], head: Array) -> Float[Array, "T V"]:
        """In float32; the head, or a piece of it, takes part in the dtype of `hidden`."""
        logits = product(hidden, head.astype(hidden.dtype), 1, 1 - self.vocabulary_axis)
        return logits if self.scale == 1 else logits * jnp.float32(self.scale)

    def hidden_gradient(self, dlogits: Float[Array, "T V"], head: Array) -> Float[Array, "T D"]:
        return product(dlogits, head.astype(dlogits.dtype), 1, self.vocabulary_axis)

    def head_gradient(self, dlogits: Float[Array, "T V"], hidden: Float[Array, "T D"]) -> Array:
        left, right = (dlogits, hidden) if self.transpose_head else (hidden, dlogits)
        return product(left, right, 0, 0)


def product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Contracts one axis of each, accumulating in float32; float32 factors keep all of their bits on a TPU too."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    contract = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contract, precision=exact, preferred_element_type=jnp.float32)


def logits_gradient(logits: Array, lse: Array, is_target: Array, coefficients: tuple[Any, ...]) -> Array:
    """The gradient of the scaled logits [T, V] from what `statistics` calls coefficients, two or three columns [T, 1].

    p * (of_softmax + of_log * log p), and of_target more at the target's column.
    """
    of_softmax, of_target, *of_log = coefficients
    log_p = logits - lse
    slope = of_softmax + of_log[0] * log_p if of_log else of_softmax
    return jnp.exp(log_p) * slope + jnp.where(is_target, of_target, 0)
