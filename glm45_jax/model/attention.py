"""Grouped-query attention: projections, and the masked softmax over keys in plain XLA.

Which key a query sees is said by two things: its place (a key no later in the row) and its segment (the same id;
padding has id 0). Positions only turn the rotary embedding. Softmax runs in float32.

Axes: B batch, S queries, T keys, K kv heads, G query heads per kv head, h head dim, D model.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.model.layers import keep, linear, recomputed, rms_norm, rotate

_MASKED = -1e30  # finite, so that a row that sees nothing (padding) stays free of NaN
_SCORE_BYTES = 1 << 28  # of one chunk of float32 scores
_UNROLLED_CHUNKS = 8


def queries(
    x: Float[Array, "B S D"], module: Any, config: ModelConfig, rotary: tuple[Array, Array]
) -> Float[Array, "B H S h"]:
    """Projected, with its bias; normed where the model does so; rotated."""
    q = _heads(linear(x, module.q), config)
    if config.use_qk_norm:
        q = rms_norm(q, module.q_norm.scale[...], config.rms_norm_eps)
    return rotate(q, *rotary)


def keys_values(
    x: Float[Array, "B S D"], module: Any, config: ModelConfig, rotary: tuple[Array, Array]
) -> tuple[Float[Array, "B K S h"], Float[Array, "B K S h"]]:
    """As `queries`; values are neither normed nor rotated."""
    k, v = _heads(linear(x, module.k), config), _heads(linear(x, module.v), config)
    if config.use_qk_norm:
        k = rms_norm(k, module.k_norm.scale[...], config.rms_norm_eps)
    return rotate(k, *rotary), v


def _heads(x: Float[Array, "B S O"], config: ModelConfig) -> Float[Array, "B H S h"]:
    """Heads first, before the norm: XLA for CPU would else fuse the norm into the product, at half its speed."""
    return x.reshape(*x.shape[:2], -1, config.head_dim).swapaxes(1, 2)


def output(attended: Float[Array, "B H S h"], module: Any) -> Float[Array, "B S D"]:
    return linear(attended.swapaxes(1, 2).reshape(attended.shape[0], attended.shape[2], -1), module.o)


def attend(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B K T h"],
    v: Float[Array, "B K T h"],
    *,
    slots: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    kv_segment_ids: Int[Array, "B T"],
) -> Float[Array, "B H S h"]:
    """Attention over keys that lie no later than the query's slot and in its segment."""
    bias = _bias(slots, segment_ids, kv_segment_ids)
    return _attend_groups(_to_groups(q, k.shape[1]), k, v, bias).reshape(q.shape)


def _bias(
    slots: Int[Array, "B S"], segment_ids: Int[Array, "B S"], kv_segment_ids: Int[Array, "B T"]
) -> Float[Array, "B S T"]:
    """What is added to the scores: nothing where a query sees a key."""
    earlier = jnp.arange(kv_segment_ids.shape[1]) <= slots[..., None]
    return jnp.where(earlier & (segment_ids[..., None] == kv_segment_ids[:, None]), 0.0, _MASKED)


def _to_groups(q: Float[Array, "B H S h"], kv_heads: int) -> Float[Array, "B K G S h"]:
    """Scaled queries, by the kv head that they meet."""
    return (q * q.shape[-1] ** -0.5).reshape(q.shape[0], kv_heads, -1, *q.shape[2:])


@jax.custom_vjp
def _attend_groups(
    q: Float[Array, "B K G S h"], k: Float[Array, "B K T h"], v: Float[Array, "B K T h"], bias: Float[Array, "B S T"]
) -> Float[Array, "B K G S h"]:
    """Softmax over keys and the weighted values, for scaled queries; the sum is divided out at the end.

    The backward pass computes the weights anew from each row's log-sum-exp (https://arxiv.org/abs/2205.14135), so that
    no scores wait for it.
    """
    return _attend_fwd(q, k, v, bias)[0]


def _attend_fwd(q, k, v, bias):
    scores = _scores(q, k, bias)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bkrt,bkth->bkrh", _merge(weights).astype(q.dtype), v, preferred_element_type=jnp.float32)
    out = (out.reshape(q.shape) / total).astype(q.dtype)
    return out, (q, k, v, bias, keep(out), keep(largest + jnp.log(total)))


def _attend_bwd(residuals, dout):
    q, k, v, bias, out, lse = residuals
    weights = jnp.exp(_scores(q, k, bias) - lse)
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    dweights = jnp.einsum("bkrh,bkth->bkrt", _merge(dout), v, preferred_element_type=jnp.float32)
    dscores = _merge((weights * (dweights.reshape(weights.shape) - delta)).astype(q.dtype))
    dq = jnp.einsum("bkrt,bkth->bkrh", dscores, k).reshape(q.shape)
    dk = jnp.einsum("bkrt,bkrh->bkth", dscores, _merge(q))
    dv = jnp.einsum("bkrt,bkrh->bkth", _merge(weights).astype(q.dtype), _merge(dout))
    return dq, dk, dv, None


_attend_groups.defvjp(_attend_fwd, _attend_bwd)


def _scores(q, k, bias) -> Float[Array, "B K G S T"]:
    scores = jnp.einsum("bkrh,bkth->bkrt", _merge(q), k, preferred_element_type=jnp.float32)
    return scores.reshape(*q.shape[:-1], -1) + bias[:, None, None]


def _merge(x: Float[Array, "B K G S n"]) -> Float[Array, "B K R n"]:
    """All queries of a kv head as the rows of one product."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def attend_one(
    q: Float[Array, "H h"], k: Float[Array, "K T h"], v: Float[Array, "K T h"], seen: Bool[Array, " T"]
) -> Float[Array, "H h"]:
    """Attention of one query, keys first in the products, so that no large operand has to be transposed."""
    grouped = (q * q.shape[-1] ** -0.5).reshape(k.shape[0], -1, q.shape[-1])
    scores = jnp.einsum("kth,kgh->ktg", k, grouped, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, _MASKED), axis=1).astype(q.dtype)
    return jnp.einsum("ktg,kth->kgh", weights, v).reshape(q.shape)


@recomputed
def attend_causal(
    q: Float[Array, "B H S h"], k: Float[Array, "B K S h"], v: Float[Array, "B K S h"], segment_ids: Int[Array, "B S"]
) -> Float[Array, "B H S h"]:
    """Attention of a whole sequence to itself, in chunks of queries, each against the keys up to its own end only.

    Chunks leave out the keys that no query of theirs may see, and bound the memory of the scores.
    """
    length = q.shape[2]
    chunk = _chunk(q.shape[0] * q.shape[1], length)
    padded = math.ceil(length / chunk) * chunk
    grouped = jnp.pad(_to_groups(q, k.shape[1]), ((0, 0), (0, 0), (0, 0), (0, padded - length), (0, 0)))
    query_segments = jnp.pad(segment_ids, ((0, 0), (0, padded - length)))

    def one(start, q_chunk, segments, k, v, kv_segments):
        slots = jnp.broadcast_to(start + jnp.arange(chunk), segments.shape)
        return _attend_groups(q_chunk, k, v, _bias(slots, segments, kv_segments))

    joined = lambda out: out.reshape(*q.shape[:2], padded, -1)[:, :, :length]  # noqa: E731
    starts = range(0, padded, chunk)
    if len(starts) <= _UNROLLED_CHUNKS:
        cut = lambda x, axis: jax.lax.split(x, [chunk] * len(starts), axis)  # noqa: E731
        out = [
            one(s, q_chunk, segments, k[:, :, : s + chunk], v[:, :, : s + chunk], segment_ids[:, : s + chunk])
            for s, q_chunk, segments in zip(starts, cut(grouped, 3), cut(query_segments, 1))
        ]
        return joined(jnp.concatenate(out, axis=3))
    split = lambda x, axis: jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)  # noqa: E731
    inputs = (jnp.arange(0, padded, chunk), split(grouped, 3), split(query_segments, 1))
    out = jax.lax.map(lambda x: one(x[0], x[1], x[2], k, v, segment_ids), inputs)
    return joined(jnp.moveaxis(out, 0, 3).reshape(grouped.shape))


def _chunk(rows: int, length: int) -> int:
    """Queries of one chunk: an eighth of the sequence, at least 128, fewer where the scores would be too large."""
    chunk = max(128, math.ceil(length / _UNROLLED_CHUNKS / 128) * 128)
    while chunk > 16 and rows * chunk * length * 4 > _SCORE_BYTES:
        chunk //= 2
    return min(chunk, length)
