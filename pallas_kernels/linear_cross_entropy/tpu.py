"""linear_cross_entropy for TPU: a Pallas kernel for the forward pass, dense products by chunks for the backward pass.

The kernel keeps a tile of tokens in VMEM and streams the head past it once per tile; a block of logits never leaves
VMEM. Logits are computed transposed, [V, T]: tokens lie on lanes, so that sums over the vocabulary are additions of
whole registers, and per-token numbers are rows.

Axes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.chip import tpu_to_tile_for
from pallas_kernels.linear_cross_entropy import chunked
from pallas_kernels.linear_cross_entropy.problem import Problem, product
from pallas_kernels.linear_cross_entropy.tiling import choose
from pallas_kernels.mosaic import kernel_output, tpu_params

_MOST_LOGITS = 160 << 20  # of a chunk of the backward pass: 320 MiB of bfloat16
_ABSENT = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that zero times it is zero

backward = functools.partial(chunked.backward, most_logits=_MOST_LOGITS)


def forward(hidden: Float[Array, "T D"], head, targets: Int[Array, " T"], *, problem: Problem):
    """lse [T], the target's logit [T] and, when it is wanted, the entropy [T]."""
    (tokens, width), chip = hidden.shape, tpu_to_tile_for(problem.chip)
    tiling = problem.tiling or choose(chip, tokens, width, problem.vocabulary, hidden.dtype, head.dtype)
    grid = pl.cdiv(tokens, tiling.tokens), pl.cdiv(problem.vocabulary, tiling.vocabulary)
    head_block, head_index = (tiling.vocabulary, width), lambda t, v: (v, 0)
    if not problem.transpose_head:
        head_block, head_index = head_block[::-1], lambda t, v: (0, v)
    row = pl.BlockSpec((1, tiling.tokens), lambda t, v: (0, t))
    outputs = 2 + problem.with_entropy
    out = pl.pallas_call(
        functools.partial(_kernel, problem=problem),
        grid=grid,
        in_specs=[
            row,
            # changes so seldom that a second buffer is not worth its memory
            pl.BlockSpec((tiling.tokens, width), lambda t, v: (t, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec(head_block, head_index),
        ],
        out_specs=[row] * outputs,
        out_shape=[kernel_output((1, tokens), jnp.float32, hidden)] * outputs,
        scratch_shapes=[pltpu.VMEM((1, tiling.tokens), jnp.float32)] * (2 + outputs),
        compiler_params=tpu_params(chip, "parallel", "arbitrary"),
        name="linear_cross_entropy",
    )(targets[None], hidden, head)
    return tuple(x[0] for x in out)


def _kernel(targets, hidden, head, *refs, problem: Problem):
    outputs, (largest, total, *sums) = refs[: 2 + problem.with_entropy], refs[2 + problem.with_entropy :]
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        largest[...] = jnp.full_like(largest, _ABSENT)
        for ref in (total, *sums):
            ref[...] = jnp.zeros_like(ref)

    _accumulate(targets, hidden, head, largest, total, sums, tile, problem)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        outputs[0][...] = largest[...] + jnp.log(total[...])
        outputs[1][...] = sums[0][...]
        if problem.with_entropy:
            outputs[2][...] = jnp.log(total[...]) - sums[1][...] / total[...]


def _accumulate(targets, hidden, head, largest, total, sums, tile, problem):
    """Adds a block of logits [V, T] to the running maximum and sums."""
    size = head.shape[problem.vocabulary_axis]
    weight = head[...].astype(hidden.dtype)
    logits = product(weight, hidden[...], 1 - problem.vocabulary_axis, 1)
    if problem.scale != 1:
        logits = logits * problem.scale
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    if problem.vocabulary % size:
        logits = jnp.where(column < problem.vocabulary - tile * size, logits, _ABSENT)
    sums[0][...] += jnp.sum(jnp.where(column == targets[...] - tile * size, logits, 0), axis=0, keepdims=True)
    before = largest[...]
    largest[...] = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
    lower, below = before - largest[...], logits - largest[...]
    exponential = jnp.exp(below)
    if problem.with_entropy:  # sum of exponential * below, which moves with the maximum
        moved = jnp.exp(lower) * (sums[1][...] + total[...] * lower)
        sums[1][...] = moved + jnp.sum(exponential * below, axis=0, keepdims=True)
    total[...] = total[...] * jnp.exp(lower) + jnp.sum(exponential, axis=0, keepdims=True)
