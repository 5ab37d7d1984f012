"""What the TPU kernel computes: a piece's queries laid out, its tokens taken in, its blocks attended to, its result.

Axes: K KV heads, G query heads of a KV head, D head size, W lanes of a query, B new tokens of a piece,
T positions of a block, M = B * G rows of a product, C tokens of a tile.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import divide, divide_up, remainder
from pallas_kernels.paged_attention import rows
from pallas_kernels.paged_attention.tiling import FEW_ROWS, LANES, Problem, Tiling, padded_rows, rows_at_once

_MASKED = -1e30
_TOKENS_AT_ONCE = 16


def prepare(r: Any, p: Problem, half: Any, tokens: int) -> None:
    """Lays out the queries of `tokens` tokens by KV head, works out what is stored of them, resets the softmax."""
    s, m = r.scratch, padded_rows(tokens, p.group)

    def some(tokens: Any, rows_: Any) -> None:
        for head in range(p.kv_heads):
            q = s.q_in[half, tokens, head * p.group : (head + 1) * p.group, :].astype(jnp.float32)
            s.queries[head, rows_, :] = q.reshape(-1, p.width).astype(p.compute_dtype)

    _by_tokens(tokens, p.group, some)
    k, v = (x[half, :tokens].astype(jnp.float32) for x in (s.k_in, s.v_in))
    if p.quantised:
        k, v = (rows.quantise(x, r.inverse[i], p.page_dtype) for i, x in enumerate((k, v)))
    new = pl.ds(p.rows_of_a_tile, tokens)
    s.new[new, :, : p.head_dim] = k
    s.new[new, :, p.head_dim :] = v

    def reset(head, _):
        s.highest[head, :m] = jnp.full((m, LANES), _MASKED, jnp.float32)
        s.total[head, :m] = jnp.zeros((m, LANES), jnp.float32)
        s.weighted[head, :m] = jnp.zeros((m, p.width), jnp.float32)

    jax.lax.fori_loop(0, p.kv_heads, reset, None)


def finish(r: Any, p: Problem, half: Any, tokens: int) -> None:
    """The result of `tokens` tokens, laid out by token again."""
    s = r.scratch

    def some(tokens: Any, rows_: Any) -> None:
        for head in range(p.kv_heads):
            share = r.factors[1, head] / _lanes(s.total[head, rows_], p.width)
            out = (s.weighted[head, rows_] * share).reshape(-1, p.group, p.width)
            s.o_out[half, tokens, head * p.group : (head + 1) * p.group, :] = out.astype(p.dtype)

    _by_tokens(tokens, p.group, some)


def _by_tokens(tokens: int, group: int, function: Any) -> None:
    """`function` of which tokens, and which rows of a product, a few tokens at a time: what it holds stays small."""
    if tokens <= _TOKENS_AT_ONCE:
        function(slice(tokens), slice(tokens * group))
    else:
        each = _TOKENS_AT_ONCE

        def some(i, _):
            function(pl.ds(i * each, each), pl.ds(pl.multiple_of(i * each * group, each), each * group))

        jax.lax.fori_loop(0, tokens // each, some, None)


def take_in(r: Any, p: Problem, t: Tiling, half: Any, span: Any, low: Any, high: Any) -> None:
    """Puts the new tokens where they belong in the block, and zeros in place of all that follows them.

    Nobody wrote what follows: a not-a-number there would survive a weight of zero.
    """
    s, size = r.scratch, p.rows_of_a_tile
    position, end, block_start = span

    def tile(j, _):
        at = j * size + jax.lax.broadcasted_iota(jnp.int32, (size, 2 * p.head_dim), 0)
        is_new, is_past = (at >= position) & (at < end), at >= end
        within = pl.ds(pl.multiple_of(j * size - block_start, size), size)
        first = j * size - position + size
        for head in range(p.kv_heads):
            old = jnp.where(is_past, 0.0, s.kv[half, head, within, :].astype(jnp.float32))
            new = s.new[pl.ds(first, size), head, :]
            s.kv[half, head, within, :] = jnp.where(is_new, new, old).astype(p.page_dtype)

    def empty(j, _):
        within = pl.ds(pl.multiple_of(j * size - block_start, size), size)
        s.kv[half, :, within, :] = jnp.zeros((p.kv_heads, size, 2 * p.head_dim), p.page_dtype)

    jax.lax.fori_loop(low, high, tile, None)
    past = jnp.maximum(divide_up(jnp.maximum(end, 0), size), divide(block_start, size))
    jax.lax.fori_loop(past, divide(block_start + t.kv_block, size), empty, None)


def attend(r: Any, p: Problem, t: Tiling, half: Any, span: Any, tokens: int) -> None:
    """Goes on with the softmax of `tokens` tokens over the block."""
    position, _, block_start = span
    m = padded_rows(tokens, p.group)
    if m <= FEW_ROWS:
        _softmax_step(r, p, half, slice(0, p.kv_heads), slice(m), _seen(p, t, m, position, block_start))
        return
    m = rows_at_once(tokens, p.group)
    pieces = padded_rows(tokens, p.group) // m

    def some(i, _, all_seen: bool):
        head, piece = divide(i, pieces), remainder(i, pieces)
        seen = None if all_seen else _seen(p, t, m, position + piece * (m // p.group), block_start)
        which = pl.ds(pl.multiple_of(piece * m, 16), m)
        _softmax_step(r, p, half, pl.ds(head, 1), which, seen)

    # what every token sees needs no mask, and most blocks of a long row are such
    all_seen = position >= block_start + t.kv_block - 1
    for case, condition in ((True, all_seen), (False, ~all_seen)):
        some_ = functools.partial(some, all_seen=case)
        pl.when(condition)(functools.partial(jax.lax.fori_loop, 0, p.kv_heads * pieces, some_, None))


def _seen(p: Problem, t: Tiling, m: int, position: Any, block_start: Any) -> jax.Array:
    """[M, T]: which positions of the block each row sees, the first row's token being at `position`."""
    # a row's token by multiplication: exact for as many rows as a tiling may have
    row = jax.lax.broadcasted_iota(jnp.int32, (m, t.kv_block), 0)
    token = row if p.group == 1 else (row * (-(-(1 << 20) // p.group))) >> 20
    return block_start + jax.lax.broadcasted_iota(jnp.int32, (m, t.kv_block), 1) <= position + token


def _softmax_step(r: Any, p: Problem, half: Any, heads: Any, which: Any, seen: jax.Array | None) -> None:
    """The step of the rows `which` of each of `heads`; None as `seen` is all of the block."""
    s, which = r.scratch, (heads, which)
    numbers = range(heads.stop) if isinstance(heads, slice) else [heads.start]
    block = [_keys_and_values(s.kv, p, half, head) for head in numbers]
    scores = [_dot(s.queries[h, which[1]], k, (1, 1)) * r.factors[0, h] for h, (k, _) in zip(numbers, block)]
    masked = jnp.stack(scores) if seen is None else jnp.where(seen, jnp.stack(scores), _MASKED)
    before = s.highest[which]
    now = jnp.maximum(before, masked.max(-1, keepdims=True))
    weights = jnp.exp(masked - _lanes(now, masked.shape[-1]))
    old = jnp.exp(before - now)
    s.highest[which] = now
    s.total[which] = s.total[which] * old + weights.sum(-1, keepdims=True)
    products = [_dot(w, v, (1, 0)) for w, (_, v) in zip(weights.astype(p.compute_dtype), block)]
    s.weighted[which] = s.weighted[which] * _lanes(old, p.width) + jnp.stack(products)


def _keys_and_values(kv: Any, p: Problem, half: Any, head: int) -> tuple[jax.Array, jax.Array]:
    """[T, W] each; a narrow head's are the same rows, since its queries have zeros where the values stand."""
    if p.width == 2 * p.head_dim:
        both = kv[half, head].astype(p.compute_dtype)
        return both, both
    return (
        kv[half, head, :, : p.head_dim].astype(p.compute_dtype),
        kv[half, head, :, p.head_dim :].astype(p.compute_dtype),
    )


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def _lanes(x: jax.Array, lanes: int) -> jax.Array:
    """x, the same in each of its lanes, with more or fewer of them."""
    if lanes % LANES == 0:
        return jnp.concatenate([x] * (lanes // LANES), axis=-1) if lanes > LANES else x
    return jnp.broadcast_to(x[..., :1], (*x.shape[:-1], lanes))
