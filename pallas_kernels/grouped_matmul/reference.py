"""Grouped matmul in plain XLA, the truth for every other implementation. Slow on CPU, where XLA multiplies every row
by every group's matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def forward(lhs, rhs, group_sizes, layer, *, transpose_rhs, dtype):
    """[M, K] x [L, E, K, N] (or [L, E, N, K]) -> [M, N]."""
    matrices = jax.lax.dynamic_index_in_dim(rhs, layer, keepdims=False)
    if transpose_rhs:
        matrices = jnp.swapaxes(matrices, 1, 2)
    out = jax.lax.ragged_dot(lhs, matrices, group_sizes, preferred_element_type=jnp.float32)
    routed = jnp.arange(lhs.shape[0])[:, None] < group_sizes.sum()
    return jnp.where(routed, out, 0).astype(dtype)


def rhs_gradient(lhs, dout, group_sizes, *, transpose_rhs, dtype):
    """The gradient of one layer's matrices, [E, K, N] (or [E, N, K]), from [M, K] and [M, N]."""
    routed = jnp.arange(lhs.shape[0])[:, None] < group_sizes.sum()
    lhs, dout = jnp.where(routed, lhs, 0), jnp.where(routed, dout, 0)
    zeros = jnp.zeros((group_sizes.shape[0], lhs.shape[1], dout.shape[1]), jnp.float32)
    # ragged_dot is linear in its matrices, so its transpose at any point is the gradient
    product = lambda m: jax.lax.ragged_dot(lhs.astype(jnp.float32), m, group_sizes)  # noqa: E731
    (gradient,) = jax.linear_transpose(product, zeros)(dout.astype(jnp.float32))
    return (jnp.swapaxes(gradient, 1, 2) if transpose_rhs else gradient).astype(dtype)
