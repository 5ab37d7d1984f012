"""SwiGLU as two grouped matmuls and an elementwise product: the truth, and with the CPU's matmul its implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.grouped_matmul import reference

F32 = jnp.float32


def products(
    lhs, weights, scales, groups, *, transpose_rhs, matmul: Callable[..., Array], dtype: Any = F32
) -> tuple[Array, Array]:
    """[M, K] times gate and times up."""
    gate, up = (
        matmul(lhs, weight, scale, *groups, transpose_rhs=transpose_rhs, dtype=dtype)
        for weight, scale in zip(weights, scales)
    )
    return gate, up


def forward(lhs, weights, scales, groups, *, transpose_rhs, keep_products, matmul=reference.forward):
    """[M, F]; or, to keep for the backward pass, the two products in the dtype of `lhs`. See `api`."""
    how = {"transpose_rhs": transpose_rhs, "matmul": matmul}
    if keep_products:
        return products(lhs, weights, scales, groups, dtype=lhs.dtype, **how)
    return (swiglu(*products(lhs, weights, scales, groups, **how)).astype(lhs.dtype),)


def swiglu(gate, up):
    """silu(gate) * up, in float32."""
    return jax.nn.silu(gate.astype(F32)) * up.astype(F32)


def product_gradients(lhs, weights, scales, groups, dout, *, transpose_rhs, matmul=reference.forward):
    """Gradients of the two products, [M, F] each, computing the products anew."""
    gate, up = products(lhs, weights, scales, groups, transpose_rhs=transpose_rhs, matmul=matmul)
    return tuple(x.astype(lhs.dtype) for x in swiglu_gradients(gate, up, dout))


def swiglu_gradients(gate, up, dout):
    """Gradients of silu(gate) * up, all of one shape, in float32."""
    gate, up, dout = gate.astype(F32), up.astype(F32), dout.astype(F32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dout * up * (sigmoid + silu * (1 - sigmoid)), dout * silu


def lhs_gradient(gradients, weights, scales, groups, *, transpose_rhs, dtype, matmul=reference.forward):
    """[M, K] from the gradients of the two products."""
    turned = [None if scale is None else jnp.swapaxes(scale, -1, -2) for scale in scales]
    sum_: Any = sum(
        matmul(gradient, weight, scale, *groups, transpose_rhs=not transpose_rhs, dtype=F32)
        for gradient, weight, scale in zip(gradients, weights, turned)
    )
    return sum_.astype(dtype)


def with_matmul(matmul: Callable[..., Array]) -> dict[str, Callable[..., Any]]:
    """The three functions of an implementation, by name, on another grouped matmul."""
    functions = {"forward": forward, "product_gradients": product_gradients, "lhs_gradient": lhs_gradient}
    return {name: functools.partial(function, matmul=matmul) for name, function in functions.items()}
