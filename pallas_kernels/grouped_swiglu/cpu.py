"""SwiGLU over groups of rows on a CPU: natively where groups are small, else as loops in XLA over blocks of rows."""

from __future__ import annotations

from pallas_kernels.grouped_matmul import cpu
from pallas_kernels.grouped_swiglu import fused
from pallas_kernels.native import ops as native

in_xla = fused.with_frame(cpu.run)


def forward(lhs, weights, scales, groups, *, transpose_rhs, keep_products):
    """[M, F]; or, to keep for the backward pass, the two products. See `api`."""
    if not keep_products:
        try:
            return (native.grouped(lhs, weights, scales, groups, transpose_rhs=transpose_rhs, dtype=lhs.dtype),)
        except NotImplementedError:
            pass
    return in_xla["forward"](lhs, weights, scales, groups, transpose_rhs=transpose_rhs, keep_products=keep_products)


functions = in_xla | {"forward": forward}
