"""Grouped matmul as a loop over blocks of rows, each of one group: portable XLA, made for the CPU.

XLA's CPU matmul packs the weights anew at every call, so that small blocks waste time and large ones waste work on rows
that are not there: 64 to 128 rows were best where measured. `rows past a block's group` are masked, never written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import blocks


def block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: about those of a mean group, between 8 and 128."""
    mean = max(1, num_rows // max(1, num_groups))
    return min(128, max(8, 1 << (mean - 1).bit_length()))


def _rows(x: jax.Array, start: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, block)


def forward(lhs, rhs, group_sizes, layer, *, transpose_rhs, dtype):
    """[M, K] x [L, E, K, N] (or [L, E, N, K]) -> [M, N]."""
    num_rows, columns = lhs.shape[0], rhs.shape[-2 if transpose_rhs else -1]
    if num_rows == 0:
        return jnp.zeros((0, columns), dtype)
    block = block_rows(num_rows, group_sizes.shape[0])
    padded = max(num_rows, block)
    lhs = jnp.pad(lhs, ((0, padded - num_rows), (0, 0)))
    work = blocks.cut(group_sizes, num_rows, block)
    contract = (((1,), (1,) if transpose_rhs else (0,)), ((), ()))

    def step(i, out):
        matrix = jax.lax.dynamic_slice(rhs, (layer, work.group[i], 0, 0), (1, 1, *rhs.shape[2:]))[0, 0]
        start = jnp.minimum(work.start[i], padded - block)  # the last blocks reach back instead of past the end
        y = jax.lax.dot_general(_rows(lhs, start, block), matrix, contract, preferred_element_type=jnp.float32)
        row = start + jnp.arange(block)[:, None]
        mine = (row >= work.start[i]) & (row < work.start[i] + work.rows[i])
        y = jnp.where(mine, y.astype(dtype), _rows(out, start, block))
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    out = jax.lax.fori_loop(0, work.count, step, jnp.zeros((padded, columns), dtype))
    return out[:num_rows]


def rhs_gradient(lhs, dout, group_sizes, *, transpose_rhs, dtype):
    """The gradient of one layer's matrices, [E, K, N] (or [E, N, K]), from [M, K] and [M, N]."""
    num_rows, num_groups = lhs.shape[0], group_sizes.shape[0]
    left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
    shape = (left.shape[1], right.shape[1])
    if num_rows == 0:
        return jnp.zeros((num_groups, *shape), dtype)
    block = min(256, 2 * block_rows(num_rows, num_groups))
    padded = max(num_rows, block)
    left, right = (jnp.pad(x, ((0, padded - num_rows), (0, 0))) for x in (left, right))
    starts = jnp.cumsum(group_sizes) - group_sizes

    def group_gradient(g):
        def step(i, total):
            first = starts[g] + i * block
            start = jnp.minimum(first, padded - block)
            row = start + jnp.arange(block)[:, None]
            mine = (row >= first) & (row < starts[g] + group_sizes[g])
            part = jnp.where(mine, _rows(left, start, block), 0)
            contract = (((0,), (0,)), ((), ()))
            return total + jax.lax.dot_general(
                part, _rows(right, start, block), contract, preferred_element_type=jnp.float32
            )

        count = (group_sizes[g] + block - 1) // block
        return jax.lax.fori_loop(0, count, step, jnp.zeros(shape, jnp.float32)).astype(dtype)

    return jax.lax.map(group_gradient, jnp.arange(num_groups))
