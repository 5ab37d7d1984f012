"""Rows sorted by group times their group's matrices, in Pallas Mosaic GPU: what `grouped_matmul` and `grouped_swiglu`
share on Hopper.

A persistent kernel: every multiprocessor takes tiles of the output from one list, columns of a row tile one after
another, so that those at work share rows and matrices in the L2 cache. No row tile stores rows of two groups.

Where groups are large, a cluster of two blocks takes the two halves of a tile of 256 rows, and each loads half of the
matrices for both: L2 is what binds, and it is asked for a third less.
Axes: M rows, K contracted, N output columns, E groups of this shard, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu import COMPUTE_WARPGROUPS, ROW_ALIGNMENT, WARPGROUP_ROWS, Ring, Store

ROWS = COMPUTE_WARPGROUPS * WARPGROUP_ROWS  # of a tile
_ROWS_FOR_A_CLUSTER = 3 * ROWS  # in a mean group: with fewer, the second block of too many pairs is idle
_WIDEST = 256  # columns that the registers of a warpgroup can accumulate for 64 rows


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Of one block: [128, contracted] by [contracted, columns] of each matrix, `stages` of them in shared memory."""

    columns: int
    contracted: int
    stages: int

    def shared_bytes(self, num_matrices: int = 1, itemsize: int = 2) -> int:
        loaded = (ROWS + num_matrices * self.columns) * self.contracted * itemsize
        return self.stages * loaded + Store.shared_bytes()


def tiling(num_columns: int, num_matrices: int = 1, row_tiles: int = 1 << 20) -> Tiling:
    """Few padded columns, but wide tiles, which load less for each product; then as many stages as fit.

    With so few row tiles that multiprocessors would be idle, tiles are narrower.
    """
    widths = [width for width in (256, 192, 128, 64) if width * num_matrices <= _WIDEST]
    enough = [width for width in widths if row_tiles * pl.cdiv(num_columns, width) >= mosaic_gpu.multiprocessors()]
    widths = enough or widths[-1:]
    columns = min(widths, key=lambda width: pl.cdiv(num_columns, width) * (width + 32))
    stages = range(6, 1, -1)
    tilings = [Tiling(columns, mosaic_gpu.swizzle_elements(jnp.bfloat16), n) for n in stages]
    return next(t for t in tilings if t.shared_bytes(num_matrices) <= mosaic_gpu.shared_memory_bytes())


class Work(NamedTuple):
    """Row tiles, each of one group. Only the first `count` of the arrays' entries are tiles.

    A tile starts at a multiple of 8, so the first of a group may have rows of the group before it.
    """

    group: Int[Array, " n"]
    row: Int[Array, " n"]  # the tile's first row
    begin: Int[Array, " n"]  # of the group's rows in the tile, counted from `row`
    end: Int[Array, " n"]
    count: Int[Array, ""]


def work_list(group_sizes, first_row, num_rows: int, tile_rows: int = ROWS) -> Work:
    """Tiles of `tile_rows` rows of the whole output.

    The rows before and past this shard's groups are two groups of their own, -1 and E, and are written with zeros.
    """
    ends = jnp.array([0, num_rows], jnp.int32)
    borders = jnp.concatenate([ends[:1], group_borders(group_sizes, first_row), ends[1:]])
    start, end = borders[:-1], borders[1:]
    first = start // ROW_ALIGNMENT * ROW_ALIGNMENT
    per_group = jnp.where(end > start, pl.cdiv(end - first, tile_rows), 0)
    last = jnp.cumsum(per_group)
    most = min(num_rows, num_rows // tile_rows + 2 * len(start))  # each has a row
    index = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, index, side="right", method="compare_all"), len(start) - 1).astype(
        jnp.int32
    )
    row = first[group] + (index - (last - per_group)[group]) * tile_rows
    inside = lambda border: jnp.clip(border[group] - row, 0, tile_rows)  # noqa: E731
    return Work(group - 1, row, inside(start), inside(end), last[-1])


def group_borders(group_sizes, first_row) -> Int[Array, " E+1"]:
    """The first row of each of this shard's groups, and the end of the last."""
    sizes = jnp.concatenate([first_row[None], group_sizes])
    return jnp.cumsum(sizes, dtype=jnp.int32)


def rows_by_group(
    lhs: jax.Array,
    matrices: Sequence[jax.Array],
    group_sizes: jax.Array,
    first_row: jax.Array,
    layer: jax.Array,
    *,
    transpose_rhs: bool,
    dtype: Any,
    finish: Callable[..., jax.Array],
) -> jax.Array:
    """`finish` of the float32 products of lhs [M, K] with each of `matrices` [L, E, K, N] (or [L, E, N, K]) -> [M, N].

    `finish` is elementwise, and of zeros zero: that is what rows of other groups get.
    """
    rhs, rows_given = matrices[0], lhs.shape[0]
    lhs = mosaic_gpu.pad_rows(lhs)
    mosaic_gpu.check_loadable("grouped_matmul", lhs, *matrices)
    num_rows, num_columns = lhs.shape[0], rhs.shape[-2 if transpose_rhs else -1]
    if num_columns % mosaic_gpu.swizzle_elements(rhs.dtype):
        raise NotImplementedError(
            f"grouped_matmul: the Mosaic GPU kernel writes a multiple of 64 columns; got {rhs.shape}"
        )
    cluster = mosaic_gpu.cluster_size(num_rows >= _ROWS_FOR_A_CLUSTER * group_sizes.shape[0])
    work = work_list(group_sizes, first_row, num_rows, cluster * ROWS)
    tiles = tiling(num_columns, len(matrices), cluster * work.group.shape[0])
    scalars = jnp.stack([work.count, layer.astype(jnp.int32)])
    rhs_tile = (tiles.columns, tiles.contracted) if transpose_rhs else (tiles.contracted, tiles.columns)
    shapes = [(ROWS, tiles.contracted)] + [rhs_tile] * len(matrices)
    kernel = mosaic_gpu.kernel(
        functools.partial(_kernel, tiles=tiles, cluster=cluster, transpose_rhs=transpose_rhs, finish=finish),
        jax.ShapeDtypeStruct((num_rows, num_columns), dtype),
        num_blocks=work.group.shape[0] * pl.cdiv(num_columns, tiles.columns),
        scratch_types={
            "buffers": [mosaic_gpu.swizzled((tiles.stages, *shape), lhs.dtype) for shape in shapes],
            "barriers": Ring.barriers(tiles.stages, len(shapes), cluster),
            "stored": Store.scratch(dtype, partial=True),
        },
        cluster=cluster,
    )
    return kernel(scalars, work[:-1], lhs, tuple(matrices))[:rows_given]


def _kernel(scalars, work, lhs, matrices, out, *, buffers, barriers, stored, tiles, cluster, transpose_rhs, finish):
    shared = range(1, len(buffers)) if cluster > 1 else ()
    ring, store = Ring(buffers, **barriers, shared=shared), Store(stored, partial=True)
    first_of_block = mosaic_gpu.rank(cluster) * ROWS
    group, row, begin, end = work
    column_tiles = pl.cdiv(out.shape[1], tiles.columns)
    num_tiles, layer = scalars[0] * column_tiles, scalars[1]

    def place(tile):
        """Row tile, first column, group and number of steps."""
        row_tile = lax.div(tile, column_tiles)
        here = (group[row_tile] >= 0) & (group[row_tile] < matrices[0].shape[1])
        steps = jnp.where(here, pl.cdiv(lhs.shape[1], tiles.contracted), 0)
        return row_tile, lax.rem(tile, column_tiles) * tiles.columns, group[row_tile], steps

    def load():
        def load_tile(tile, step):
            row_tile, column, expert, num_steps = place(tile)
            rows = pl.ds(pl.multiple_of(row[row_tile] + first_of_block, ROW_ALIGNMENT), ROWS)
            columns = pl.ds(column, tiles.columns)

            def one(k, _):
                contracted = pl.ds(k * tiles.contracted, tiles.contracted)
                index = (columns, contracted) if transpose_rhs else (contracted, columns)
                ring.fill(step + k, [lhs.at[rows, contracted], *(m.at[layer, expert, *index] for m in matrices)])

            lax.fori_loop(0, num_steps, one, None)
            return step + num_steps

        ring.drain(mosaic_gpu.for_each_tile(num_tiles, load_tile))

    def compute(warpgroup):
        mine = pl.multiple_of(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def product(_, buffers, accumulators):
            left, *right = buffers
            for acc, matrix in zip(accumulators, right, strict=True):
                matrix = matrix.transpose((1, 0)) if transpose_rhs else matrix
                plgpu.wgmma(acc, left.at[pl.ds(mine, WARPGROUP_ROWS)], matrix)

        def compute_tile(tile, step):
            row_tile, column, _, num_steps = place(tile)
            first, last = (
                jnp.clip(border[row_tile] - first_of_block - mine, 0, WARPGROUP_ROWS) for border in (begin, end)
            )

            @pl.when(last > first)
            def _rows():
                shapes = [(WARPGROUP_ROWS, tiles.columns)] * len(matrices)
                y = finish(*ring.accumulate(step, num_steps, shapes, product))
                place_of_mine = pl.multiple_of(row[row_tile] + first_of_block + mine, ROW_ALIGNMENT)
                store.rows(y, out, place_of_mine, first, last, column)

            pl.when(last <= first)(lambda: ring.skip(step, num_steps))
            return step + num_steps

        mosaic_gpu.for_each_tile(num_tiles, compute_tile)
        plgpu.wait_smem_to_gmem(0)

    mosaic_gpu.specialise(load, compute)
