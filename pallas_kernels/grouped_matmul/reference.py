"""Grouped matmul in plain XLA, the truth for every other implementation. Slow on CPU, where XLA multiplies every row
by every group's matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.quantised import dequantise
from pallas_kernels.mosaic import varying_alike


def forward(lhs, rhs, scale, group_sizes, first_row, layer, *, transpose_rhs, dtype):
    """[M, K] x [L, E, K, N] (or [L, E, N, K]) -> [M, N]."""
    of_layer = lambda stack: None if stack is None else jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)  # noqa: E731
    wide = jnp.float32 if scale is not None else rhs.dtype
    matrices = dequantise(of_layer(rhs), of_layer(scale), transpose_rhs=transpose_rhs, dtype=wide)
    rows = jnp.roll(lhs, -first_row, axis=0).astype(matrices.dtype if scale is not None else lhs.dtype)
    out = jax.lax.ragged_dot(rows, matrices, group_sizes, preferred_element_type=jnp.float32)
    routed = jnp.arange(lhs.shape[0])[:, None] < group_sizes.sum()
    return jnp.roll(jnp.where(routed, out, 0).astype(dtype), first_row, axis=0)


def rhs_gradient(lhs, dout, group_sizes, first_row, *, transpose_rhs, dtype):
    """The gradient of one layer's matrices, [E, K, N] (or [E, N, K]), from [M, K] and [M, N]."""
    routed = jnp.arange(lhs.shape[0])[:, None] < group_sizes.sum()
    lhs, dout = (jnp.where(routed, jnp.roll(x, -first_row, axis=0), 0) for x in (lhs, dout))
    zeros, _ = varying_alike(jnp.zeros((group_sizes.shape[0], lhs.shape[1], dout.shape[1]), jnp.float32), lhs)
    # ragged_dot is linear in its matrices, so its transpose at any point is the gradient
    product = lambda m: jax.lax.ragged_dot(lhs.astype(jnp.float32), m, group_sizes)  # noqa: E731
    (gradient,) = jax.linear_transpose(product, zeros)(dout.astype(jnp.float32))
    return (jnp.swapaxes(gradient, 1, 2) if transpose_rhs else gradient).astype(dtype)
