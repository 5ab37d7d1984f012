"""Grouped matmul on TPU: the product of rows, and the matrices' gradient. See `tpu_rows` and `tpu_gradient`."""

from __future__ import annotations

from pallas_kernels.chip import tpu_to_tile_for
from pallas_kernels.grouped_matmul import tpu_gradient, tpu_rows
from pallas_kernels.grouped_matmul.rows import RowKernel


def forward(lhs, rhs, scale, group_sizes, first_row, layer, *, transpose_rhs, dtype, chip=None, tiling=None):
    """[M, K] x [L, E, K, N] (or [L, E, N, K]) -> [M, N]."""
    kernel = RowKernel("grouped_matmul", ((0, 0),), lambda products, _: products, (dtype,))
    (out,) = tpu_rows.run(
        kernel, [lhs], [rhs], [scale], [], (group_sizes, first_row, layer),
        transpose_rhs=transpose_rhs, chip=chip, tiling=tiling,
    )  # fmt: skip
    return out


def rhs_gradient(lhs, dout, group_sizes, first_row, *, transpose_rhs, dtype, chip=None, tiling=None):
    """The gradient of one layer's matrices, [E, K, N] (or [E, N, K]), from [M, K] and [M, N]."""
    left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
    return tpu_gradient.run(left, right, group_sizes, first_row, dtype=dtype, chip=tpu_to_tile_for(chip), tiling=tiling)
