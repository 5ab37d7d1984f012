"""Grouped matmul as a loop over blocks of rows, each of one group: portable XLA, made for the CPU.

XLA's CPU matmul packs the weights anew at every call, so that small blocks waste time and large ones waste work on rows
that are not there. So a block holds up to one and a half mean groups, which most groups fill just once, and its product
is one of eight, of which the next larger than its rows is taken.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import blocks
from pallas_kernels.grouped_matmul.quantised import dequantise
from pallas_kernels.mosaic import varying_alike

_WAYS = 8  # different products a block may choose from
_LARGEST_STEP = 64


def row_counts(num_rows: int, num_groups: int) -> range:
    """The numbers of rows for which there is a product, the last one that of a whole block."""
    reach = max(1, 3 * num_rows // (2 * max(1, num_groups)))
    step = min(_LARGEST_STEP, max(8, -(-reach // (8 * _WAYS)) * 8))
    return range(step, min(_WAYS, -(-reach // step)) * step + 1, step)


def _switch(counts: range, rows: jax.Array, branch) -> jax.Array:
    """`branch(n)` for the least n of `counts` that is not below `rows`."""
    branches = [functools.partial(branch, n) for n in counts]
    return jax.lax.switch((rows + counts.step - 1) // counts.step - 1, branches)


def _float32(x: jax.Array) -> jax.Array:
    """Operands are copied anyway, and widened on the way: a bfloat16 product is a third slower and no more exact."""
    return x.astype(jnp.float32)


def matrix_of(rhs, scale, layer, group, *, transpose_rhs, dtype):
    """One matrix out of the stack, dequantised where it has a scale, and the axis of it that is contracted."""
    cut = lambda stack: jax.lax.dynamic_slice(stack, (layer, group, 0, 0), (1, 1, *stack.shape[2:]))[0, 0]  # noqa: E731
    if scale is None:
        return cut(rhs), 1 if transpose_rhs else 0
    return dequantise(cut(rhs), cut(scale), transpose_rhs=transpose_rhs, dtype=dtype), 0


def forward(lhs, rhs, scale, group_sizes, first_row, layer, *, transpose_rhs, dtype):
    """[M, K] x [L, E, K, N] (or [L, E, N, K]) -> [M, N]."""
    num_rows, columns = lhs.shape[0], rhs.shape[-2 if transpose_rhs else -1]
    counts = row_counts(num_rows, group_sizes.shape[0])
    work = blocks.cut(group_sizes, num_rows, counts[-1])
    lhs = jnp.pad(lhs, ((0, counts[-1]), (0, 0)))

    def step(i, out):
        start, rows = first_row + work.start[i], work.rows[i]

        def product(n):
            matrix, axis = matrix_of(rhs, scale, layer, work.group[i], transpose_rhs=transpose_rhs, dtype=lhs.dtype)
            left, matrix = _float32(jax.lax.dynamic_slice_in_dim(lhs, start, n)), _float32(matrix)
            contract = (((1,), (axis,)), ((), ()))
            y = jax.lax.dot_general(left, matrix, contract, preferred_element_type=jnp.float32)
            return jnp.pad(y.astype(dtype), ((0, counts[-1] - n), (0, 0)))

        y = _switch(counts, rows, product)
        y = jnp.where(jnp.arange(counts[-1])[:, None] < rows, y, 0)  # a later block overwrites the zeros with its own
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    out, _ = varying_alike(jnp.zeros((num_rows + counts[-1], columns), dtype), lhs)
    return jax.lax.fori_loop(0, work.count, step, out)[:num_rows]


def rhs_gradient(lhs, dout, group_sizes, first_row, *, transpose_rhs, dtype):
    """The gradient of one layer's matrices, [E, K, N] (or [E, N, K]), from [M, K] and [M, N]."""
    num_rows, num_groups = lhs.shape[0], group_sizes.shape[0]
    left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
    counts = row_counts(num_rows, num_groups)
    work = blocks.cut(group_sizes, num_rows, counts[-1])
    left, right = (jnp.pad(x, ((0, counts[-1]), (0, 0))) for x in (left, right))
    contract = (((0,), (0,)), ((), ()))

    def step(i, total):
        start, rows, group = first_row + work.start[i], work.rows[i], work.group[i]

        def product(n):
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, n)  # noqa: E731
            # both sides: what lies past the group may be NaN
            ours = lambda x: jnp.where(jnp.arange(n)[:, None] < rows, cut(x), 0)  # noqa: E731
            operands = _float32(ours(left)), _float32(ours(right))
            return jax.lax.dot_general(*operands, contract, preferred_element_type=jnp.float32)

        sum_ = jax.lax.dynamic_index_in_dim(total, group, keepdims=False) + _switch(counts, rows, product)
        return jax.lax.dynamic_update_index_in_dim(total, sum_, group, 0)

    total, _ = varying_alike(jnp.zeros((num_groups, left.shape[1], right.shape[1]), jnp.float32), left)
    return jax.lax.fori_loop(0, work.count, step, total).astype(dtype)
