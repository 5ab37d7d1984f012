"""The routed experts through grouped matmuls in plain XLA, the truth for every other implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import reference


def forward(x, gate, up, down, indices, weights, layer, *, transpose_rhs):
    """[T, D] -> [T, D]; see `api.fused_moe`."""
    top_k, num_experts = indices.shape[1], gate.shape[1]
    order = jnp.argsort(indices.reshape(-1), stable=True)
    sizes = jnp.zeros(num_experts, jnp.int32).at[indices.reshape(-1)].add(1)

    def product(lhs, rhs):
        return reference.forward(lhs, rhs, None, sizes, 0, layer, transpose_rhs=transpose_rhs, dtype=jnp.float32)

    rows = x[order // top_k]
    hidden = jax.nn.silu(product(rows, gate)) * product(rows, up)
    out = product(hidden.astype(x.dtype), down)
    weighted = out * weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(weighted).astype(x.dtype)
