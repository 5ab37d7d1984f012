"""The gradient of a grouped matmul's matrices in Pallas Mosaic GPU: group by group, rows of one array times another's.

A persistent kernel over tiles of the groups' gradients; the rows of a group are what a tile sums over. A cluster of two
blocks takes neighbouring columns of the left array, and each loads half of the right one's for both.
Axes: M rows, P and Q the columns of the two arrays (K and N, or N and K), E groups of this shard.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.grouped_matmul.gpu_rows import Tiling, group_borders
from pallas_kernels.mosaic_gpu import COMPUTE_WARPGROUPS, ROW_ALIGNMENT, WARPGROUP_ROWS, Ring, Store

_LEFT = COMPUTE_WARPGROUPS * WARPGROUP_ROWS  # columns of the left array in a tile


def tiling(num_columns: int) -> Tiling:
    """Of one block: [contracted, 128] by [contracted, columns], the rows of the arrays being contracted."""
    columns = min((256, 192, 128, 64), key=lambda width: pl.cdiv(num_columns, width) * (width + 32))
    tilings = [Tiling(columns, mosaic_gpu.swizzle_elements(jnp.bfloat16), stages) for stages in range(6, 1, -1)]
    return next(t for t in tilings if t.shared_bytes() <= mosaic_gpu.shared_memory_bytes())


def products_by_group(left: Any, right: Any, group_sizes: Any, first_row: Any, dtype: Any) -> jax.Array:
    """left [M, P], right [M, Q] -> [E, P, Q]; zeros for a group without rows."""
    num_groups = group_sizes.shape[0]
    left, right = mosaic_gpu.pad_rows(left), mosaic_gpu.pad_rows(right)
    mosaic_gpu.check_loadable("the gradient of grouped_matmul", left, right)
    tiles = tiling(right.shape[1])
    shapes = [(tiles.contracted, _LEFT), (tiles.contracted, tiles.columns)]
    cluster = mosaic_gpu.cluster_size(left.shape[1] > _LEFT)
    num_tiles = num_groups * pl.cdiv(left.shape[1], cluster * _LEFT) * pl.cdiv(right.shape[1], tiles.columns)
    kernel = mosaic_gpu.kernel(
        functools.partial(_kernel, tiles=tiles, cluster=cluster),
        jax.ShapeDtypeStruct((num_groups, left.shape[1], right.shape[1]), dtype),
        num_blocks=num_tiles,
        scratch_types={
            "buffers": [mosaic_gpu.swizzled((tiles.stages, *shape), left.dtype) for shape in shapes],
            "barriers": Ring.barriers(tiles.stages, len(shapes), cluster),
            "masked": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            "stored": Store.scratch(dtype),
        },
        cluster=cluster,
    )
    return kernel(group_borders(group_sizes, first_row), left, right)


def _kernel(borders, left, right, out, *, buffers, barriers, masked, stored, tiles, cluster):
    ring, store = Ring(buffers, **barriers, shared=(1,) if cluster > 1 else ()), Store(stored)
    first_of_block = mosaic_gpu.rank(cluster) * _LEFT
    num_groups, left_columns, right_columns = out.shape
    left_tiles, right_tiles = pl.cdiv(left_columns, cluster * _LEFT), pl.cdiv(right_columns, tiles.columns)

    def place(tile):
        """Group, columns of the two arrays, first row (a multiple of 8) and number of steps."""
        group, within = lax.div(tile, left_tiles * right_tiles), lax.rem(tile, left_tiles * right_tiles)
        start, end = borders[group], borders[group + 1]
        first = pl.multiple_of(start - lax.rem(start, ROW_ALIGNMENT), ROW_ALIGNMENT)
        steps = jnp.where(end > start, lax.div(end - first + tiles.contracted - 1, tiles.contracted), 0)
        left_column = lax.div(within, right_tiles) * cluster * _LEFT + first_of_block
        return group, left_column, lax.rem(within, right_tiles) * tiles.columns, first, steps

    def load():
        def load_tile(tile, step):
            _, left_column, right_column, first, num_steps = place(tile)

            def one(k, _):
                rows = pl.ds(first + k * tiles.contracted, tiles.contracted)
                sources = [left.at[rows, pl.ds(left_column, _LEFT)], right.at[rows, pl.ds(right_column, tiles.columns)]]
                ring.fill(step + k, sources)

            lax.fori_loop(0, num_steps, one, None)
            return step + num_steps

        ring.drain(mosaic_gpu.for_each_tile(num_groups * left_tiles * right_tiles, load_tile))

    def compute(warpgroup):
        mine = pl.ds(pl.multiple_of(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
        pieces = range(0, tiles.columns, mosaic_gpu.swizzle_elements(right.dtype))

        def compute_tile(tile, step):
            group, left_column, right_column, first, num_steps = place(tile)

            def product(k, buffers, accumulators):
                row = first + k * tiles.contracted
                begin, end = borders[group] - row, borders[group + 1] - row

                @pl.when((begin > 0) | (end < tiles.contracted))
                def _mask():
                    # both arrays: a row of another group may hold what zero does not make zero
                    _keep_rows(buffers[0].at[:, mine], begin, end)
                    for i, column in enumerate(pieces):  # in turn
                        piece = buffers[1].at[:, pl.ds(column, pieces.step)]
                        pl.when(warpgroup == i % COMPUTE_WARPGROUPS)(lambda piece=piece: _keep_rows(piece, begin, end))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(masked)
                    plgpu.barrier_wait(masked)

                plgpu.wgmma(accumulators[0], buffers[0].at[:, mine].transpose((1, 0)), buffers[1])

            (y,) = ring.accumulate(step, num_steps, [(WARPGROUP_ROWS, tiles.columns)], product)
            row = left_column + warpgroup * WARPGROUP_ROWS
            num_rows = jnp.clip(left_columns - row, 0, WARPGROUP_ROWS)
            store.rows(y, out.at[group], pl.multiple_of(row, WARPGROUP_ROWS), 0, num_rows, right_column)
            return step + num_steps

        mosaic_gpu.for_each_tile(num_groups * left_tiles * right_tiles, compute_tile)
        plgpu.wait_smem_to_gmem(0)

    mosaic_gpu.specialise(load, compute)


def _keep_rows(buffer: Any, begin: Any, end: Any) -> None:
    """Writes zeros to the rows outside `begin` to `end`."""
    row = plgpu.broadcasted_iota(jnp.int32, buffer.shape, 0, layout=plgpu.Layout.WGMMA)
    buffer[...] = jnp.where((row >= begin) & (row < end), buffer[...], jnp.zeros((), buffer.dtype))
