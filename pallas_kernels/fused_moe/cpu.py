"""The routed experts of a few tokens as a loop over the experts chosen: portable XLA, made for the CPU.

XLA's CPU backend reads the weights where they lie, at memory speed, when a product is written as a vector times a
transposed slice; in any other form it copies the slice first. A product with 2 to 16 rows packs the weights and takes
as long as three or four passes over them, however many its rows. So an expert with few rows goes row by row, one with
more as a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import blocks

_BLOCK = 16
_ROW_BY_ROW = 4


def forward(x, gate, up, down, indices, weights, layer, *, transpose_rhs):
    """[T, D] -> [T, D]; see `api.fused_moe`."""
    num_tokens, top_k = indices.shape

    def expert(rows, e):
        def product(lhs, stack):
            matrix = jax.lax.dynamic_slice(stack, (layer, e, 0, 0), (1, 1, *stack.shape[2:]))[0, 0]
            return jnp.matmul(lhs, matrix.T if transpose_rhs else matrix, preferred_element_type=jnp.float32)

        hidden = jax.nn.silu(product(rows, gate)) * product(rows, up)
        return product(hidden.astype(x.dtype), down)

    if num_tokens == 1:
        out = jax.lax.map(lambda e: expert(x[0], e), indices[0])
        return (weights[0] @ out)[None].astype(x.dtype)

    num_rows, num_experts = num_tokens * top_k, gate.shape[1]
    order = jnp.argsort(indices.reshape(-1), stable=True)
    token = jnp.pad(order // top_k, (0, _BLOCK))
    sizes = jnp.zeros(num_experts, jnp.int32).at[indices.reshape(-1)].add(1)
    work = blocks.cut(sizes, num_rows, _BLOCK, singles=_ROW_BY_ROW)

    def one_row(start, e):
        return jnp.pad(expert(x[token[start]], e)[None], ((0, _BLOCK - 1), (0, 0)))

    def as_block(start, e):
        return expert(x[jax.lax.dynamic_slice_in_dim(token, start, _BLOCK)], e)

    def step(i, out):
        start = work.start[i]
        y = jax.lax.cond(work.rows[i] == 1, one_row, as_block, start, work.group[i])
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)  # a later block overwrites what lies past this one

    out = jax.lax.fori_loop(0, work.count, step, jnp.zeros((num_rows + _BLOCK, x.shape[1]), jnp.float32))
    place = jnp.argsort(order).reshape(num_tokens, top_k)
    return jnp.einsum("tk,tkd->td", weights, out[place]).astype(x.dtype)
