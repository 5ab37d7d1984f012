"""The forward TPU kernel.

A step of the grid holds a block of queries of every head that shares a kv head, and a long piece of its keys and
values; it loops over the blocks of keys that these queries see. The online softmax keeps its state in VMEM, from one
piece of the keys to the next.

Axes: B batch, K kv heads, G query heads per kv head, S queries, T keys, D head dim.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.problem import SEES_NOTHING, Problem, Segments, dot
from pallas_kernels.flash_attention.tiling import LANES, forward_bytes
from pallas_kernels.flash_attention.tpu_common import (
    LOG2_E,
    Work,
    bounds,
    each,
    in_turn,
    key_rows,
    over_keys,
    pad,
    plan,
    queries_of,
    ranges_of,
    segment_rows,
    visible,
    widen,
)
from pallas_kernels.mosaic import divide, kernel_output, tpu_params, varying_alike


def forward(q, k, v, segments: Segments, q_offset, *, problem: Problem):
    """[B, H, S, D], [B, K, T, D] twice -> [B, H, S, D] and the log-sum-exp [B, H, S]."""
    work = plan(q, k, segments, problem, forward_bytes)
    ranges = ranges_of(segments, q_offset, work).reshape(-1)
    k, v = (pad(x, 2, work.padded_keys) for x in (k, v))
    arrays = [queries_of(q, work), k, v, *segment_rows(segments, work)]
    scalars = [ranges, jnp.asarray(q_offset, jnp.int32).reshape(1)]
    out, lse = _call(work, *varying_alike(*scalars, *arrays))
    out, lse = (x[:, :, :, : work.queries] for x in (out, lse))
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _call(work: Work, ranges, q_offset, q, *rest):
    t, batch, kv_heads, groups = work.tiling, work.batch, work.kv_heads, work.groups

    def piece(b, i, s, ranges):
        """The piece of keys to have in VMEM: outside those that are seen, the nearest, so that nothing is fetched."""
        first, _, _, end = bounds(ranges, b, i, work)
        n = work.blocks_in_resident
        return jnp.clip(s, divide(first, n), divide(jnp.maximum(end - 1, 0), n))

    q_spec = pl.BlockSpec((1, 1, groups, t.block_q, work.head_dim), lambda b, h, i, s, *_: (b, h, 0, i, 0))
    lse_spec = pl.BlockSpec((1, 1, groups, t.block_q), lambda b, h, i, s, *_: (b, h, 0, i))
    kv_spec = pl.BlockSpec((1, 1, t.resident, work.head_dim), lambda b, h, i, s, r, _: (b, h, piece(b, i, s, r), 0))
    ids_specs = [
        pl.BlockSpec((1, 1, t.block_q), lambda b, h, i, s, *_: (b, 0, i)),
        pl.BlockSpec((1, 1, t.resident), lambda b, h, i, s, r, _: (b, 0, piece(b, i, s, r))),
    ]
    state = pltpu.VMEM((groups, t.block_q, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, work=work),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, work.query_blocks, work.residents),
            in_specs=[q_spec, kv_spec, kv_spec, *(ids_specs if work.segmented else [])],
            out_specs=[q_spec, lse_spec],
            scratch_shapes=[state, state, pltpu.VMEM((groups, t.block_q, work.head_dim), jnp.float32)],
        ),
        out_shape=[kernel_output(q.shape, q.dtype, q), kernel_output(q.shape[:-1], jnp.float32, q)],
        compiler_params=tpu_params(work.chip, "parallel", "parallel", "parallel", "arbitrary"),
        name="flash_attention_forward",
    )(ranges, q_offset, q, *rest)


def _kernel(ranges_ref, q_offset_ref, q_ref, k_ref, v_ref, *refs, work: Work):
    *ids_refs, out_ref, lse_ref, largest_ref, total_ref, sum_ref = refs
    state = largest_ref, total_ref, sum_ref
    block, resident = pl.program_id(2), pl.program_id(3)

    def clear(head):
        largest_ref[head] = jnp.full(largest_ref.shape[1:], SEES_NOTHING, jnp.float32)
        total_ref[head] = jnp.zeros(total_ref.shape[1:], jnp.float32)
        sum_ref[head] = jnp.zeros(sum_ref.shape[1:], jnp.float32)

    @pl.when(resident == 0)
    def _():
        each(work.groups, clear)

    start = resident * work.blocks_in_resident
    clip = lambda x: jnp.clip(x, start, start + work.blocks_in_resident)  # noqa: E731
    step = functools.partial(_step, (q_ref, k_ref, v_ref, ids_refs), state, block, start, q_offset_ref[0], work)
    over_keys(*map(clip, bounds(ranges_ref, pl.program_id(0), block, work)), step)

    @pl.when(resident == work.residents - 1)
    def _():
        each(work.groups, functools.partial(_finish, state, out_ref, lse_ref))


def _step(inputs, state, block, start, q_offset, work: Work, kv_block, masked: bool) -> None:
    """A block of queries meets a block of keys; `start` is the first block of keys in VMEM."""
    q_ref, k_ref, v_ref, ids_refs = inputs
    largest_ref, total_ref, sum_ref = state
    t = work.tiling
    keys = key_rows(kv_block - start, work)
    k, v = k_ref[0, 0, keys, :], v_ref[0, 0, keys, :]

    def score(head, row):
        return (dot(q_ref[0, 0, head, pl.ds(row, t.rows), :], k, 1, 1),)

    def softmax(head, row, scores):
        rows = pl.ds(row, t.rows)
        scores *= work.log2_scale
        if masked:
            ids = [ids_refs[0][0, :, rows], ids_refs[1][0, :, keys]] if ids_refs else [None, None]
            places = (block * t.block_q + row, kv_block * t.block_kv, q_offset)
            scores = jnp.where(visible(*places, work, *ids, scores.shape, q_axis=0), scores, -jnp.inf)
        before = largest_ref[head, rows]
        largest = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp2(scores - widen(largest, t.block_kv))
        decay = jnp.exp2(before - largest)
        largest_ref[head, rows] = largest
        # each lane sums its own keys; the lanes are added up at the very end
        by_lane = sum(weights[:, i : i + LANES] for i in range(0, t.block_kv, LANES))
        total_ref[head, rows] = total_ref[head, rows] * decay + by_lane
        return weights.astype(v.dtype), decay

    def weigh(head, row, weights, decay):
        rows = pl.ds(row, t.rows)
        sum_ref[head, rows] = sum_ref[head, rows] * widen(decay, work.head_dim) + dot(weights, v, 1, 0)

    in_turn(work.units, score, softmax, weigh)


def _finish(state, out_ref, lse_ref, head) -> None:
    """A row that sees nothing has SEES_NOTHING for its largest score, and sums of zero."""
    largest_ref, total_ref, sum_ref = state
    total = total_ref[head].sum(axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1)
    out_ref[0, 0, head] = (sum_ref[head] / some).astype(out_ref.dtype)
    lse = jnp.where(total > 0, (largest_ref[head] + jnp.log2(some)) / LOG2_E, SEES_NOTHING)
    lse_ref[0, 0, pl.ds(head, 1), :] = lse.T[:1]
