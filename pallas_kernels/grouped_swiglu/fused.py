"""SwiGLU over groups of rows: uses of one frame, that of the TPU (`tpu_rows.run`) or the CPU (`cpu.run`).

forward: rows meet gate and up at one visit; silu(gate) * up is written or, when asked for, the products.
product_gradients: the same visit again, with dout beside it, writes the gradients of the two products.
lhs_gradient: the two gradients meet gate^T and up^T at one visit, and their sum is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.grouped_matmul.rows import RowKernel
from pallas_kernels.grouped_swiglu.reference import swiglu, swiglu_gradients

_BOTH = ((0, 0), (0, 1))


def forward(lhs, weights, scales, groups, *, keep_products, run, **how):
    """[M, F]; or, to keep for the backward pass, the two products. See `api`."""
    combine = lambda products, _: products if keep_products else [swiglu(*products)]  # noqa: E731
    kernel = RowKernel("grouped_swiglu", _BOTH, combine, (lhs.dtype,) * (2 if keep_products else 1))
    return run(kernel, [lhs], weights, scales, [], groups, **how)


def product_gradients(lhs, weights, scales, groups, dout, *, run, **how):
    """Gradients of the two products, [M, F] each."""
    combine = lambda products, beside: swiglu_gradients(*products, *beside)  # noqa: E731
    kernel = RowKernel("grouped_swiglu_product_gradients", _BOTH, combine, (lhs.dtype, lhs.dtype))
    return run(kernel, [lhs], weights, scales, [dout], groups, **how)


def lhs_gradient(gradients, weights, scales, groups, *, transpose_rhs, dtype, run, **how):
    """[M, K] from the gradients of the two products."""
    turned = [None if scale is None else jnp.swapaxes(scale, -1, -2) for scale in scales]
    kernel = RowKernel(
        "grouped_swiglu_lhs_gradient", ((0, 0), (1, 1)), lambda products, _: [products[0] + products[1]], (dtype,)
    )
    (out,) = run(kernel, gradients, weights, turned, [], groups, transpose_rhs=not transpose_rhs, **how)
    return out


def with_frame(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The three functions of an implementation, by name, in a frame."""
    functions = {"forward": forward, "product_gradients": product_gradients, "lhs_gradient": lhs_gradient}
    return {name: functools.partial(function, run=run) for name, function in functions.items()}
