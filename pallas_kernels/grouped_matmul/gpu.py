"""Grouped matmul in Pallas Mosaic GPU, for Hopper. Axes as in `api.py`.

Mosaic GPU is imported when a kernel is asked for: that takes a second, and on jax 0.10 absl-py.
"""

from __future__ import annotations


def forward(lhs, rhs, scale, group_sizes, first_row, layer, *, transpose_rhs, dtype):
    """[M, K] x [L, E, K, N] (or [L, E, N, K]) -> [M, N]. Raises NotImplementedError for what has no kernel."""
    from pallas_kernels.grouped_matmul.gpu_rows import rows_by_group

    if scale is not None:
        raise NotImplementedError("grouped_matmul: quantised weights have no Mosaic GPU kernel")
    groups = (group_sizes, first_row, layer)
    return rows_by_group(lhs, [rhs], *groups, transpose_rhs=transpose_rhs, dtype=dtype, finish=lambda y: y)


def rhs_gradient(lhs, dout, group_sizes, first_row, *, transpose_rhs, dtype):
    """The gradient of one layer's matrices, [E, K, N] (or [E, N, K]), from [M, K] and [M, N]."""
    from pallas_kernels.grouped_matmul.gpu_gradient import products_by_group

    left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
    return products_by_group(left, right, group_sizes, first_row, dtype)
