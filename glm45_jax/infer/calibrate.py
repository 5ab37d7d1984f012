"""Scales of a quantised KV cache: how large keys and values become, measured on a sample of text.

A scale belongs to all keys, or all values, of one head of one layer, and is fixed before a cache is written. The
largest value seen is put a margin below the largest that can be stored: what lies beyond it is saturated.

Axes: L layers (the MTP layer's last), K kv heads, S tokens of a row, B rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model import Params, Ragged, init_pages, mtp_paged_step, paged_step
from glm45_jax.text import Tokenizer

CACHE_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn", "float8_e4m3fn": "float8_e4m3fn"}
# Room above what the sample showed. For integers each factor of two costs a bit; for floats nothing, so there is more.
_MARGIN = {"int8": 1.25, "float8_e4m3fn": 4.0}
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
_LEAST = 1e-6
_ROWS, _TOKENS, _PAGE = 4, 256, 32
_TEXTS = (
    "The river rose in the night, and by morning the lower road was gone. Nobody was hurt; the miller had moved his "
    "carts the day before, when the herons left. In 1847 it had stood a hand higher, as the church's mark says.",
    "def median(xs: list[float]) -> float:\n    xs = sorted(xs)\n    middle = len(xs) // 2\n    if len(xs) % 2:\n"
    "        return xs[middle]\n    return (xs[middle - 1] + xs[middle]) / 2\n",
    '{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n\n| n | n² | 2ⁿ |\n|---|---|---|\n| 1 | 1 | 2 |'
    "\n| 2 | 4 | 4 |\n\nProof. Suppose p/q = √2 in lowest terms; then p² = 2q², so p is even.",
    "今天早上下了雨，街上的人不多。她把窗户打开，听见远处的火车声。 Le train de sept heures a du retard, dit-il.",
)


def cache_dtype_of(name: str | None) -> str | None:
    """numpy's name of a cache's dtype; fp8 for short.

    Raises:
      UserError: a format that a cache cannot have.
    """
    if name is None or name in ("float32", "bfloat16"):
        return name
    if name not in CACHE_DTYPES:
        raise UserError(f"cache_dtype {name!r}: choose float32, bfloat16, {', '.join(CACHE_DTYPES)}, or None")
    return CACHE_DTYPES[name]


def checked_cache(options: Any) -> Any:
    """An engine's options with numpy's name of the cache's dtype; a quantised one's pages have a multiple of 32 tokens,
    the rows of a TPU's tile of bytes. Raises UserError as `cache_dtype_of`."""
    dtype = cache_dtype_of(options.cache_dtype)
    size = -(-options.page_size // _PAGE) * _PAGE if dtype in _LARGEST else options.page_size
    return dataclasses.replace(options, cache_dtype=dtype, page_size=size)


def sample_for(dtype: str | None, config: ModelConfig, tokenizer: Tokenizer | None) -> list[list[int]]:
    """The tokens by which a cache of this dtype is measured; none where it has no scales."""
    return _sample(config, tokenizer) if dtype in _LARGEST else []


def cache_scales(
    params: Params,
    config: ModelConfig,
    dtype: str,
    tokens: Sequence[Sequence[int]] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Float[Array, "L 2 K"]:
    """The scales for `model.init_pages` of keys and values in `dtype`, "int8" or "float8_e4m3fn".

    Args:
      tokens: rows to measure; by default some short texts through the tokenizer, without one random ids.

    Raises:
      UserError: no such cache, or no tokens.
    """
    name = cache_dtype_of(dtype)
    if name not in _LARGEST:
        raise UserError(f"a cache of {dtype} has no scales")
    rows = _sample(config, tokenizer) if tokens is None else [list(row) for row in tokens if len(row)]
    if not rows:
        raise UserError("calibrating needs tokens")
    most = min(max(map(len, rows)), config.max_position_embeddings)
    ids, lengths = np.zeros((len(rows), most), np.int32), np.array([min(len(row), most) for row in rows], np.int32)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = row[:most]
    return _largest(params, config, ids, lengths) * (_MARGIN[name] / _LARGEST[name])


def _sample(config: ModelConfig, tokenizer: Tokenizer | None) -> list[list[int]]:
    if tokenizer is not None:
        return [[i for i in tokenizer.encode(text) if i < config.vocab_size][:_TOKENS] for text in _TEXTS]
    size = config.real_vocab_size or config.vocab_size
    return np.random.default_rng(0).integers(0, size, (_ROWS, _TOKENS)).tolist()


@functools.partial(jax.jit, static_argnames="config")
def _largest(
    params: Params, config: ModelConfig, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]
) -> Float[Array, "L 2 K"]:
    """The largest absolute key and value of each head, from pages that the sample is read into."""
    rows, most = tokens.shape
    width = -(-most // _PAGE)
    pages = init_pages(config, rows * width, _PAGE, "float32" if config.dtype == "float32" else "bfloat16")
    table = jnp.arange(rows * width, dtype=jnp.int32).reshape(rows, width)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths)])
    place = jnp.arange(rows * most)
    row = jnp.clip(jnp.searchsorted(starts, place, side="right") - 1, 0, rows - 1)
    at = place - starts[row]
    flat = tokens[row, jnp.minimum(at, most - 1)]
    wanted = starts[1:] - 1
    step = paged_step(params, config, pages, Ragged(flat, starts, lengths, table, jnp.int32(rows)), wanted)
    if config.has_mtp:
        following = tokens[row, jnp.minimum(at + 1, lengths[row] - 1)]
        batch = Ragged(following, starts, lengths, table, jnp.int32(rows))
        step = mtp_paged_step(params, config, step.pages, batch, step.hidden, wanted)
    keys_values: Any = step.pages
    found = keys_values.astype(jnp.float32).reshape(*keys_values.shape[:-1], 2, config.head_dim)
    return jnp.maximum(jnp.abs(found).max((1, 3, 5)).swapaxes(1, 2), _LEAST)
