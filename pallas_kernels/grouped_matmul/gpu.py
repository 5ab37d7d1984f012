"""Grouped matmul in Pallas Mosaic GPU, for Hopper. Axes as in `api.py`."""

from __future__ import annotations

from pallas_kernels.grouped_matmul.gpu_gradient import products_by_group
from pallas_kernels.grouped_matmul.gpu_rows import rows_by_group


def forward(lhs, rhs, scale, group_sizes, group_offset, layer, *, transpose_rhs, dtype):
    """[M, K] x [L, E, K, N] (or [L, E, N, K]) -> [M, N]; NotImplementedError for what `check_loadable` refuses."""
    if scale is not None:
        raise NotImplementedError("grouped_matmul: quantised weights have no Mosaic GPU kernel")
    return rows_by_group(
        lhs, [rhs], group_sizes, group_offset, layer, transpose_rhs=transpose_rhs, dtype=dtype, finish=lambda y: y
    )


def rhs_gradient(lhs, dout, group_sizes, group_offset, *, num_groups, transpose_rhs, dtype):
    """The gradient of one layer's matrices, [E, K, N] (or [E, N, K]), from [M, K] and [M, N]."""
    left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
    return products_by_group(left, right, group_sizes, group_offset, num_groups, dtype)
