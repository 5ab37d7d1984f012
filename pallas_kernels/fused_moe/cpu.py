"""The routed experts of a few tokens as a loop over the experts chosen: portable XLA, made for the CPU.

XLA's CPU backend reads the weights where they lie, at memory speed, when a product is written as a vector times a
transposed slice; in any other form it copies the slice first. So the rows of an expert that has few of them are
vectors, one after another while its weights are still in the cache. More rows are one product, with the weights on its
left, because XLA packs the right side, and in two halves, because each copy is one thread's work.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.fused_moe.reference import local_experts
from pallas_kernels.grouped_matmul.cpu import matrix_of, over_blocks, place, store

_COUNTS = (1, 2, 3, 4, 8, 16)  # the numbers of rows for which there is a product
_ROW_BY_ROW = 4


def forward(x, matrices, scales, indices, weights, offset, layer, *, transpose_rhs):
    """[T, D] -> [T, D]; see `api.fused_moe`."""
    num_tokens, top_k = indices.shape

    def expert(rows, e):
        def product(lhs, which):
            stack, scale = matrices[which], scales[which]
            matrix, axis = matrix_of(stack, scale, layer, e, transpose_rhs=transpose_rhs, dtype=x.dtype)
            matrix = matrix if axis == 1 else matrix.T
            if lhs.shape[0] <= _ROW_BY_ROW:
                return jnp.stack([jnp.matmul(row, matrix.T, preferred_element_type=jnp.float32) for row in lhs])
            halves = jnp.array_split(matrix, 2)
            return jnp.concatenate([jnp.matmul(half, lhs.T, preferred_element_type=jnp.float32) for half in halves]).T

        hidden = jax.nn.silu(product(rows, 0)) * product(rows, 1)
        return product(hidden.astype(x.dtype), 2)

    if num_tokens == 1 and offset is None:
        out = jax.lax.map(lambda e: expert(x, e)[0], indices[0])
        return (weights[0] @ out)[None].astype(x.dtype)

    num_rows, num_experts = num_tokens * top_k, matrices[0].shape[1]
    local = indices.reshape(-1) if offset is None else local_experts(indices, offset, num_experts).reshape(-1)
    order = jnp.argsort(local, stable=True)
    token = order // top_k
    sizes = jnp.bincount(local, length=num_experts + 1)[:num_experts]  # rows of other shards' experts come last

    def block(n, start, rows, e, out):
        at, ours = place(n, start, rows, num_rows)
        return store(out, expert(x[jax.lax.dynamic_slice_in_dim(token, at, n)], e), at, ours)

    out = jnp.zeros((num_rows, x.shape[1]), jnp.float32)
    out = over_blocks(sizes, 0, num_rows, _COUNTS, block, out, varying_as=x)
    answers = out[jnp.argsort(order).reshape(num_tokens, top_k)]
    return jnp.einsum("tk,tkd->td", weights, answers).astype(x.dtype)
