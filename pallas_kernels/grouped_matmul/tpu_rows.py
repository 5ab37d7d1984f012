"""The TPU kernel that multiplies rows by their groups' matrices: the frame of the grouped kernels.

One visit brings a tile of rows and the matrix of one group together. The matrix's block changes only with the group, so
it is fetched once for all rows of the group, whatever the tiles; of the tile only steps that hold rows of the group are
multiplied. What becomes of the products, in float32 and before anything is written, is the caller's `combine`.

Axes: M rows, K contracted, N columns, E groups, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import tpu_to_tile_for
from pallas_kernels.grouped_matmul import tiling as tilings
from pallas_kernels.grouped_matmul import tpu_scale, work
from pallas_kernels.grouped_matmul.quantised import is_quantised
from pallas_kernels.grouped_matmul.rows import Products, RowKernel
from pallas_kernels.mosaic import kernel_output, tpu_params, varying_alike


def run(
    kernel: RowKernel,
    lhs: Sequence[jax.Array],
    rhs: Sequence[jax.Array],
    scales: Sequence[jax.Array | None],
    beside: Sequence[jax.Array],
    groups: tuple[jax.Array, jax.Array, jax.Array],
    *,
    transpose_rhs: bool,
    chip: str | None = None,
    tiling: tilings.Tiling | None = None,
) -> tuple[jax.Array, ...]:
    """`kernel` over lhs [M, K] each, rhs [L, E, K, N] (or [L, E, N, K]), beside [M, N]; results [M, N].

    `groups`: sizes [E], first row, layer. Rows of no group come out zero. The matrix unit multiplies what is of one
    dtype: beside dense matrices rows take theirs, so that float32 rows are rounded to bfloat16 where the matrices are,
    as in XLA's own products on TPUs.
    """
    chip_of = tpu_to_tile_for(chip)
    if not is_quantised(rhs[0].dtype):
        lhs = [x.astype(rhs[0].dtype) for x in lhs]
    num_rows, contracted = lhs[0].shape
    num_groups, columns = rhs[0].shape[1], rhs[0].shape[2 if transpose_rhs else 3]
    if 0 in (num_rows, contracted, columns, num_groups):
        return tuple(jnp.zeros((num_rows, columns), dtype) for dtype in kernel.out_dtypes)
    operands = len(lhs), len(rhs), len(beside), len(kernel.out_dtypes)
    widest = max(kernel.out_dtypes, key=lambda d: jnp.dtype(d).itemsize)
    shape = tilings.Shape(
        num_rows, contracted, columns, num_groups, operands, (lhs[0].dtype, rhs[0].dtype, widest)
    )  # fmt: skip
    tiling = tiling or tilings.tile_rows(shape, chip_of)
    sizes, first_row, layer = groups
    cores = min(chip_of.cores, -(-num_rows // tiling.rows))
    visits = work.over_all_rows(sizes, first_row, num_rows, tiling.rows, cores)
    kinds, scales = tpu_scale.lay_out(scales, rhs, transpose_rhs=transpose_rhs)
    given = [x for x in scales if x is not None]
    scalars = (*visits, layer[None])
    inputs = varying_alike(*scalars, *lhs, *rhs, *given, *beside)
    chunk = tilings.column_chunk(tiling, len(kernel.pairs), chip_of, lhs[0].dtype)
    steps_contracted = -(-contracted // tiling.contracted)
    frame = _Frame(kernel, tiling, chunk, operands, tuple(kinds), transpose_rhs, steps_contracted, num_groups)
    most_visits = jnp.max(inputs[len(visits) - 1])
    return pl.pallas_call(
        functools.partial(_kernel, frame),
        out_shape=[kernel_output((num_rows, columns), dtype, inputs[0]) for dtype in kernel.out_dtypes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, -(-columns // tiling.columns), most_visits, frame.steps_contracted),
            in_specs=_in_specs(frame, given),
            out_specs=[_out_spec(frame)] * len(kernel.out_dtypes),
            scratch_shapes=_scratch(frame, lhs[0].dtype),
        ),
        compiler_params=tpu_params(chip_of, "parallel", "arbitrary", "arbitrary", "arbitrary"),
        name=kernel.name,
    )(*inputs)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """All that is static of one call."""

    kernel: RowKernel
    tiling: tilings.Tiling
    chunk: int
    operands: tuple[int, int, int, int]
    scale_kinds: tuple[str | None, ...]
    transpose_rhs: bool
    steps_contracted: int
    num_groups: int

    @property
    def matrix_block(self) -> tuple[int, int]:
        block = self.tiling.contracted, self.tiling.columns
        return block[::-1] if self.transpose_rhs else block


def _out_spec(frame: _Frame) -> pl.BlockSpec:
    return pl.BlockSpec(
        (frame.tiling.rows, frame.tiling.columns), lambda c, n, i, k, *s: (work.Work(*s[:6]).tile[c, i], n)
    )


def _in_specs(frame: _Frame, scales: Sequence[jax.Array]) -> list[pl.BlockSpec]:
    num_lhs, num_rhs, num_beside, _ = frame.operands

    def matrix_index(c, n, i, k, *scalars):
        place = (n, k) if frame.transpose_rhs else (k, n)
        return scalars[6][0], work.Work(*scalars[:6]).matrix[c, i], *place

    fetched = lambda c, i, s: work.Work(*s[:6]).fetched[c, i]  # noqa: E731
    rows = pl.BlockSpec(
        (frame.tiling.rows, frame.tiling.contracted), lambda c, n, i, k, *s: (fetched(c, i, s), k)
    )  # fmt: skip
    columns = pl.BlockSpec(
        (frame.tiling.rows, frame.tiling.columns), lambda c, n, i, k, *s: (fetched(c, i, s), n)
    )  # fmt: skip
    matrix = pl.BlockSpec((None, None, *frame.matrix_block), matrix_index)
    kinds = [kind for kind in frame.scale_kinds if kind is not None]
    factors = [tpu_scale.block_spec(kind, scale, frame.tiling) for kind, scale in zip(kinds, scales)]
    return [rows] * num_lhs + [matrix] * num_rhs + factors + [columns] * num_beside


def _scratch(frame: _Frame, dtype: Any) -> list[Any]:
    """Sums over the steps of the contracted axis where there are several, and the dequantised matrices."""
    tiling = frame.tiling
    sums = [pltpu.VMEM((len(frame.kernel.pairs), tiling.rows, tiling.columns), jnp.float32)]
    dense = [pltpu.VMEM(frame.matrix_block, dtype) for kind in frame.scale_kinds if kind is not None]
    return sums * (frame.steps_contracted > 1) + dense


def _kernel(frame: _Frame, region, tile, fetched, matrix, bounds, count, layer, *refs):
    num_lhs, num_rhs, num_beside, num_out = frame.operands
    num_scales = sum(kind is not None for kind in frame.scale_kinds)
    lhs, rhs, factors, beside, out, scratch = _split(refs, num_lhs, num_rhs, num_scales, num_beside, num_out)
    core, i, k = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    mine = region[core, i]
    start = tile[core, i] * frame.tiling.rows
    low, high = bounds[core, mine] - start, bounds[core, mine + 1] - start
    sums = scratch[0] if frame.steps_contracted > 1 else None
    factors = tpu_scale.by_matrix(frame.scale_kinds, factors)
    if num_scales:
        before = matrix[core, jnp.maximum(i - 1, 0)]
        is_new = (i == 0) | (matrix[core, i] != before) | (frame.steps_contracted > 1)
        dense = tpu_scale.by_matrix(frame.scale_kinds, scratch[len(scratch) - num_scales :])
        pl.when(is_new)(lambda: _dequantise(frame, dense, rhs, factors))
        rhs = [given if made is None else made for given, made in zip(rhs, dense)]
    scaling = tpu_scale.Scaling(frame.scale_kinds, factors)

    def multiply(at, inside):
        def chunk(c, _):
            columns = pl.ds(pl.multiple_of(c * frame.chunk, frame.chunk), frame.chunk)
            products = [_product(lhs[a], rhs[b], at, columns, frame, scaling, b) for a, b in frame.kernel.pairs]
            _finish(frame, products, sums, beside, out, at, columns, inside, k)

        jax.lax.fori_loop(0, frame.tiling.columns // frame.chunk, chunk, None)

    def clear(at, inside):
        for o in out:
            o[at, :] = jnp.where(inside, 0, o[at, :].astype(jnp.float32)).astype(o.dtype)

    in_a_group, is_visit = (mine > 0) & (mine <= frame.num_groups), i < count[core]
    pl.when(is_visit & in_a_group)(lambda: _for_steps(frame.tiling, low, high, multiply))
    pl.when(is_visit & jnp.logical_not(in_a_group))(lambda: _for_steps(frame.tiling, low, high, clear))


def _dequantise(frame: _Frame, dense, rhs, factors) -> None:
    place = pl.program_id(3) * frame.tiling.contracted, pl.program_id(1) * frame.tiling.columns
    for out, quantised, factor, kind in zip(dense, rhs, factors, frame.scale_kinds):
        if kind is not None:
            tpu_scale.fill(out, quantised, factor, kind, *(place[::-1] if frame.transpose_rhs else place))


def _for_steps(tiling: tilings.Tiling, low: jax.Array, high: jax.Array, do: Callable[[Any, jax.Array], None]) -> None:
    """Calls `do` for every step that holds some of the tile's rows low..high, and with which of its rows those are."""

    def step(s, _):
        row = jax.lax.broadcasted_iota(jnp.int32, (tiling.step, 1), 0) + s * tiling.step
        do(pl.ds(pl.multiple_of(s * tiling.step, tiling.step), tiling.step), (row >= low) & (row < high))

    first = jax.lax.div(jnp.maximum(low, 0), tiling.step)
    last = jax.lax.div(jnp.minimum(high, tiling.rows) + tiling.step - 1, tiling.step)
    jax.lax.fori_loop(first, last, step, None)


def _product(lhs, rhs, at, columns, frame: _Frame, scaling: tpu_scale.Scaling, which: int) -> jax.Array:
    rows = scaling.of_rows(which, lhs[at, :])
    product = jax.lax.dot_general(
        rows,
        rhs[columns, :] if frame.transpose_rhs else rhs[:, columns],
        (((1,), (1 if frame.transpose_rhs else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return scaling.of_columns(which, product, columns)


def _finish(frame: _Frame, products: Products, sums, beside, out, at, columns, inside, k) -> None:
    """Stores what becomes of the products, once they are summed over the whole contracted axis."""
    if sums is None:
        _store(frame, products, beside, out, at, columns, inside)
        return
    for p, product in enumerate(products):
        sums[p, at, columns] = jnp.where(k == 0, 0.0, sums[p, at, columns]) + product

    @pl.when(k == frame.steps_contracted - 1)
    def _():
        _store(frame, [sums[p, at, columns] for p in range(len(products))], beside, out, at, columns, inside)


def _store(frame: _Frame, products: Products, beside, out, at, columns, inside) -> None:
    results = frame.kernel.combine(products, [x[at, columns].astype(jnp.float32) for x in beside])
    for o, result in zip(out, results):
        o[at, columns] = jnp.where(inside, result, o[at, columns].astype(jnp.float32)).astype(o.dtype)


def _split(refs: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    parts, at = [], 0
    for count in counts:
        parts.append(refs[at : at + count])
        at += count
    return [*parts, refs[at:]]
