"""SwiGLU over groups of rows on TPU: four uses of one frame, `grouped_matmul.tpu_rows`.

forward: rows meet gate and up at one visit; silu(gate) * up is written or, when asked for, the products.
product_gradients: the same visit again, with dout beside it, writes the gradients of the two products.
lhs_gradient: the two gradients meet gate^T and up^T at one visit, and their sum is written.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.chip import tpu_to_tile_for
from pallas_kernels.grouped_matmul import tpu_rows
from pallas_kernels.grouped_swiglu.reference import swiglu, swiglu_gradients

_BOTH = ((0, 0), (0, 1))


def forward(lhs, weights, scales, groups, *, transpose_rhs, keep_products, chip=None, tiling=None):
    """[M, F]; or, to keep for the backward pass, the two products. See `api`."""
    combine = lambda products, _: products if keep_products else [swiglu(*products)]  # noqa: E731
    kernel = tpu_rows.RowKernel("grouped_swiglu", _BOTH, combine, (lhs.dtype,) * (2 if keep_products else 1))
    how = {"transpose_rhs": transpose_rhs, "chip": tpu_to_tile_for(chip), "tiling": tiling}
    return tpu_rows.run(kernel, [lhs], weights, scales, [], groups, **how)


def product_gradients(lhs, weights, scales, groups, dout, *, transpose_rhs, chip=None, tiling=None):
    """Gradients of the two products, [M, F] each."""
    combine = lambda products, beside: swiglu_gradients(*products, *beside)  # noqa: E731
    kernel = tpu_rows.RowKernel("grouped_swiglu_product_gradients", _BOTH, combine, (lhs.dtype, lhs.dtype))
    how = {"transpose_rhs": transpose_rhs, "chip": tpu_to_tile_for(chip), "tiling": tiling}
    return tpu_rows.run(kernel, [lhs], weights, scales, [dout], groups, **how)


def lhs_gradient(gradients, weights, scales, groups, *, transpose_rhs, dtype, chip=None, tiling=None):
    """[M, K] from the gradients of the two products."""
    turned = [None if scale is None else jnp.swapaxes(scale, -1, -2) for scale in scales]
    kernel = tpu_rows.RowKernel(
        "grouped_swiglu_lhs_gradient", ((0, 0), (1, 1)), lambda products, _: [products[0] + products[1]], (dtype,)
    )
    how = {"transpose_rhs": not transpose_rhs, "chip": tpu_to_tile_for(chip), "tiling": tiling}
    (out,) = tpu_rows.run(kernel, gradients, weights, turned, [], groups, **how)
    return out
