"""The TPU kernel for the gradient of the groups' matrices: lhs^T dout, summed over each group's rows.

The sum lies in VMEM while the rows of a group pass. lhs is transposed chunk by chunk, each chunk while the one before
it is multiplied, so that the matrix units do not wait; rows of other groups are cleared bit by bit (they may be NaN).

Axes: M rows, K contracted in the forward product, N its columns, E groups.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import Chip
from pallas_kernels.grouped_matmul import tiling as tilings
from pallas_kernels.grouped_matmul import work
from pallas_kernels.mosaic import kernel_output, tpu_params, varying_alike


def run(
    lhs: jax.Array,
    dout: jax.Array,
    group_sizes: jax.Array,
    first_row: jax.Array,
    *,
    dtype: Any,
    chip: Chip,
    tiling: tilings.GradientTiling | None = None,
) -> jax.Array:
    """[M, K], [M, N] -> [E, K, N]; zero for groups without rows. Operands of two dtypes are multiplied in `dtype`."""
    (num_rows, contracted), columns, num_groups = lhs.shape, dout.shape[1], group_sizes.shape[0]
    if 0 in (num_rows, contracted, columns, num_groups):
        return jnp.zeros((num_groups, contracted, columns), dtype)
    if lhs.dtype != dout.dtype:
        lhs, dout = (x.astype(dtype) for x in (lhs, dout))
    tiling = tiling or tilings.tile_gradient(num_rows, contracted, columns, (lhs.dtype, dtype), chip)
    visits = work.over_groups(group_sizes, first_row, num_rows, tiling.rows)
    *scalars, lhs, dout = varying_alike(*visits, lhs, dout)
    block = (tiling.contracted, tiling.columns)
    tile_of = lambda s, i: work.Work(*s).tile[0, i]  # noqa: E731
    transposed = pltpu.VMEM((tiling.chunk, tiling.step), lhs.dtype)
    sums = [pltpu.VMEM(block, jnp.float32)] * (jnp.dtype(dtype) != jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, tiling),
        out_shape=kernel_output((num_groups, contracted, columns), dtype, lhs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(-(-contracted // block[0]), -(-columns // block[1]), scalars[-1][0]),
            in_specs=[
                pl.BlockSpec((tiling.rows, block[0]), lambda k, n, i, *s: (tile_of(s, i), k)),
                pl.BlockSpec((tiling.rows, block[1]), lambda k, n, i, *s: (tile_of(s, i), n)),
            ],
            out_specs=pl.BlockSpec((None, *block), lambda k, n, i, *s: (work.Work(*s).region[0, i], k, n)),
            scratch_shapes=[transposed, transposed, pltpu.VMEM((tiling.step, block[1]), lhs.dtype), *sums],
        ),
        compiler_params=tpu_params(chip, "parallel", "parallel", "arbitrary"),
        name="grouped_matmul_rhs_gradient",
    )(*scalars, lhs, dout)


def _kernel(tiling, region, tile, fetched, matrix, bounds, count, lhs, dout, out, even, odd, ours, *sums):
    i = pl.program_id(2)
    mine = region[0, i]
    is_first_visit = (i == 0) | (mine != region[0, jnp.maximum(i - 1, 0)])
    start = tile[0, i] * tiling.rows
    low, high = bounds[0, mine] - start, bounds[0, mine + 1] - start
    total = sums[0] if sums else out
    first = jax.lax.div(jnp.clip(low, 0, tiling.rows - tiling.step), tiling.step)
    last = jax.lax.div(jnp.minimum(high, tiling.rows) + tiling.step - 1, tiling.step)
    last = jnp.maximum(last, first + 1)  # zeros at least

    def step(s, _):
        at = pl.ds(pl.multiple_of(s * tiling.step, tiling.step), tiling.step)
        clear = functools.partial(_clear, s * tiling.step, low, high)
        is_new = is_first_visit & (s == first)
        ours[...] = clear(dout[at, :])

        def transpose(buffer, chunk):
            buffer[: chunk.size, :] = clear(lhs[at, chunk]).T

        def multiply(buffer, chunk):
            product = _dot(buffer[: chunk.size, :], ours[...])
            sum_ = jnp.where(is_new, 0.0, total[chunk, :]) + product
            total[chunk, :] = sum_
            if sums:
                out[chunk, :] = sum_.astype(out.dtype)

        # straight, without a loop: only so are both done at once
        _one_ahead(lhs.shape[1], tiling.chunk, (even, odd), transpose, multiply)

    jax.lax.fori_loop(first, last, step, None)


def _one_ahead(size: int, chunk: int, buffers: tuple[Any, Any], prepare, use) -> None:
    """Uses each chunk of an axis in turn, the next one prepared meanwhile in the other buffer."""
    chunks = [pl.ds(start, min(chunk, size - start)) for start in range(0, size, chunk)]
    prepare(buffers[0], chunks[0])
    for c, now in enumerate(chunks):
        if c + 1 < len(chunks):
            prepare(buffers[1 - c % 2], chunks[c + 1])
        use(buffers[c % 2], now)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _clear(first_row: jax.Array, low: jax.Array, high: jax.Array, x: jax.Array) -> jax.Array:
    """Zeros in the rows of x, of which the first is `first_row`, that are not in low..high; by bits, so NaN too."""
    packed = 4 // x.dtype.itemsize  # rows in one 32-bit word, the first in its lowest bits
    row = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0] // packed, 1), 0) * packed + first_row
    bits = jnp.zeros(row.shape, jnp.int32)
    for p, ones in enumerate([-1] if packed == 1 else [0xFFFF, -(1 << 16)]):
        bits |= jnp.where((row + p >= low) & (row + p < high), ones, 0)
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & bits, x.dtype)
