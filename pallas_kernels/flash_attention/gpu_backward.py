"""The backward kernels in Mosaic GPU: one for the queries' gradient, one for the keys' and values'.

Both compute the weights anew from the log-sum-exp. For the queries' gradient a tile is 128 queries of one head, which
meet 128 keys at a time; for the others it is 128 keys of one kv head, which meet 64 queries at a time, of every head
that shares it, so that nothing has to be summed outside. Gradients accumulate in registers, 64 rows to a warpgroup.

Axes: B batch, H query heads, K kv heads, S queries, T keys, D head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.flash_attention.gpu_common import (
    LOG2_E,
    QUERIES,
    Plan,
    key_blocks,
    plan,
    query_blocks,
    segment_arrays,
    visible,
)
from pallas_kernels.flash_attention.problem import Problem, Segments
from pallas_kernels.mosaic_gpu import WARPGROUP_ROWS, Ring, Store

_STEP_QUERIES = 64  # that a tile of keys meets at a time


def backward(q, k, v, segments: Segments, q_offset, lse, delta, dout, *, problem: Problem):
    """dq, dk, dv; delta [B, H, S] is what all gradients of a query's scores have taken off."""
    queries, keys = q.shape[2], k.shape[2]
    work, (q, k, v) = plan(problem, q, k, v, segments)
    to = lambda size, x: jnp.pad(x, ((0, 0), (0, 0), (0, size - queries), *((0, 0),) * (x.ndim - 3)))  # noqa: E731
    arrays = q, k, v, to(q.shape[2], dout), to(work.vector, lse * LOG2_E), to(work.vector, delta)
    scalars, ids = jnp.asarray(q_offset, jnp.int32).reshape(1), segment_arrays(work, segments)
    dq = _dq_call(work, q.dtype)(scalars, key_blocks(work, segments, q_offset), ids, *arrays)
    ranges = query_blocks(work, segments, q_offset, _STEP_QUERIES)
    dk, dv = _dkv_call(work, q.dtype)(scalars, ranges, ids, *arrays)
    return dq[:, :, :queries], dk[:, :, :keys], dv[:, :, :keys]


def _call(body, work: Plan, out_type, tiles: int, tile_rows: int, step_rows: int, stages: int, dtype, queries_per: str):
    """A kernel whose tiles have two matrices, and whose steps two; beside those of queries stand two vectors."""

    def buffers(stages, rows, with_queries):
        matrices = [mosaic_gpu.swizzled((stages, rows, work.head_dim), dtype)] * 2
        vectors = [plgpu.SMEM((stages, rows), jnp.float32)] * 2 if with_queries else []
        return matrices + vectors + ([plgpu.SMEM((stages, rows), jnp.int32)] if work.segmented else [])

    steps = buffers(stages, step_rows, queries_per == "step")
    tile = buffers(1, tile_rows, queries_per == "tile")
    return mosaic_gpu.kernel(
        functools.partial(body, work=work),
        out_type,
        num_blocks=tiles,
        scratch_types={
            "buffers": steps,
            "barriers": Ring.barriers(stages, len(steps)),
            "tile_buffers": tile,
            "tile_barriers": Ring.barriers(1, len(tile)),
            "stored": Store.scratch(dtype, slots=1),
        },
        approx_math=True,
    )


def _rings(work: Plan, buffers, barriers, tile_buffers, tile_barriers, stored, queries_per: str):
    ring = Ring(buffers, **barriers, to_registers=work.segmented or queries_per == "step")
    tile_ring = Ring(tile_buffers, **tile_barriers, to_registers=work.segmented or queries_per == "tile")
    return ring, tile_ring, Store(stored, slots=1)


def _dq_call(work: Plan, dtype):
    out = jax.ShapeDtypeStruct((work.batch, work.heads, work.padded(work.queries), work.head_dim), dtype)
    return _call(_dq_kernel, work, out, work.tiles, QUERIES, work.block_kv, 2, dtype, "tile")


def _dkv_call(work: Plan, dtype):
    shape = (work.batch, work.heads // work.groups, work.padded(work.keys), work.head_dim)
    out = (jax.ShapeDtypeStruct(shape, dtype),) * 2
    return _call(_dkv_kernel, work, out, work.key_tiles, work.block_kv, _STEP_QUERIES, 4, dtype, "step")


def _dq_kernel(
    scalars, ranges, ids, q, k, v, dout, lse, delta, dq, *, buffers, barriers, tile_buffers, tile_barriers, stored, work
):
    ring, tile_ring, store = _rings(work, buffers, barriers, tile_buffers, tile_barriers, stored, "tile")

    def load():
        def load_tile(tile, step):
            batch, head, block = work.place(tile)
            rows, kv = pl.ds(block * QUERIES, QUERIES), lax.div(head, work.groups)
            mine = [x.at[batch, head, rows] for x in (q, dout, lse, delta)] + [x.at[batch, rows] for x in ids[:1]]
            tile_ring.fill(mosaic_gpu.turn_of(tile), mine)
            loop = work.loop(ranges, batch, block)

            def one(i, _):
                keys = pl.ds(loop.block(i) * work.block_kv, work.block_kv)
                ring.fill(step + i, [x.at[batch, kv, keys] for x in (k, v)] + [x.at[batch, keys] for x in ids[1:]])

            lax.fori_loop(0, loop.steps, one, None)
            return step + loop.steps

        mosaic_gpu.for_each_tile(work.tiles, load_tile)

    def compute(warpgroup):
        mine = pl.ds(pl.multiple_of(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
        shape = (WARPGROUP_ROWS, work.block_kv)

        def compute_tile(tile, step):
            batch, head, block = work.place(tile)
            loop, row = work.loop(ranges, batch, block), block * QUERIES + warpgroup * WARPGROUP_ROWS
            parts = [x.at[mine] for x in tile_ring.wait(mosaic_gpu.turn_of(tile))]
            q_mine, dout_mine, lse_mine, delta_mine, *q_ids = parts
            lse_rows, delta_rows = lse_mine[...], delta_mine[...]

            def meet(acc, i, masked):
                k_block, v_block, *k_ids = ring.wait(step + i)

                def multiply(scores, dweights):
                    plgpu.wgmma(scores, q_mine, k_block.transpose((1, 0)))
                    plgpu.wgmma(dweights, dout_mine, v_block.transpose((1, 0)))
                    return scores[...], dweights[...]

                scores, dweights = pl.run_scoped(multiply, plgpu.ACC(shape), plgpu.ACC(shape))
                weights = jnp.exp2(scores * (work.problem.scale * LOG2_E) - lax.broadcast_in_dim(lse_rows, shape, [0]))
                if masked:
                    key = loop.block(i) * work.block_kv
                    seen = visible(work, shape, row, key, scalars[0], q_ids, k_ids)
                    weights = jnp.where(seen, weights, 0.0)
                dscores = weights * (dweights - lax.broadcast_in_dim(delta_rows, shape, [0]))
                plgpu.wgmma(acc, dscores.astype(k.dtype), k_block)
                plgpu.wgmma_wait(0)
                ring.free(step + i)

            def gather(acc):
                lax.fori_loop(0, loop.full, lambda i, _: meet(acc, i, False), None)
                lax.fori_loop(loop.full, loop.steps, lambda i, _: meet(acc, i, True), None)
                return acc[...]

            y = pl.run_scoped(gather, plgpu.ACC((WARPGROUP_ROWS, work.head_dim))) * work.problem.scale
            tile_ring.free(mosaic_gpu.turn_of(tile))
            num_rows = jnp.where(row < q.shape[2], WARPGROUP_ROWS, 0)
            store.rows(y, dq.at[batch, head], pl.multiple_of(row, WARPGROUP_ROWS), 0, num_rows, 0)
            return step + loop.steps

        mosaic_gpu.for_each_tile(work.tiles, compute_tile)
        plgpu.wait_smem_to_gmem(0)

    mosaic_gpu.specialise(load, compute)


def _dkv_kernel(
    scalars,
    ranges,
    ids,
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    *,
    buffers,
    barriers,
    tile_buffers,
    tile_barriers,
    stored,
    work,
):
    ring, tile_ring, store = _rings(work, buffers, barriers, tile_buffers, tile_barriers, stored, "step")

    def load():
        def load_tile(tile, step):
            batch, kv, block = work.key_place(tile)
            keys = pl.ds(block * work.block_kv, work.block_kv)
            mine = [x.at[batch, kv, keys] for x in (k, v)] + [x.at[batch, keys] for x in ids[1:]]
            tile_ring.fill(mosaic_gpu.turn_of(tile), mine)
            loop = work.loop(ranges, batch, block)

            def of_head(g, step):
                def one(i, _):
                    rows, head = pl.ds(loop.block(i) * _STEP_QUERIES, _STEP_QUERIES), kv * work.groups + g
                    sources = [x.at[batch, head, rows] for x in (q, dout, lse, delta)]
                    ring.fill(step + i, sources + [x.at[batch, rows] for x in ids[:1]])

                lax.fori_loop(0, loop.steps, one, None)
                return step + loop.steps

            return lax.fori_loop(0, work.groups, of_head, step)

        mosaic_gpu.for_each_tile(work.key_tiles, load_tile)

    def compute(warpgroup):
        mine = pl.ds(pl.multiple_of(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
        shape, result = (WARPGROUP_ROWS, _STEP_QUERIES), plgpu.ACC((WARPGROUP_ROWS, work.head_dim))

        def compute_tile(tile, step):
            batch, kv, block = work.key_place(tile)
            loop, key = work.loop(ranges, batch, block), block * work.block_kv + warpgroup * WARPGROUP_ROWS
            k_mine, v_mine, *k_ids = [x.at[mine] for x in tile_ring.wait(mosaic_gpu.turn_of(tile))]

            def meet(dk_sum, dv_sum, step, i, masked):
                q_block, dout_block, lse_block, delta_block, *q_ids = ring.wait(step + i)

                def multiply(scores):
                    plgpu.wgmma(scores, k_mine, q_block.transpose((1, 0)))
                    return scores[...]

                scores = pl.run_scoped(multiply, plgpu.ACC(shape)) * (work.problem.scale * LOG2_E)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(lse_block[...], shape, [1]))
                if masked:
                    query = loop.block(i) * _STEP_QUERIES
                    seen = visible(work, shape, query, key, scalars[0], q_ids, k_ids, queries=1)
                    weights = jnp.where(seen, weights, 0.0)

                def multiply_values(dweights):
                    plgpu.wgmma(dv_sum, weights.astype(q.dtype), dout_block)
                    plgpu.wgmma(dweights, v_mine, dout_block.transpose((1, 0)))
                    return dweights[...]

                dweights = pl.run_scoped(multiply_values, plgpu.ACC(shape))
                dscores = weights * (dweights - lax.broadcast_in_dim(delta_block[...], shape, [1]))
                plgpu.wgmma(dk_sum, dscores.astype(q.dtype), q_block)
                plgpu.wgmma_wait(0)
                ring.free(step + i)

            def gather(dk_sum, dv_sum):
                def of_head(g, step):
                    lax.fori_loop(0, loop.full, lambda i, _: meet(dk_sum, dv_sum, step, i, False), None)
                    lax.fori_loop(loop.full, loop.steps, lambda i, _: meet(dk_sum, dv_sum, step, i, True), None)
                    return step + loop.steps

                lax.fori_loop(0, work.groups, of_head, step)
                return dk_sum[...], dv_sum[...]

            dk_mine, dv_mine = pl.run_scoped(gather, result, result)
            tile_ring.free(mosaic_gpu.turn_of(tile))
            num_rows = jnp.where(key < k.shape[2], WARPGROUP_ROWS, 0)
            for y, out in ((dk_mine * work.problem.scale, dk), (dv_mine, dv)):
                store.rows(y, out.at[batch, kv], pl.multiple_of(key, WARPGROUP_ROWS), 0, num_rows, 0)
            return step + work.groups * loop.steps

        mosaic_gpu.for_each_tile(work.key_tiles, compute_tile)
        plgpu.wait_smem_to_gmem(0)

    mosaic_gpu.specialise(load, compute)
