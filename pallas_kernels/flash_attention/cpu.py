"""Attention in chunks of queries, each against the keys up to its own end: portable XLA, made for the CPU.

All queries of a kv head are the rows of one product. Chunks leave out the keys that no query of theirs may see, and
bound the memory of the scores. The backward pass computes the weights anew from the log-sum-exp
(https://arxiv.org/abs/2205.14135).

Axes: B batch, K kv heads, G query heads per kv head, S queries, T keys, D head dim, R = G S rows, n anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.problem import SEES_NOTHING, Problem, Segments, seen
from pallas_kernels.mosaic import varying_alike

_SCORE_BYTES = 1 << 28  # of one chunk of float32 scores
_UNROLLED_CHUNKS = 8
# Scores from here down are those of keys that are not seen.
_UNSEEN = 0.1 * SEES_NOTHING


def forward(q, k, v, segments: Segments, q_offset, *, problem: Problem):
    """[B, H, S, D], [B, K, T, D] twice -> [B, H, S, D] and the log-sum-exp [B, H, S]."""

    def one(place, segments, q):
        scores = _scores(q, k[:, :, : place.end], place.bias(segments), problem)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        out = _product("bkrt,bktd->bkrd", _merge(weights).astype(v.dtype), v[:, :, : place.end]).reshape(q.shape)
        out, lse = out / total, largest + jnp.log(total)
        if not problem.all_see_a_key:  # what sees nothing weighs all keys alike
            out, lse = jnp.where(largest > _UNSEEN, out, 0), jnp.where(largest > _UNSEEN, lse, SEES_NOTHING)
        return (out.astype(q.dtype), lse[..., 0]), ()

    (out, lse), _ = _in_chunks(one, [_grouped(q, k)], k.shape[2], segments, q_offset, problem, ())
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def backward(q, k, v, segments: Segments, q_offset, lse, delta, dout, *, problem: Problem):
    """dq, dk, dv; delta [B, H, S] is what all gradients of a query's scores have taken off: sum(dout * out) - dlse."""
    lse = jnp.where(lse > _UNSEEN, lse, 0)  # of the scores of keys that are not seen, exp(score - lse) is zero then

    def one(place, segments, q, lse, delta, dout):
        keys, values = k[:, :, : place.end], v[:, :, : place.end]
        weights = jnp.exp(_scores(q, keys, place.bias(segments), problem) - lse[..., None])
        dweights = _product("bkrd,bktd->bkrt", _merge(dout), values).reshape(weights.shape)
        dscores = _merge((problem.scale * weights * (dweights - delta[..., None])).astype(q.dtype))
        dq = _product("bkrt,bktd->bkrd", dscores, keys).reshape(q.shape)
        dk = _product("bkrt,bkrd->bktd", dscores, _merge(q))
        dv = _product("bkrt,bkrd->bktd", _merge(weights).astype(q.dtype), _merge(dout))
        return (dq.astype(q.dtype),), (dk, dv)

    rows = [_grouped(x, k) for x in (q, lse, delta, dout)]
    (dq,), (dk, dv) = _in_chunks(one, rows, k.shape[2], segments, q_offset, problem, (k.shape, v.shape))
    return dq.reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


class _Place:
    """Where the queries of a chunk stand, and up to which key they look."""

    def __init__(self, start, queries: int, end: int, keys: int, q_offset, problem: Problem, kv_segments):
        self.start, self.queries, self.end = start, queries, end
        self._keys, self._q_offset, self._problem, self._kv_segments = keys, q_offset, problem, kv_segments

    def bias(self, segments: Int[Array, "B S"] | None) -> Float[Array, "B 1 1 S T"]:
        """What is added to the scores: nothing where a query sees a key."""
        both = None if segments is None else (segments, self._kv_segments[:, : self.end])
        visible = seen(self._problem, self.queries, self.end, self._q_offset, both, self.start)
        return jnp.where(visible, 0.0, SEES_NOTHING)[:, None, None]


def _in_chunks(
    one: Callable[..., Any],
    rows: Sequence[Float[Array, "B K G S *n"]],
    keys: int,
    segments: Segments,
    q_offset: Int[Array, ""] | int,
    problem: Problem,
    sums: Sequence[tuple[int, ...]],
) -> tuple[list[Array], list[Array]]:
    """`one(place, segments, *rows)` for each chunk of queries -> (results by query, results to be summed).

    A few chunks are unrolled, each with just the keys that it may see; many are a loop over all keys, whose program
    does not grow with the length.
    """
    length = rows[0].shape[3]
    chunk = _chunk(math.prod(rows[0].shape[:3]), length, keys)
    padded = math.ceil(length / chunk) * chunk
    starts = range(0, padded, chunk)
    segments, kv_segments = segments or (None, None)
    pad = lambda x, axis: jnp.pad(x, [(0, padded - length if a == axis else 0) for a in range(x.ndim)])  # noqa: E731
    rows = [pad(x, 3) for x in rows]
    segments = None if segments is None else pad(segments, 1)
    place = lambda start, end: _Place(start, chunk, end, keys, q_offset, problem, kv_segments)  # noqa: E731
    if len(starts) <= _UNROLLED_CHUNKS:
        cut = lambda x, axis: jax.lax.split(x, [chunk] * len(starts), axis)  # noqa: E731
        pieces = zip(*(cut(x, 3) for x in rows))
        some_segments = [None] * len(starts) if segments is None else cut(segments, 1)
        done = [
            one(place(start, _end(start + chunk, keys, q_offset, problem)), some, *piece)
            for start, some, piece in zip(starts, some_segments, pieces)
        ]
        by_query = [jnp.concatenate(x, axis=3) for x in zip(*(d[0] for d in done))]
        summed = [_sum_of_starts(x, shape) for x, shape in zip(zip(*(d[1] for d in done)), sums)]
    else:
        split = lambda x, axis: jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)  # noqa: E731

        def step(sums, x):
            start, some, *piece = x
            by_query, more = one(place(start, keys), some, *piece)
            return [a + b for a, b in zip(sums, more)], by_query

        inputs = (jnp.arange(0, padded, chunk), None if segments is None else split(segments, 1))
        zeros = [varying_alike(jnp.zeros(shape, jnp.float32), rows[0])[0] for shape in sums]
        summed, by_query = jax.lax.scan(step, zeros, (*inputs, *(split(x, 3) for x in rows)))
        by_query = [jnp.moveaxis(x, 0, 3) for x in by_query]
        by_query = [x.reshape(*x.shape[:3], padded, *x.shape[5:]) for x in by_query]
    return [x[:, :, :, :length] for x in by_query], summed


def _end(end: int, keys: int, q_offset: Int[Array, ""] | int, problem: Problem) -> int:
    """The keys that queries before `end` may see; at least one, so that nothing is empty."""
    if not problem.causal or not isinstance(q_offset, int):
        return keys
    return max(min(1, keys), min(keys, end + q_offset))


def _sum_of_starts(pieces: Sequence[Float[Array, "B K t D"]], shape: tuple[int, ...]) -> Float[Array, "B K T D"]:
    """The sum of what reaches from the first key to different ends."""
    longest = pieces[-1]
    total = jnp.pad(longest, [(0, n - m) for n, m in zip(shape, longest.shape)])
    for piece in pieces[:-1]:
        total = total.at[:, :, : piece.shape[2]].add(piece)
    return total


def _chunk(rows: int, length: int, keys: int) -> int:
    """Queries of one chunk: an eighth of the sequence, at least 128, fewer where the scores would be too large."""
    chunk = max(128, math.ceil(length / _UNROLLED_CHUNKS / 128) * 128)
    while chunk > 16 and rows * chunk * keys * 4 > _SCORE_BYTES:
        chunk //= 2
    return min(chunk, length)


def _scores(q, k, bias, problem: Problem) -> Float[Array, "B K G S T"]:
    """The scale goes into q, the smaller factor, unless that would be rounded to bfloat16."""
    exact = q.dtype == jnp.float32
    scores = _product("bkrd,bktd->bkrt", _merge(q * problem.scale if exact else q), k)
    scores = scores.reshape(*q.shape[:-1], -1)
    return (scores if exact else scores * problem.scale) + bias


def _product(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _grouped(x: Float[Array, "B H S *n"], k: Float[Array, "B K T D"]) -> Float[Array, "B K G S *n"]:
    """Heads by the kv head that they share."""
    return x.reshape(x.shape[0], k.shape[1], -1, *x.shape[2:])


def _merge(x: Float[Array, "B K G S n"]) -> Float[Array, "B K R n"]:
    """All queries of a kv head as the rows of one product."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
