"""The routed experts of a few tokens as a loop over the experts chosen: portable XLA, made for the CPU.

XLA's CPU backend fuses a matrix-vector product with the slice of its weights and reads them at memory speed; a product
with 2 to 16 rows packs the weights first and takes as long as about three such passes, however many its rows. So an
expert with one row or two goes row by row, one with more as a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import blocks

_BLOCK = 16
_ROW_BY_ROW = 2


def forward(x, gate, up, down, indices, weights, layer, *, transpose_rhs):
    """[T, D] -> [T, D]; see `api.fused_moe`."""
    num_tokens, top_k = indices.shape
    contract = (((1,), (1,) if transpose_rhs else (0,)), ((), ()))

    def expert(rows, e):
        def product(lhs, stack):
            matrix = jax.lax.dynamic_slice(stack, (layer, e, 0, 0), (1, 1, *stack.shape[2:]))[0, 0]
            return jax.lax.dot_general(lhs, matrix, contract, preferred_element_type=jnp.float32)

        hidden = jax.nn.silu(product(rows, gate)) * product(rows, up)
        return product(hidden.astype(x.dtype), down)

    if num_tokens == 1:
        out = jax.lax.map(lambda e: expert(x, e)[0], indices[0])
        return (weights[0] @ out)[None].astype(x.dtype)

    num_rows, num_experts = num_tokens * top_k, gate.shape[1]
    order = jnp.argsort(indices.reshape(-1), stable=True)
    token = jnp.pad(order // top_k, (0, _BLOCK))
    sizes = jnp.zeros(num_experts, jnp.int32).at[indices.reshape(-1)].add(1)
    work = blocks.cut(sizes, num_rows, _BLOCK)

    def by_row(start, rows, e):
        def step(i, out):
            row = expert(jax.lax.dynamic_slice_in_dim(x, token[start + i], 1), e)
            return jax.lax.dynamic_update_slice_in_dim(out, row, i, 0)

        return jax.lax.fori_loop(0, rows, step, jnp.zeros((_BLOCK, x.shape[1]), jnp.float32))

    def as_block(start, rows, e):
        return expert(x[jax.lax.dynamic_slice_in_dim(token, start, _BLOCK)], e)

    def step(i, out):
        start, rows, e = work.start[i], work.rows[i], work.group[i]
        y = jax.lax.cond(rows <= _ROW_BY_ROW, by_row, as_block, start, rows, e)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)  # a later block overwrites what lies past this one

    out = jax.lax.fori_loop(0, work.count, step, jnp.zeros((num_rows + _BLOCK, x.shape[1]), jnp.float32))
    place = jnp.argsort(order).reshape(num_tokens, top_k)
    return jnp.einsum("tk,tkd->td", weights, out[place]).astype(x.dtype)
