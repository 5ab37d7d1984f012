"""Paged attention in portable XLA for devices that do much at once, GPUs above all: all pieces of work together.

A piece is some new tokens of one row. All pieces go through their rows' positions together, a chunk of pages at a time,
with an online softmax; the loop ends with the longest row. A chunk's keys and values are gathered, so that they are
read, written and read again: three times the least, but nothing past the longest row and no whole row in memory.

Axes: I pieces, B tokens of a piece, K KV heads, G query heads of a KV head, D head size, C pages of a chunk,
p positions of a page, S = C p.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import tree_varying_alike
from pallas_kernels.paged_attention import rows

_MOST_TOKENS = 64  # of a piece
_CHUNK = 512  # positions
_MASKED = -1e30


def forward(q, k, v, pages, page_table, lengths, starts, layer, kv_scale, *, scale):
    """[N, H, D] and pages [L, num_pages, K, page_size, 2 D] -> the same again; see `api.paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens == 0:
        return q, pages
    pages = rows.write(pages, rows.stored(k, v, kv_scale, pages.dtype), page_table, starts, lengths, layer)
    most = min(_MOST_TOKENS, -(-num_tokens // lengths.shape[0]))
    items = rows.cut(starts, lengths, num_tokens, most)
    token = items.start[:, None] + jnp.arange(most)
    query = q.at[token].get(mode="clip").reshape(*token.shape, k.shape[1], -1, head_dim)  # [I, B, K, G, D]
    out = _attend(query, items, pages, page_table[items.row], layer, kv_scale, scale)
    place = jnp.where(jnp.arange(most) < items.tokens[:, None], token, num_tokens)
    place = jnp.where((items.position[:, None] + jnp.arange(most)) >= 0, place, num_tokens)
    return jnp.zeros_like(q).at[place].set(out.reshape(*token.shape, num_heads, head_dim), mode="drop"), pages


def _attend(query, items, pages, page_ids, layer, kv_scale, scale):
    """Every piece's tokens [I, B, K, G, D] over the pages of its row, of which `page_ids` [I, P] are the numbers."""
    count, most, kv_heads, group, head_dim = query.shape
    _, num_pages, _, page_size, _ = pages.shape
    chunk = min(max(1, _CHUNK // page_size), page_ids.shape[1])
    flat = pages.reshape(-1, page_size, 2 * head_dim)
    first = (layer * num_pages + jnp.clip(page_ids, 0, num_pages - 1)) * kv_heads
    first = jnp.pad(first, ((0, 0), (0, -first.shape[1] % chunk)))
    ends = jnp.where(items.tokens > 0, items.position + items.tokens, 0)
    sees_to = items.position[:, None] + jnp.arange(most)
    exact = {"precision": "highest" if query.dtype == jnp.float32 else None, "preferred_element_type": jnp.float32}
    query = (query.astype(jnp.float32) * _of_heads(kv_scale, 0, scale)).astype(query.dtype)

    def step(j, state):
        highest, total, weighted = state
        which = jax.lax.dynamic_slice_in_dim(first, j * chunk, chunk, 1)[:, None] + jnp.arange(kv_heads)[:, None]
        kv = flat[which].reshape(count, kv_heads, -1, 2 * head_dim).astype(query.dtype)  # [I, K, S, 2 D]
        at = j * chunk * page_size + jnp.arange(kv.shape[2])
        written = (at < ends[:, None])[:, None, :, None]  # what no one wrote may be NaN
        scores = jnp.einsum("ibkgd,iksd->ikbgs", query, kv[..., :head_dim], **exact)
        seen = (at <= sees_to[..., None]) & written[:, 0, None, :, 0]
        scores = jnp.where(seen[:, None, :, None], scores, _MASKED)
        now = jnp.maximum(highest, scores.max(-1))
        weights, old = jnp.exp(scores - now[..., None]), jnp.exp(highest - now)
        values = jnp.where(written, kv[..., head_dim:], 0)
        new = jnp.einsum("ikbgs,iksd->ikbgd", weights.astype(query.dtype), values, **exact)
        return now, total * old + weights.sum(-1), weighted * old[..., None] + new

    shape = count, kv_heads, most, group
    state = jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim))
    state, _ = tree_varying_alike((state, query))
    _, total, weighted = jax.lax.fori_loop(0, -(-ends.max() // (chunk * page_size)), step, state)
    out = (weighted / jnp.maximum(total, 1e-30)[..., None]).transpose(0, 2, 1, 3, 4) * _of_heads(kv_scale, 1, 1.0)
    return out.astype(query.dtype)


def _of_heads(kv_scale, which: int, scale: float):
    """`scale`, times what a stored one of keys (0) or values (1) stands for; spread over [I, B, K, G, D]."""
    return scale if kv_scale is None else scale * kv_scale[which, :, None, None]
