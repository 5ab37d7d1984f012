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
from glm45_jax.model.layers import linear, rms_norm, rotate

_MASKED = -1e30  # finite, so that a row that sees nothing (padding) stays free of NaN
_SCORE_BYTES = 1 << 28  # of one chunk of float32 scores
_KEPT_BYTES = 1 << 26  # of scores that the backward pass may find stored; above they are recomputed
_UNROLLED_CHUNKS = 8


def project(x: Float[Array, "B S D"], module: Any, config: ModelConfig, rotary: tuple[Array, Array]):
    """Queries [B, S, H, h], keys and values [B, K, S, h]: biased, normed where the model does so, then rotated."""
    heads = lambda y: y.reshape(*x.shape[:2], -1, config.head_dim)  # noqa: E731
    q, k, v = heads(linear(x, module.q)), heads(linear(x, module.k)), heads(linear(x, module.v))
    if config.use_qk_norm:
        q = rms_norm(q, module.q_norm.scale[...], config.rms_norm_eps)
        k = rms_norm(k, module.k_norm.scale[...], config.rms_norm_eps)
    q, k = rotate(q, *rotary), rotate(k, *rotary)
    return q, k.swapaxes(1, 2), v.swapaxes(1, 2)


def output(attended: Float[Array, "B S H h"], module: Any) -> Float[Array, "B S D"]:
    return linear(attended.reshape(*attended.shape[:2], -1), module.o)


def attend(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B K T h"],
    v: Float[Array, "B K T h"],
    *,
    slots: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    kv_segment_ids: Int[Array, "B T"],
) -> Float[Array, "B S H h"]:
    """Attention over keys that lie no later than the query's slot and in its segment."""
    batch, queries, num_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    q = (q * head_dim**-0.5).reshape(batch, queries, kv_heads, num_heads // kv_heads, head_dim)
    # keys before queries: a softmax along an outer axis is the one that vectorises on CPU, and no other platform minds
    scores = jnp.einsum("bkth,bskgh->bktgs", k, q, preferred_element_type=jnp.float32)
    seen = (jnp.arange(k.shape[2])[:, None] <= slots[:, None]) & (kv_segment_ids[..., None] == segment_ids[:, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None, :, None], scores, _MASKED), axis=2).astype(q.dtype)
    return jnp.einsum("bktgs,bkth->bskgh", weights, v).reshape(batch, queries, num_heads, head_dim)


def attend_one(
    q: Float[Array, "H h"], k: Float[Array, "K T h"], v: Float[Array, "K T h"], seen: Bool[Array, " T"]
) -> Float[Array, "H h"]:
    """Attention of one query, keys first in the products, so that no large operand has to be transposed."""
    grouped = (q * q.shape[-1] ** -0.5).reshape(k.shape[0], -1, q.shape[-1])
    scores = jnp.einsum("kth,kgh->ktg", k, grouped, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, _MASKED), axis=1).astype(q.dtype)
    return jnp.einsum("ktg,kth->kgh", weights, v).reshape(q.shape)


def attend_causal(
    q: Float[Array, "B S H h"], k: Float[Array, "B K S h"], v: Float[Array, "B K S h"], segment_ids: Int[Array, "B S"]
) -> Float[Array, "B S H h"]:
    """Attention of a whole sequence to itself, in chunks of queries, each against the keys up to its own end only.

    Chunks leave out the keys that no query of theirs may see, and bound the memory of the scores.
    """
    length = q.shape[1]
    chunk = _chunk(q.shape[0] * q.shape[2], length)
    if chunk == length:
        slots = jnp.broadcast_to(jnp.arange(length), segment_ids.shape)
        return attend(q, k, v, slots=slots, segment_ids=segment_ids, kv_segment_ids=segment_ids)
    padded = math.ceil(length / chunk) * chunk
    q = jnp.pad(q, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
    query_segments = jnp.pad(segment_ids, ((0, 0), (0, padded - length)))

    def one(start, q_chunk, segments, k, v, kv_segments):
        slots = jnp.broadcast_to(start + jnp.arange(chunk), segments.shape)
        return attend(q_chunk, k, v, slots=slots, segment_ids=segments, kv_segment_ids=kv_segments)

    if q.shape[0] * q.shape[2] * length * length * 4 > _KEPT_BYTES:
        one = jax.checkpoint(one)
    starts = range(0, padded, chunk)
    if len(starts) <= _UNROLLED_CHUNKS:
        out = [
            one(s, q[:, s : s + chunk], query_segments[:, s : s + chunk], k[:, :, : s + chunk], v[:, :, : s + chunk],
                segment_ids[:, : s + chunk])
            for s in starts
        ]  # fmt: skip
        return jnp.concatenate(out, axis=1)[:, :length]
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)  # noqa: E731
    inputs = (jnp.arange(0, padded, chunk), split(q), split(query_segments))
    out = jax.lax.map(lambda x: one(x[0], x[1], x[2], k, v, segment_ids), inputs)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)[:, :length]


def _chunk(rows: int, length: int) -> int:
    """Queries of one chunk: an eighth of the sequence, at least 128, fewer where the scores would be too large."""
    chunk = max(128, math.ceil(length / _UNROLLED_CHUNKS / 128) * 128)
    while chunk > 16 and rows * chunk * length * 4 > _SCORE_BYTES:
        chunk //= 2
    return min(chunk, length)
