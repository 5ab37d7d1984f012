"""SwiGLU in Pallas Mosaic GPU, for Hopper: gate and up in one pass over the rows. Axes as in `api.py`.

Mosaic GPU is imported when a kernel is asked for: that takes a second, and on jax 0.10 absl-py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import gpu as grouped_matmul
from pallas_kernels.grouped_swiglu import reference

product_gradients = functools.partial(reference.product_gradients, matmul=grouped_matmul.forward)
lhs_gradient = functools.partial(reference.lhs_gradient, matmul=grouped_matmul.forward)


def forward(lhs, weights, scales, groups, *, transpose_rhs, keep_products):
    """[M, F] by one kernel; or with `keep_products`, for the backward pass, the two products alone. See `api`.

    Those are of the dtype of `lhs`, by two grouped matmuls: a pass over the rows for each.
    """
    from pallas_kernels.grouped_matmul.gpu_rows import rows_by_group

    if any(scale is not None for scale in scales):
        raise NotImplementedError("grouped_swiglu: quantised weights have no Mosaic GPU kernel")
    if keep_products:
        two = functools.partial(reference.forward, matmul=grouped_matmul.forward)
        return two(lhs, weights, scales, groups, transpose_rhs=transpose_rhs, keep_products=True)
    out = rows_by_group(lhs, weights, *groups, transpose_rhs=transpose_rhs, dtype=lhs.dtype, finish=_swiglu)
    return (out,)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate / (1 + jnp.exp(-gate)) * up
