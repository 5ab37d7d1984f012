"""What every implementation works out of a ragged batch: where its tokens sit, what is stored of them, its work items.

Axes: N new tokens, K KV heads, D head size, R rows, I work items.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


def token_positions(starts: jax.Array, lengths: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each token the row, the position in it, and whether it is one of a row's at all; each [N]."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.clip(jnp.searchsorted(starts, token, side="right").astype(jnp.int32) - 1, 0, lengths.shape[0] - 1)
    position = lengths[row] - starts[row + 1] + token
    return row, position, (token < starts[-1]) & (position >= 0)


def largest_stored(dtype: jnp.dtype) -> float:
    return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def quantise(x: jax.Array, inverse_scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What is stored of float32 `x`, still in float32: scaled and saturated, and of integers the nearest."""
    x = x * inverse_scale
    x = jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x
    return jnp.clip(x, -largest_stored(dtype), largest_stored(dtype))


def stored(k: jax.Array, v: jax.Array, kv_scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Keys and values as the pages hold them: [N, K, D] twice -> [N, K, 2 D]."""
    if kv_scale is not None:
        scaled = zip((k, v), 1 / kv_scale[..., None])
        k, v = (quantise(x.astype(jnp.float32), inverse, dtype) for x, inverse in scaled)
    return jnp.concatenate([k.astype(dtype), v.astype(dtype)], axis=-1)


def write(pages, new, page_table, starts, lengths, layer):
    """The pages [L, num_pages, K, page_size, 2 D] with the new tokens [N, K, 2 D] in layer `layer`."""
    row, position, live = token_positions(starts, lengths, new.shape[0])
    page_size = pages.shape[3]
    column = jnp.clip(position // page_size, 0, page_table.shape[1] - 1)
    page = jnp.where(live, page_table[row, column], pages.shape[1])  # out of range, and so dropped
    return pages.at[layer, page, :, position % page_size].set(new, mode="drop")


class Items(NamedTuple):
    """Pieces of work: some consecutive new tokens of one row, each [I]; those past `count` are void."""

    row: jax.Array
    start: jax.Array  # the first of its tokens
    tokens: jax.Array  # how many
    position: jax.Array  # of the first
    count: jax.Array  # scalar


def cut(starts: jax.Array, lengths: jax.Array, num_tokens: int, most: int) -> Items:
    """Cuts every row's new tokens into pieces of up to `most`."""
    num_rows = lengths.shape[0]
    pieces = -(-jnp.diff(starts) // most)
    ends = jnp.cumsum(pieces)
    index = jnp.arange(min(num_tokens, num_tokens // most + num_rows), dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right").astype(jnp.int32), num_rows - 1)
    start = starts[row] + (index - ends[row] + pieces[row]) * most
    tokens = jnp.clip(starts[row + 1] - start, 0, most)
    return Items(row, start, tokens, lengths[row] - starts[row + 1] + start, ends[-1])
