"""Paged attention in plain XLA, the truth for every other implementation: each token gathers all pages of its row.

Axes: N new tokens, H query heads, K KV heads, G query heads of a KV head, D head size, S positions of a whole row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import rows


def forward(q, k, v, pages, page_table, lengths, starts, layer, kv_scale, *, scale):
    """[N, H, D] and pages [L, num_pages, K, page_size, 2 D] -> the same again; see `api.paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    pages = rows.write(pages, rows.stored(k, v, kv_scale, pages.dtype), page_table, starts, lengths, layer)
    row, position, live = rows.token_positions(starts, lengths, num_tokens)
    of_layer = jax.lax.dynamic_index_in_dim(pages, layer, keepdims=False)

    def attend(token):
        query, row, position = token
        kv = jnp.swapaxes(of_layer.at[page_table[row]].get(mode="clip"), 1, 2).reshape(-1, kv_heads, 2 * head_dim)
        seen = jnp.arange(kv.shape[0]) <= position
        kv = jnp.where(seen[:, None, None], kv.astype(jnp.float32), 0)
        keys, values = kv[..., :head_dim], kv[..., head_dim:]
        if kv_scale is not None:
            keys, values = keys * kv_scale[0, :, None], values * kv_scale[1, :, None]
        grouped = query.astype(jnp.float32).reshape(kv_heads, -1, head_dim)
        scores = jnp.einsum("kgd,skd->kgs", grouped, keys, precision="highest") * scale
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("kgs,skd->kgd", weights, values, precision="highest").reshape(num_heads, head_dim)

    if num_tokens == 0:
        return q, pages
    out = jax.lax.map(attend, (q, row, position))
    return jnp.where(live[:, None, None], out, 0).astype(q.dtype), pages
