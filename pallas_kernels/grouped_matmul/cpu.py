"""Kernels over rows as loops over blocks of them, each of one group: portable XLA, made for the CPU.

XLA's CPU matmul packs the weights anew at every call, so that small blocks waste time and large ones waste work on rows
that are not there. So a block holds up to one and a half mean groups, which most groups fill just once, and its product
is one of eight, the next larger than its rows. Each of the eight has a loop of its own over its blocks: a choice inside
one loop would copy what it chose. What a loop carries is written in place, and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import blocks
from pallas_kernels.grouped_matmul.quantised import dequantise
from pallas_kernels.grouped_matmul.rows import RowKernel
from pallas_kernels.mosaic import tree_varying_alike

_WAYS = 8  # different products a block may choose from
_LARGEST_STEP = 64


def row_counts(num_rows: int, num_groups: int) -> range:
    """The numbers of rows for which there is a product, the last one that of a whole block."""
    reach = max(1, 3 * num_rows // (2 * max(1, num_groups)))
    step = min(_LARGEST_STEP, max(8, -(-reach // (8 * _WAYS)) * 8))
    return range(step, min(_WAYS, -(-reach // step)) * step + 1, step)


def run(
    kernel: RowKernel,
    lhs: Sequence[jax.Array],
    rhs: Sequence[jax.Array],
    scales: Sequence[jax.Array | None],
    beside: Sequence[jax.Array],
    groups: tuple[jax.Array, jax.Array, jax.Array],
    *,
    transpose_rhs: bool,
) -> tuple[jax.Array, ...]:
    """`kernel` over lhs [M, K] each, rhs [L, E, K, N] (or [L, E, N, K]), beside [M, N]; results [M, N].

    `groups`: sizes [E], first row, layer. Rows of no group come out zero.
    """
    sizes, first_row, layer = groups
    num_rows, columns = lhs[0].shape[0], rhs[0].shape[-2 if transpose_rhs else -1]

    def block(n: int, start: jax.Array, rows: jax.Array, group: jax.Array, out: Sequence[jax.Array]):
        at, ours = place(n, start, rows, num_rows)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, at, n)  # noqa: E731

        def product(left, which):
            matrix, axis = matrix_of(
                rhs[which], scales[which], layer, group, transpose_rhs=transpose_rhs, dtype=left.dtype
            )
            operands = _float32(cut(left)), _float32(matrix)
            return jax.lax.dot_general(*operands, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)

        products = [product(lhs[a], b) for a, b in kernel.pairs]
        results = kernel.combine(products, [_float32(cut(x)) for x in beside])
        bits = [_bits(new.astype(dtype)) for new, dtype in zip(results, kernel.out_dtypes)]
        return [store(old, new, at, ours) for new, old in zip(bits, out)]

    out = [_bits(jnp.zeros((num_rows, columns), dtype)) for dtype in kernel.out_dtypes]
    counts = row_counts(num_rows, sizes.shape[0])
    out = over_blocks(sizes, first_row, num_rows, counts, block, out, varying_as=lhs[0])
    return tuple(x.view(dtype) for x, dtype in zip(out, kernel.out_dtypes))


def forward(lhs, rhs, scale, group_sizes, first_row, layer, *, transpose_rhs, dtype):
    """[M, K] x [L, E, K, N] (or [L, E, N, K]) -> [M, N]."""
    kernel = RowKernel("grouped_matmul", ((0, 0),), lambda products, _: products, (dtype,))
    groups = (group_sizes, first_row, layer)
    return run(kernel, [lhs], [rhs], [scale], [], groups, transpose_rhs=transpose_rhs)[0]


def rhs_gradient(lhs, dout, group_sizes, first_row, *, transpose_rhs, dtype):
    """The gradient of one layer's matrices, [E, K, N] (or [E, N, K]), from [M, K] and [M, N]."""
    num_rows, num_groups = lhs.shape[0], group_sizes.shape[0]
    left, right = (dout, lhs) if transpose_rhs else (lhs, dout)

    def block(n: int, start: jax.Array, rows: jax.Array, group: jax.Array, total: jax.Array) -> jax.Array:
        at, ours = place(n, start, rows, num_rows)
        # both sides: what lies past the group may be NaN
        cut = lambda x: _float32(jnp.where(ours, jax.lax.dynamic_slice_in_dim(x, at, n), 0))  # noqa: E731
        contract = (((0,), (0,)), ((), ()))
        product = jax.lax.dot_general(cut(left), cut(right), contract, preferred_element_type=jnp.float32)
        sum_ = jax.lax.dynamic_index_in_dim(total, group, keepdims=False) + product
        return jax.lax.dynamic_update_index_in_dim(total, sum_, group, 0)

    total = jnp.zeros((num_groups, left.shape[1], right.shape[1]), jnp.float32)
    counts = row_counts(num_rows, num_groups)
    return over_blocks(group_sizes, first_row, num_rows, counts, block, total, varying_as=left).astype(dtype)


def matrix_of(rhs, scale, layer, group, *, transpose_rhs, dtype):
    """One matrix out of the stack, dequantised where it has a scale, and the axis of it that is contracted."""
    if rhs.dtype == jnp.bfloat16:  # else XLA widens the whole stack, once and for all groups
        rhs, group = jax.lax.optimization_barrier((rhs, group))
    cut = lambda stack: jax.lax.dynamic_slice(stack, (layer, group, 0, 0), (1, 1, *stack.shape[2:]))[0, 0]  # noqa: E731
    if scale is None:
        return cut(rhs), 1 if transpose_rhs else 0
    return dequantise(cut(rhs), cut(scale), transpose_rhs=transpose_rhs, dtype=dtype), 0


def over_blocks(
    sizes: jax.Array,
    first_row: jax.Array | int,
    num_rows: int,
    counts: Sequence[int],
    block: Callable[..., Any],
    carry: Any,
    varying_as: jax.Array,
) -> Any:
    """`carry` after `block(n, start, rows, group, carry)` for every block; n, the least of `counts` that holds its
    rows, is static. A block has at most the largest of `counts`, of which none is taken above `num_rows`.
    """
    counts = sorted({min(n, num_rows) for n in counts})
    work = blocks.cut(sizes, num_rows, counts[-1])
    is_block = jnp.arange(len(work.start)) < work.count
    way = jnp.where(is_block, jnp.searchsorted(jnp.array(counts), work.rows), len(counts))
    order = jnp.argsort(way, stable=True)
    ends = jnp.searchsorted(way[order], jnp.arange(len(counts)), side="right")
    carry, _ = tree_varying_alike((carry, varying_as))
    for w, n in enumerate(counts):

        def step(i, carry, n=n):
            return block(n, first_row + work.start[order[i]], work.rows[order[i]], work.group[order[i]], carry)

        carry = jax.lax.fori_loop(ends[w - 1] if w else 0, ends[w], step, carry)
    return carry


def place(n: int, start: jax.Array, rows: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Where n rows begin that hold `rows` from `start` on, and which of them those are, [n, 1]."""
    at = jnp.minimum(start, num_rows - n)
    row = at + jnp.arange(n)[:, None]
    return at, (row >= start) & (row < start + rows)


def store(out: jax.Array, new: jax.Array, at: jax.Array, ours: jax.Array) -> jax.Array:
    """`out` with those rows of `new`, which begin at `at`, that are `ours`."""
    kept = jax.lax.dynamic_slice_in_dim(out, at, new.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(ours, new, kept), at, 0)


def _float32(x: jax.Array) -> jax.Array:
    """Operands are copied anyway, and widened on the way: a bfloat16 product is a third slower and no more exact."""
    return x.astype(jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    """XLA updates bfloat16 arrays on CPU by widening them whole, integers in place."""
    return x.view(jnp.uint16) if x.dtype == jnp.bfloat16 else x
