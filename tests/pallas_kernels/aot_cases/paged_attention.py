"""paged_attention as a serving engine of GLM-4.5 calls it: 96 query heads on 8 KV heads of 128, 128K tokens a row.

Axes: N new tokens, H query heads, K KV heads, D head size, R rows, P pages of a row, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import paged_attention
from pallas_kernels.analysis.cases import Case

_LAYERS, _POSITIONS = 4, 128 * 1024


def cases() -> list[Case]:
    return [decoding(64, jnp.bfloat16), mixed(jnp.bfloat16)]


def matrix() -> list[Case]:
    pages_of = [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn]
    return [
        *(decoding(64, dtype) for dtype in pages_of),
        *(mixed(dtype) for dtype in pages_of),
        decoding(64, jnp.float32, dtype=jnp.float32),
        decoding(128, jnp.bfloat16),
        decoding(64, jnp.bfloat16, 128),
        decoding(64, jnp.bfloat16, heads=(12, 1, 128)),  # one of eight devices
        mixed(jnp.bfloat16, heads=(12, 1, 128)),
        mixed(jnp.bfloat16, heads=(64, 8, 64)),
    ]


def decoding(rows: int, page_dtype, page_size: int = 64, *, mean_length: int = 2048, **options) -> Case:
    """One new token of every row, lengths spread around their mean."""
    lengths = np.random.default_rng(0).integers(mean_length // 2, mean_length * 3 // 2, rows)
    return _case(f"decoding, {rows} rows", np.ones(rows, int), lengths, page_dtype, page_size, **options)


def mixed(page_dtype, page_size: int = 64, **options) -> Case:
    """2048 new tokens: 64 rows decode, one is at its third chunk of 1024, one begins, the last is a short prompt."""
    tokens = np.array([1] * 64 + [1024, 832, 128])
    lengths = np.concatenate([np.random.default_rng(0).integers(1024, 3072, 64), [3 * 1024, 832, 128]])
    return _case("mixed, 2048 tokens", tokens, lengths, page_dtype, page_size, **options)


def _case(name, new_tokens, lengths, page_dtype, page_size, *, heads=(96, 8, 128), dtype=jnp.bfloat16) -> Case:
    num_heads, kv_heads, head_dim = heads
    rows, tokens = len(lengths), int(new_tokens.sum())
    pages_per_row = _POSITIONS // page_size
    in_use = -(-lengths // page_size)
    num_pages = int(in_use.sum()) + 1
    table = np.zeros((rows, pages_per_row), np.int32)
    for row, end in enumerate(np.cumsum(in_use)):
        table[row, : in_use[row]] = np.arange(end - in_use[row], end) + 1
    starts = np.cumsum([0, *new_tokens]).astype(np.int32)
    page_dtype = jnp.dtype(page_dtype)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    pages = jax.ShapeDtypeStruct((_LAYERS, num_pages, kv_heads, page_size, 2 * head_dim), page_dtype)
    arguments = [array(tokens, num_heads, head_dim), *[array(tokens, kv_heads, head_dim)] * 2, pages]
    arguments += [table, lengths.astype(np.int32), starts, np.int32(rows), np.int32(_LAYERS - 1)]
    if page_dtype.itemsize == 1:
        arguments.append(jax.ShapeDtypeStruct((_LAYERS, 2, kv_heads), jnp.float32))
    types = f"pages of {page_size} in {page_dtype}, queries in {jnp.dtype(dtype)}"
    seen = (lengths * new_tokens - new_tokens * (new_tokens - 1) // 2).sum()
    return Case(
        f"paged_attention/{name}, H={num_heads} K={kv_heads} D={head_dim}, {types}",
        _attend,
        tuple(arguments),
        least_bytes=least_bytes(new_tokens, lengths, heads, page_dtype, jnp.dtype(dtype)),
        flops=4.0 * float(seen) * num_heads * head_dim,
    )


def _attend(q, k, v, pages, page_table, lengths, starts, num_rows, layer, kv_scale=None):
    return paged_attention(
        q, k, v, pages, page_table, lengths, starts, num_rows, layer=layer, kv_scale=kv_scale, implementation="tpu"
    )


def least_bytes(new_tokens, lengths, heads, page_dtype, dtype) -> float:
    """What was there of each row with new tokens once, queries and result once, the new tokens once in and once out."""
    num_heads, kv_heads, head_dim = heads
    old = (lengths - new_tokens)[new_tokens > 0].sum() * page_dtype.itemsize
    new = new_tokens.sum() * (dtype.itemsize + page_dtype.itemsize)
    return (
        float(old + new) * 2 * kv_heads * head_dim + float(new_tokens.sum()) * 2 * num_heads * head_dim * dtype.itemsize
    )
