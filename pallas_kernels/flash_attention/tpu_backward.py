"""The backward TPU kernel: dq, dk and dv in one pass over the scores, five products instead of seven.

Scores lie with the keys along rows, so that log-sum-exp and delta, a number for each query, spread over rows at no
cost. dk and dv of the piece of keys in VMEM gather in float32 there, and dq of the block of queries as well. Where the
keys are more than one piece, the pieces are calls one after another, and dq in float32 goes through them, updated in
place: each call reads and writes a block of it just once.

Axes: B batch, K kv heads, G query heads per kv head, S queries, T keys, D head dim, P pieces of keys.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.problem import Problem, Segments, dot
from pallas_kernels.flash_attention.tiling import backward_bytes
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
)
from pallas_kernels.mosaic import kernel_output, tpu_params, varying_alike


def backward(q, k, v, segments: Segments, q_offset, lse, delta, dout, *, problem: Problem):
    """dq, dk, dv; delta [B, H, S] is what all gradients of a query's scores have taken off: sum(dout * out) - dlse."""
    work = plan(q, k, segments, problem, backward_bytes)
    ranges = ranges_of(segments, q_offset, work)
    by_query = [queries_of(x, work) for x in (q, dout, lse * LOG2_E, delta)]
    by_key = [pad(x, 2, work.padded_keys) for x in (k, v)]
    arrays = [*by_query, *by_key, *segment_rows(segments, work)]
    q_offset, ranges, *arrays = varying_alike(jnp.asarray(q_offset, jnp.int32), ranges, *arrays)
    if work.residents == 1:
        dq, dk, dv = _call(work, _scalars(work, ranges, q_offset, jnp.int32(0)), None, *arrays)
    else:
        dq, _ = varying_alike(jnp.zeros(arrays[0].shape, jnp.float32), arrays[0])
        piece = lambda dq, p: _piece(work, ranges, q_offset, arrays, dq, p)  # noqa: E731
        dq, (dk, dv) = jax.lax.scan(piece, dq, jnp.arange(work.residents, dtype=jnp.int32))
        dk, dv = (jnp.moveaxis(x, 0, 2).reshape(arrays[4].shape) for x in (dk, dv))
    dq = dq[:, :, :, : work.queries].reshape(q.shape).astype(q.dtype)
    return dq, dk[:, :, : work.keys], dv[:, :, : work.keys]


def _piece(work: Work, ranges, q_offset, arrays, dq, piece):
    dq, dk, dv = _call(work, _scalars(work, ranges, q_offset, piece), dq, *arrays)
    return dq, (dk, dv)


def _scalars(work: Work, ranges, q_offset, piece) -> list[jax.Array]:
    """Of one piece of the keys: ranges, the first and last block of queries that meets it, q_offset and the piece."""
    start = piece * work.blocks_in_resident
    own = jnp.clip(ranges, start, start + work.blocks_in_resident)
    if work.residents == 1:  # every block of dq has to be written, with zeros too
        first, last = jnp.zeros_like(own[:, 0, 0]), jnp.full_like(own[:, 0, 0], work.query_blocks - 1)
    else:
        meets = own[..., 3] > own[..., 0]
        place = jnp.arange(work.query_blocks, dtype=jnp.int32)
        last = jnp.max(jnp.where(meets, place, 0), axis=1)
        first = jnp.min(jnp.where(meets, place, last[:, None]), axis=1)
    return [own.reshape(-1), jnp.stack([first, last], axis=1).reshape(-1), jnp.stack([q_offset, piece])]


def _call(work: Work, scalars, dq, q, dout, lse, delta, k, v, *ids):
    """dq [B, K, G, S, D] (added to, in float32, if given), dk and dv [B, K, resident, D] of one piece of the keys."""
    t = work.tiling

    def block(b, i, meeting):
        """The block of queries; before the first that meets the keys and past the last, those, so that none moves."""
        row = b if work.segmented else 0
        return jnp.clip(i, meeting[2 * row], meeting[2 * row + 1])

    by_query = (1, 1, work.groups, t.block_q)
    q_spec = pl.BlockSpec((*by_query, work.head_dim), lambda b, h, i, r, m, o: (b, h, 0, block(b, i, m), 0))
    row_spec = pl.BlockSpec(by_query, lambda b, h, i, r, m, o: (b, h, 0, block(b, i, m)))
    by_key = (1, 1, t.resident, work.head_dim)
    kv_spec = pl.BlockSpec(by_key, lambda b, h, i, r, m, o: (b, h, o[1], 0))
    ids_specs = [
        pl.BlockSpec((1, 1, t.block_q), lambda b, h, i, r, m, o: (b, 0, block(b, i, m))),
        pl.BlockSpec((1, 1, t.resident), lambda b, h, i, r, m, o: (b, 0, o[1])),
    ]
    sum_of_keys = pltpu.VMEM((t.resident, work.head_dim), jnp.float32)
    piece = (work.batch, work.kv_heads, t.resident, work.head_dim)
    inputs = [q, dout, lse, delta, k, v, *ids, *([] if dq is None else [dq])]
    return pl.pallas_call(
        functools.partial(_kernel, work=work, adds=dq is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(work.batch, work.kv_heads, work.query_blocks),
            in_specs=[
                q_spec, q_spec, row_spec, row_spec, kv_spec, kv_spec,
                *(ids_specs if ids else []), *([] if dq is None else [q_spec]),
            ],
            out_specs=[q_spec, *[pl.BlockSpec(by_key, lambda b, h, *_: (b, h, 0, 0))] * 2],
            scratch_shapes=[pltpu.VMEM((work.groups, t.block_q, work.head_dim), jnp.float32), sum_of_keys, sum_of_keys],
        ),
        out_shape=[
            kernel_output(q.shape, q.dtype if dq is None else jnp.float32, q),
            kernel_output(piece, k.dtype, q), kernel_output(piece, v.dtype, q),
        ],
        input_output_aliases={} if dq is None else {len(scalars) + len(inputs) - 1: 0},
        compiler_params=tpu_params(work.chip, "parallel", "parallel", "arbitrary"),
        name="flash_attention_backward",
    )(*varying_alike(*scalars, *inputs))  # fmt: skip


def _kernel(ranges_ref, meeting_ref, place_ref, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, *refs, work, adds):
    *refs, dq_ref, dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref = refs
    before_ref = refs.pop() if adds else None
    batch, block = pl.program_id(0), pl.program_id(2)
    row = batch if work.segmented else 0

    def clear_keys(part):
        dk_sum_ref[key_rows(part, work), :] = jnp.zeros((work.tiling.block_kv, work.head_dim), jnp.float32)
        dv_sum_ref[key_rows(part, work), :] = jnp.zeros((work.tiling.block_kv, work.head_dim), jnp.float32)

    def clear_queries(head):
        dq_sum_ref[head] = jnp.zeros(dq_sum_ref.shape[1:], jnp.float32)

    def finish_queries(head):
        dq = dq_sum_ref[head] * work.problem.scale
        dq_ref[0, 0, head] = (dq + before_ref[0, 0, head] if adds else dq).astype(dq_ref.dtype)

    def finish_keys(part):
        rows = key_rows(part, work)
        dk_ref[0, 0, rows, :] = (dk_sum_ref[rows, :] * work.problem.scale).astype(dk_ref.dtype)
        dv_ref[0, 0, rows, :] = dv_sum_ref[rows, :].astype(dv_ref.dtype)

    @pl.when(block == 0)
    def _():
        each(work.blocks_in_resident, clear_keys)

    @pl.when((meeting_ref[2 * row] <= block) & (block <= meeting_ref[2 * row + 1]))
    def _():
        each(work.groups, clear_queries)
        step = functools.partial(
            _step, (q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, refs), (dq_sum_ref, dk_sum_ref, dv_sum_ref),
            block, place_ref, work,
        )  # fmt: skip
        over_keys(*bounds(ranges_ref, batch, block, work), step)
        each(work.groups, finish_queries)

    @pl.when(block == work.query_blocks - 1)
    def _():
        each(work.blocks_in_resident, finish_keys)


def _step(inputs, sums, block, place_ref, work: Work, kv_block, masked: bool) -> None:
    """A block of queries meets a block of keys."""
    q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, ids_refs = inputs
    dq_sum_ref, dk_sum_ref, dv_sum_ref = sums
    t = work.tiling
    keys = key_rows(kv_block - place_ref[1] * work.blocks_in_resident, work)
    k, v = k_ref[0, 0, keys, :], v_ref[0, 0, keys, :]

    def products(head, row):
        rows = pl.ds(row, t.rows)
        return dot(k, q_ref[0, 0, head, rows, :], 1, 1), dot(v, dout_ref[0, 0, head, rows, :], 1, 1)

    def gradients(head, row, scores, dweights):
        rows = pl.ds(row, t.rows)
        scores *= work.log2_scale
        if masked:
            ids = [ids_refs[0][0, :, rows], ids_refs[1][0, :, keys]] if ids_refs else [None, None]
            places = (block * t.block_q + row, kv_block * t.block_kv, place_ref[0])
            scores = jnp.where(visible(*places, work, *ids, scores.shape, q_axis=1), scores, -jnp.inf)
        weights = jnp.exp2(scores - lse_ref[0, 0, pl.ds(head, 1), rows])
        dscores = weights * (dweights - delta_ref[0, 0, pl.ds(head, 1), rows])
        return weights.astype(k.dtype), dscores.astype(k.dtype)

    def add(head, row, weights, dscores):
        rows = pl.ds(row, t.rows)
        dv_sum_ref[keys, :] += dot(weights, dout_ref[0, 0, head, rows, :], 1, 0)
        dk_sum_ref[keys, :] += dot(dscores, q_ref[0, 0, head, rows, :], 1, 0)
        dq_sum_ref[head, rows] += dot(dscores, k, 0, 0)

    in_turn(work.units, products, gradients, add)
