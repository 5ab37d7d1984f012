"""Paged attention as a loop over the pages in use: portable XLA, made for the CPU.

A piece of work is one decoding token, or a block of a row's new tokens; each goes through the row's pages up to its
last position, one page a step, with an online softmax. Nothing past a row's length is read. Pages in float32 or int8
are updated in place; XLA's CPU backend works on bfloat16 and float8 only after converting the whole cache to float32.

Axes: N new tokens, H query heads, K KV heads, G query heads of a KV head, D head size, B tokens of a piece.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import rows

_BLOCK = 32
_MASKED = -1e30


def forward(q, k, v, pages, page_table, lengths, starts, layer, kv_scale, *, scale):
    """[N, H, D] and pages [L, num_pages, K, page_size, 2 D] -> the same again; see `api.paged_attention`."""
    num_tokens = q.shape[0]
    if num_tokens == 0:
        return q, pages
    pages = rows.write(pages, rows.stored(k, v, kv_scale, pages.dtype), page_table, starts, lengths, layer)
    block = min(_BLOCK, num_tokens)
    items = rows.cut(starts, lengths, num_tokens, block)
    queries = jnp.pad(q.astype(jnp.float32), ((0, block), (0, 0), (0, 0)))

    def attend(most, i):
        query = jax.lax.dynamic_slice_in_dim(queries, items.start[i], most)
        out = _attend(
            query, items.position[i], items.tokens[i], pages, page_table[items.row[i]], layer, kv_scale, scale
        )
        return jnp.pad(out, ((0, block - most), (0, 0), (0, 0)))

    def step(i, out):
        y = jax.lax.cond(items.tokens[i] == 1, functools.partial(attend, 1), functools.partial(attend, block), i)
        y = jnp.where(jnp.arange(block)[:, None, None] < items.tokens[i], y, 0)
        return jax.lax.dynamic_update_slice_in_dim(out, y, items.start[i], 0)  # a later piece overwrites the zeros

    out = jax.lax.fori_loop(0, items.count, step, jnp.zeros_like(queries))
    return out[:num_tokens].astype(q.dtype), pages


def _attend(query, position, tokens, pages, page_ids, layer, kv_scale, scale):
    """Tokens [B, H, D] at `position` and after it, over the pages of their row."""
    num_tokens, num_heads, head_dim = query.shape
    _, num_pages, kv_heads, page_size, _ = pages.shape
    group = num_heads // kv_heads
    query = query.reshape(num_tokens, kv_heads, group, head_dim).swapaxes(0, 1).reshape(kv_heads, -1, head_dim) * scale
    if kv_scale is not None:
        query = query * kv_scale[0, :, None, None]
    sees_to = (position + jnp.arange(num_tokens).repeat(group))[:, None]

    def step(j, state):
        highest, total, weighted = state
        page = jnp.clip(page_ids[j], 0, num_pages - 1)
        kv = jax.lax.dynamic_slice(pages, (layer, page, 0, 0, 0), (1, 1, *pages.shape[2:]))[0, 0].astype(jnp.float32)
        at = j * page_size + jnp.arange(page_size)
        values = jnp.where((at < position + tokens)[:, None], kv[..., head_dim:], 0)  # what no one wrote may be NaN
        scores = jnp.einsum("kmd,ksd->kms", query, kv[..., :head_dim], precision="highest")
        scores = jnp.where(at <= sees_to, scores, _MASKED)
        now = jnp.maximum(highest, scores.max(-1, keepdims=True))
        weights, old = jnp.exp(scores - now), jnp.exp(highest - now)
        total = total * old + weights.sum(-1, keepdims=True)
        return now, total, weighted * old + jnp.einsum("kms,ksd->kmd", weights, values, precision="highest")

    column = jnp.zeros_like(query[..., :1])
    in_use = jnp.maximum(position + tokens + page_size - 1, 0) // page_size
    _, total, weighted = jax.lax.fori_loop(0, in_use, step, (column + _MASKED, column, jnp.zeros_like(query)))
    out = weighted / jnp.where(position < 0, 1, total)
    if kv_scale is not None:
        out = out * kv_scale[1, :, None, None]
    out = out.reshape(kv_heads, num_tokens, group, head_dim).swapaxes(0, 1).reshape(num_tokens, num_heads, head_dim)
    return jnp.where((position + jnp.arange(num_tokens) >= 0)[:, None, None], out, 0)
