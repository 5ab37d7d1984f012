"""The routed experts of a few tokens as a loop over the experts chosen: portable XLA, made for the CPU.

XLA's CPU backend reads the weights where they lie, at memory speed, when a product is written as a vector times a
transposed slice; in any other form it copies the slice first. A product with 2 to 16 rows packs the weights and takes
as long as three or four passes over them, however many its rows. So an expert with few rows goes row by row, one with
more as a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.fused_moe.reference import local_experts
from pallas_kernels.grouped_matmul import blocks
from pallas_kernels.grouped_matmul.cpu import matrix_of

_BLOCK = 16
_ROW_BY_ROW = 4


def forward(x, matrices, scales, indices, weights, offset, layer, *, transpose_rhs):
    """[T, D] -> [T, D]; see `api.fused_moe`."""
    num_tokens, top_k = indices.shape

    def expert(rows, e):
        def product(lhs, which):
            stack, scale = matrices[which], scales[which]
            matrix, axis = matrix_of(stack, scale, layer, e, transpose_rhs=transpose_rhs, dtype=x.dtype)
            return jnp.matmul(lhs, matrix.T if axis == 1 else matrix, preferred_element_type=jnp.float32)

        hidden = jax.nn.silu(product(rows, 0)) * product(rows, 1)
        return product(hidden.astype(x.dtype), 2)

    if num_tokens == 1 and offset is None:
        out = jax.lax.map(lambda e: expert(x[0], e), indices[0])
        return (weights[0] @ out)[None].astype(x.dtype)

    num_rows, num_experts = num_tokens * top_k, matrices[0].shape[1]
    local = indices.reshape(-1) if offset is None else local_experts(indices, offset, num_experts).reshape(-1)
    order = jnp.argsort(local, stable=True)
    token = jnp.pad(order // top_k, (0, _BLOCK))
    sizes = jnp.bincount(local, length=num_experts + 1)[:num_experts]  # rows of other shards' experts come last
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
    answers = out[jnp.argsort(order).reshape(num_tokens, top_k)]
    if offset is not None:
        inside = local.reshape(num_tokens, top_k, 1) < num_experts
        answers = jnp.where(inside, answers, 0)  # past the last block lie rows that no one asked for
    return jnp.einsum("tk,tkd->td", weights, answers).astype(x.dtype)
