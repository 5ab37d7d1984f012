"""The forward kernel in Mosaic GPU.

A tile is 128 queries of one head, 64 for each computing warpgroup, which meet 128 keys at a time. The scores and the
weights of these stay in registers. The two warpgroups take turns: one multiplies while the other is at its softmax.
Tiles with many keys come first, and heads that share a kv head follow one another, which then lies in the L2 cache.

Axes: B batch, H query heads, K kv heads, S queries, T keys, D head dim.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.flash_attention.gpu_common import (
    LOG2_E,
    QUERIES,
    key_blocks,
    plan,
    segment_arrays,
    visible,
)
from pallas_kernels.flash_attention.problem import SEES_NOTHING, Problem, Segments
from pallas_kernels.mosaic_gpu import COMPUTE_WARPGROUPS, WARPGROUP_ROWS, Ring, Store


def forward(q, k, v, segments: Segments, q_offset, *, problem: Problem):
    """[B, H, S, D], [B, K, T, D] twice -> [B, H, S, D] and the log-sum-exp [B, H, S]."""
    work, (q, k, v) = plan(problem, q, k, v, segments)
    scalars = jnp.asarray(q_offset, jnp.int32).reshape(1)
    ranges = key_blocks(work, segments, q_offset)
    stages, keys = 2, work.block_kv
    ids = segment_arrays(work, segments)
    buffers = [mosaic_gpu.swizzled((stages, keys, work.head_dim), k.dtype)] * 2
    q_buffers = [mosaic_gpu.swizzled((stages, QUERIES, work.head_dim), q.dtype)]
    if ids:
        buffers.append(plgpu.SMEM((stages, keys), jnp.int32))
        q_buffers.append(plgpu.SMEM((stages, QUERIES), jnp.int32))
    kernel = mosaic_gpu.kernel(
        functools.partial(_kernel, work=work),
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:2], work.vector), jnp.float32),
        ),
        num_blocks=work.tiles,
        scratch_types={
            "buffers": buffers,
            "barriers": Ring.barriers(stages, len(buffers)),
            "q_buffers": q_buffers,
            "q_barriers": Ring.barriers(stages, len(q_buffers)),
            "turn": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            "stored": Store.scratch(q.dtype, slots=1),
            "lse_buffer": plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
        },
        approx_math=True,
    )
    out, lse = kernel(scalars, ranges, ids, q, k, v)
    return out[:, :, : work.queries], lse[:, :, : work.queries]


def _kernel(
    scalars, ranges, ids, q, k, v, out, lse, *, buffers, barriers, q_buffers, q_barriers, turn, stored, lse_buffer, work
):
    ring = Ring(buffers, **barriers, to_registers=work.segmented)
    q_ring, store = Ring(q_buffers, **q_barriers, to_registers=work.segmented), Store(stored, slots=1)

    def load():
        def load_tile(tile, step):
            batch, head, block = work.place(tile)
            rows = pl.ds(block * QUERIES, QUERIES)
            q_ring.fill(mosaic_gpu.turn_of(tile), [q.at[batch, head, rows], *(x.at[batch, rows] for x in ids[:1])])
            loop = work.loop(ranges, batch, block)

            def one(i, _):
                keys = pl.ds(loop.block(i) * work.block_kv, work.block_kv)
                kv = lax.div(head, work.groups)
                ring.fill(
                    step + i, [k.at[batch, kv, keys], v.at[batch, kv, keys], *(x.at[batch, keys] for x in ids[1:])]
                )

            lax.fori_loop(0, loop.steps, one, None)
            return step + loop.steps

        mosaic_gpu.for_each_tile(work.tiles, load_tile)

    def compute(warpgroup):
        mine = pl.ds(pl.multiple_of(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)

        def sync():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute_tile(tile, step):
            batch, head, block = work.place(tile)
            loop = work.loop(ranges, batch, block)
            q_mine, *q_ids = [x.at[mine] for x in q_ring.wait(mosaic_gpu.turn_of(tile))]
            row = block * QUERIES + warpgroup * WARPGROUP_ROWS
            pl.when(warpgroup == 1)(sync)

            def meet(i, state, masked):
                total, largest, acc = state
                k_block, v_block, *k_ids = ring.wait(step + i)

                def multiply(scores):
                    plgpu.wgmma(scores, q_mine, k_block.transpose((1, 0)))
                    sync()
                    return scores[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, work.block_kv)))
                scores *= work.problem.scale * LOG2_E
                if masked:
                    key = loop.block(i) * work.block_kv
                    seen = visible(work, scores.shape, row, key, scalars[0], q_ids, k_ids)
                    scores = jnp.where(seen, scores, SEES_NOTHING)
                new = jnp.maximum(largest, scores.max(axis=1))
                fade = jnp.exp2(largest - new)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
                if masked:
                    weights = jnp.where(seen, weights, 0.0)
                total = total * fade + weights.sum(axis=1)
                weights = weights.astype(v.dtype)
                sync()

                def gather(part):
                    plgpu.wgmma(part, weights, v_block)
                    return part[...]

                part = pl.run_scoped(gather, plgpu.ACC((WARPGROUP_ROWS, work.head_dim)))
                ring.free(step + i)
                return total, new, acc * lax.broadcast_in_dim(fade, acc.shape, [0]) + part

            state = (
                jnp.zeros((WARPGROUP_ROWS,), jnp.float32),
                jnp.full((WARPGROUP_ROWS,), SEES_NOTHING, jnp.float32),
                jnp.zeros((WARPGROUP_ROWS, work.head_dim), jnp.float32),
            )
            state = lax.fori_loop(0, loop.full, functools.partial(meet, masked=False), state)
            total, largest, acc = lax.fori_loop(loop.full, loop.steps, functools.partial(meet, masked=True), state)
            pl.when(warpgroup == 0)(sync)
            q_ring.free(mosaic_gpu.turn_of(tile))
            some = total > 0
            share = 1 / jnp.where(some, total, 1.0)
            write_lse(
                jnp.where(some, largest * math.log(2) + jnp.log(jnp.where(some, total, 1.0)), SEES_NOTHING),
                batch,
                head,
                row,
            )
            num_rows = jnp.where(row < q.shape[2], WARPGROUP_ROWS, 0)
            row = pl.multiple_of(row, WARPGROUP_ROWS)
            store.rows(acc * lax.broadcast_in_dim(share, acc.shape, [0]), out.at[batch, head], row, 0, num_rows, 0)
            return step + loop.steps

        def write_lse(x, batch, head, row):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            lse_buffer[warpgroup] = x
            plgpu.commit_smem()
            mosaic_gpu.check_whole(lse, WARPGROUP_ROWS)
            plgpu.copy_smem_to_gmem(lse_buffer.at[warpgroup], lse.at[batch, head, pl.ds(row, WARPGROUP_ROWS)])

        mosaic_gpu.for_each_tile(work.tiles, compute_tile)
        plgpu.wait_smem_to_gmem(0)

    mosaic_gpu.specialise(load, compute)
