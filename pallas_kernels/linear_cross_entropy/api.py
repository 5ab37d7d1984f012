"""Cross-entropy of a large vocabulary straight from hidden states and head: the logits are never all in memory.

Axes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.chip import named_chip
from pallas_kernels.dispatch import Implementation
from pallas_kernels.linear_cross_entropy.problem import Problem, Tiling
from pallas_kernels.linear_cross_entropy.statistics import Statistics, statistics
from pallas_kernels.linear_cross_entropy.weighted import weighted_sum
from pallas_kernels.mosaic import varying_alike


def linear_cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    return_entropy: bool = False,
    implementation: Implementation = None,
    transpose_head: bool = False,
    chip: str | None = None,
    tiling: Tiling | None = None,
) -> Float[Array, " T"] | tuple[Float[Array, " T"], Float[Array, " T"]]:
    """-log softmax(hidden @ head / temperature)[target] of every token, in float32 nats.

    Differentiable in `hidden` and `head` for any cotangents of loss and entropy; gradients have the dtypes of what they
    are of. A target that is no column, such as -1, means that there is none: its loss is 0 and gives no gradient. Its
    entropy counts as any other's.

    Args:
      head: [D, V], or [V, D] with `transpose_head`, the layout of checkpoints. Takes part in the dtype of `hidden`.
      targets: columns of the head.
      temperature: a positive number, not differentiated.
      valid_vocab: columns from here on are padding, as if they were not there; their gradient is zero.
      return_entropy: also the entropy of the softmax at that temperature.
      implementation: None (by platform), "reference", "cpu" or "tpu", or several in order of preference.
      chip: which TPU to tile for, by name; by default that of the mesh in force.
      tiling: of the TPU kernel, instead of the model's choice.

    Returns:
      The loss [T], of which the log-probability of the target is the negative; with `return_entropy` (loss, entropy).

    Raises:
      ValueError: shapes, `temperature`, `valid_vocab` or `tiling` that cannot be.
    """
    problem = _problem(hidden, head, targets, temperature, valid_vocab, return_entropy, transpose_head, chip, tiling)
    if not hidden.shape[0]:
        nothing = jnp.zeros(0, jnp.float32)
        return (nothing, nothing) if return_entropy else nothing
    known, targets = _known(targets, problem.vocabulary)
    out = statistics(*varying_alike(hidden, head, targets), problem, implementation)
    loss = jnp.where(known, out.lse - out.target, 0)
    return loss if out.entropy is None else (loss, out.entropy)


def weighted_linear_cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, " T"],
    weights: Float[Array, " T"],
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    implementation: Implementation = None,
    transpose_head: bool = False,
    chip: str | None = None,
    tiling: Tiling | None = None,
) -> Float[Array, ""]:
    """sum(weights * linear_cross_entropy(hidden, head, targets)), cheaper to differentiate: the loss of training.

    Differentiable in `hidden` and `head`, once; the gradients are made in the forward pass. `weights` are constants:
    their gradient is zero. Arguments as those of `linear_cross_entropy`.
    """
    problem = _problem(hidden, head, targets, temperature, valid_vocab, False, transpose_head, chip, tiling)
    if weights.shape != targets.shape:
        raise ValueError(f"weighted_linear_cross_entropy: weights {weights.shape} for targets {targets.shape}")
    if not hidden.shape[0]:
        return jnp.float32(0)
    known, targets = _known(targets, problem.vocabulary)
    weights = jnp.where(known, weights.astype(jnp.float32), 0)
    return weighted_sum(*varying_alike(hidden, head, targets, weights), problem, implementation)


def token_statistics(
    hidden: Float[Array, "T D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    with_entropy: bool = False,
    implementation: Implementation = None,
    transpose_head: bool = False,
    chip: str | None = None,
    tiling: Tiling | None = None,
) -> Statistics:
    """What loss and entropy are made of, for a vocabulary that is sharded over a mesh axis.

    Inside `shard_map`, with V columns of the head on each device:

        part = token_statistics(hidden, head, targets - V * jax.lax.axis_index(axis), with_entropy=True)
        whole = over_shards(part, axis)
        loss, entropy = whole.lse - whole.target, whole.entropy

    Arguments as those of `linear_cross_entropy`; a target on another shard is no column of this one.
    """
    problem = _problem(hidden, head, targets, temperature, valid_vocab, with_entropy, transpose_head, chip, tiling)
    if not hidden.shape[0]:
        nothing = jnp.zeros(0, jnp.float32)
        return Statistics(nothing, nothing, nothing if with_entropy else None)
    _, targets = _known(targets, problem.vocabulary)
    return statistics(*varying_alike(hidden, head, targets), problem, implementation)


def _known(targets, vocabulary):
    """Which targets are columns, and the targets with -1 for those that are not."""
    known = (targets >= 0) & (targets < vocabulary)
    return known, jnp.where(known, targets, -1).astype(jnp.int32)


def _problem(hidden, head, targets, temperature, valid_vocab, with_entropy, transpose_head, chip, tiling) -> Problem:
    """Raises ValueError for what cannot be."""
    layout = "[V, D]" if transpose_head else "[D, V]"
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1 if transpose_head else 0]:
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.shape} and head {head.shape} don't fit "
            f"(transpose_head={transpose_head}); expected [T, D] and {layout}"
        )
    if targets.shape != hidden.shape[:1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"linear_cross_entropy: targets {targets.dtype}{list(targets.shape)} for {hidden.shape[0]} tokens; "
            "expected one integer each"
        )
    columns = head.shape[0 if transpose_head else 1]
    vocabulary = columns if valid_vocab is None else valid_vocab
    if not 0 < vocabulary <= columns:
        raise ValueError(f"linear_cross_entropy: valid_vocab {valid_vocab} of a head with {columns} columns")
    if not temperature > 0:
        raise ValueError(f"linear_cross_entropy: the temperature is {temperature}, it must be positive")
    if tiling is not None and any(size < 1 or size % 128 for size in (tiling.tokens, tiling.vocabulary)):
        raise ValueError(f"linear_cross_entropy: {tiling}, expected positive multiples of 128")
    if chip is not None:
        named_chip(chip)
    return Problem(1 / float(temperature), vocabulary, transpose_head, with_entropy, chip, tiling)
