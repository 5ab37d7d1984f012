"""The forward kernel in Mosaic GPU: tiles of logits, of which three or four numbers per token leave the registers.

A tile is 128 tokens by 256 columns, 64 tokens for each computing warpgroup; a cluster of two blocks takes neighbouring
tokens, and each loads half of the head's columns for both. What a tile writes are the largest logit, the
sum of the exponentials relative to it, the target's logit if it is among the columns and, for the entropy, the sum of
exponential times logit. XLA combines those of all tiles of a token.

Axes: T tokens, D model, V vocabulary, C tiles of the vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.linear_cross_entropy.problem import Problem
from pallas_kernels.mosaic_gpu import COMPUTE_WARPGROUPS, WARPGROUP_ROWS, Ring

TOKENS = COMPUTE_WARPGROUPS * WARPGROUP_ROWS
COLUMNS, STAGES = 256, 4
_STRIP = 2048  # tokens that take turns at the same columns: with as many columns they lie in the L2 cache
_ABSENT = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that zero times it is zero


def forward(hidden, head, targets, *, problem: Problem):
    """lse [T], the target's logit [T] and, when it is wanted, the entropy [T]."""
    tokens, hidden = hidden.shape[0], mosaic_gpu.pad_rows(hidden)
    mosaic_gpu.check_loadable("linear_cross_entropy", hidden, head)
    cluster = mosaic_gpu.cluster_size(tokens > TOKENS)
    token_tiles, column_tiles = pl.cdiv(tokens, cluster * TOKENS), pl.cdiv(problem.vocabulary, COLUMNS)
    depth, numbers = mosaic_gpu.swizzle_elements(hidden.dtype), 3 + problem.with_entropy
    head_tile = (COLUMNS, depth) if problem.transpose_head else (depth, COLUMNS)
    kernel = mosaic_gpu.kernel(
        functools.partial(_kernel, problem=problem, cluster=cluster),
        jax.ShapeDtypeStruct((numbers, column_tiles, pl.cdiv(tokens, WARPGROUP_ROWS) * WARPGROUP_ROWS), jnp.float32),
        num_blocks=token_tiles * column_tiles,
        scratch_types={
            "buffers": [mosaic_gpu.swizzled((STAGES, *tile), hidden.dtype) for tile in ((TOKENS, depth), head_tile)],
            "barriers": Ring.barriers(STAGES, 2, cluster),
            "target_buffer": plgpu.SMEM((2, TOKENS), jnp.int32),
            "target_barriers": Ring.barriers(2, 1),
            "results": plgpu.SMEM((COMPUTE_WARPGROUPS, numbers, WARPGROUP_ROWS), jnp.float32),
        },
        approx_math=True,
        cluster=cluster,
    )
    targets = jnp.pad(targets.astype(jnp.int32), (0, token_tiles * cluster * TOKENS - tokens), constant_values=-1)
    return _combine(*kernel(targets, hidden, head)[:, :, :tokens])


def _combine(largest, total, target, *weighted):
    """The numbers of all tiles [C, T] to those of the whole vocabulary [T]."""
    top = largest.max(0)
    lower = largest - top
    share = jnp.exp(lower)
    sum_ = (total * share).sum(0)
    results = top + jnp.log(sum_), target.sum(0)
    if not weighted:
        return results
    return *results, jnp.log(sum_) - (share * (weighted[0] + total * lower)).sum(0) / sum_


def _kernel(
    targets, hidden, head, out, *, buffers, barriers, target_buffer, target_barriers, results, problem: Problem, cluster
):
    ring = Ring(buffers, **barriers, shared=(1,) if cluster > 1 else ())
    target_ring = Ring([target_buffer], **target_barriers, to_registers=True)
    token_tiles, column_tiles = pl.cdiv(hidden.shape[0], cluster * TOKENS), out.shape[1]
    strip_tiles, first_of_block = _STRIP // (cluster * TOKENS), mosaic_gpu.rank(cluster) * TOKENS
    depth = buffers[0].shape[-1]
    steps = pl.cdiv(hidden.shape[1], depth)

    def place(tile):
        """This block's first token of the tile and its place among the tiles of the vocabulary."""
        strip, within = lax.div(tile, strip_tiles * column_tiles), lax.rem(tile, strip_tiles * column_tiles)
        tall = jnp.minimum(strip_tiles, token_tiles - strip * strip_tiles)
        token_tile = strip * strip_tiles + lax.rem(within, tall)
        return token_tile * cluster * TOKENS + first_of_block, lax.div(within, tall)

    def load():
        def load_tile(tile, step):
            token, column_tile = place(tile)
            rows, columns = pl.ds(token, TOKENS), pl.ds(column_tile * COLUMNS, COLUMNS)
            target_ring.fill(mosaic_gpu.turn_of(tile), [targets.at[rows]])

            def one(k, _):
                inner = pl.ds(k * depth, depth)
                part = head.at[columns, inner] if problem.transpose_head else head.at[inner, columns]
                ring.fill(step + k, [hidden.at[rows, inner], part])

            lax.fori_loop(0, steps, one, None)
            return step + steps

        ring.drain(mosaic_gpu.for_each_tile(token_tiles * column_tiles, load_tile))

    def compute(warpgroup):
        first = pl.multiple_of(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        mine = pl.ds(first, WARPGROUP_ROWS)

        def product(_, buffers, accumulators):
            tokens, part = buffers
            part = part.transpose((1, 0)) if problem.transpose_head else part
            plgpu.wgmma(accumulators[0], tokens.at[mine], part)

        def compute_tile(tile, step):
            token, column_tile = place(tile)
            (logits,) = ring.accumulate(step, steps, [(WARPGROUP_ROWS, COLUMNS)], product)
            target = target_ring.wait(mosaic_gpu.turn_of(tile))[0].at[mine][...]
            numbers = _numbers(logits, target - column_tile * COLUMNS, column_tile, problem)
            target_ring.free(mosaic_gpu.turn_of(tile))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, number in enumerate(numbers):
                results[warpgroup, i] = number
            plgpu.commit_smem()

            @pl.when(token + first < out.shape[2])
            def _store():
                mosaic_gpu.check_whole(out, WARPGROUP_ROWS)
                for i in range(len(numbers)):
                    place = out.at[i, column_tile, pl.ds(token + first, WARPGROUP_ROWS)]
                    plgpu.copy_smem_to_gmem(results.at[warpgroup, i], place)

            return step + steps

        mosaic_gpu.for_each_tile(token_tiles * column_tiles, compute_tile)
        plgpu.wait_smem_to_gmem(0)

    mosaic_gpu.specialise(load, compute)


def _numbers(logits, target, column_tile, problem: Problem) -> list[jax.Array]:
    """What a tile [64, 256] leaves of its logits, [64] each; `target` is counted from the tile's first column."""
    if problem.scale != 1:
        logits = logits * problem.scale
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if problem.vocabulary % COLUMNS:
        logits = jnp.where(column < problem.vocabulary - column_tile * COLUMNS, logits, _ABSENT)
    of_target = jnp.where(column == lax.broadcast_in_dim(target, logits.shape, [0]), logits, 0.0).sum(axis=1)
    largest = logits.max(axis=1)
    below = logits - lax.broadcast_in_dim(largest, logits.shape, [0])
    exponential = jnp.exp(below)
    weighted = [(exponential * below).sum(axis=1)] if problem.with_entropy else []
    return [largest, exponential.sum(axis=1), of_target, *weighted]
