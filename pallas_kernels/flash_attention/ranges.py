"""Which blocks of keys each block of queries has to meet, and which of those need no mask.

A query sees the keys up to its limit that belong to its segment. For a block of queries the key blocks that hold one
they may see lie in [first, end), and inside that [full_first, full_end) is a run of blocks that every one of them sees
whole. The kernels loop over just these.

Axes: B batch (1 where all rows of the batch are alike), N blocks of queries, M blocks of keys.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

BOUNDS = 4  # first, full_first, full_end, end


def key_ranges(
    queries: int,
    keys: int,
    block_q: int,
    block_kv: int,
    *,
    causal: bool,
    q_offset: Int[Array, ""],
    segments: tuple[Int[Array, "B S"], Int[Array, "B T"]] | None,
) -> Int[Array, "B N 4"]:
    """first <= full_first <= full_end <= end for every block of queries, in blocks of keys.

    Args:
      queries, keys: how many there are; blocks may reach past them.
      segments: ids of queries and keys. Blocks whose ids do not meet are left out; those between two that meet are not.
    """
    needed, full = (x[None] for x in _by_place(queries, keys, block_q, block_kv, causal, q_offset))
    if segments is not None:
        q_low, q_high = _extremes(segments[0], block_q)
        k_low, k_high = _extremes(segments[1], block_kv)
        q_low, q_high, k_low, k_high = q_low[..., None], q_high[..., None], k_low[:, None], k_high[:, None]
        needed &= (q_low <= k_high) & (k_low <= q_high)
        full &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    first, end = _first(needed), _end(needed)
    full &= needed
    full_end = _end(full)
    place = jnp.arange(full.shape[2])
    full_first = _end(~full & (place < full_end[..., None]))  # the run that ends last
    none = full_end == 0
    return jnp.stack([first, jnp.where(none, first, full_first), jnp.where(none, first, full_end), end], axis=-1)


def _by_place(queries, keys, block_q, block_kv, causal, q_offset) -> tuple[Bool[Array, "N M"], Bool[Array, "N M"]]:
    """Blocks that some query, and that every query, may see for their place alone."""
    starts = jnp.arange(-(-queries // block_q), dtype=jnp.int32)[:, None] * block_q
    first_key = jnp.arange(-(-keys // block_kv), dtype=jnp.int32) * block_kv
    if not causal:
        starts = jnp.zeros_like(starts)
        limits = (keys - 1 + starts, keys - 1 + starts)
    else:
        last_query = jnp.minimum(starts + block_q, queries) - 1
        limits = (jnp.minimum(x + q_offset, keys - 1) for x in (starts, last_query))
    least, most = limits
    return first_key <= most, first_key + block_kv - 1 <= least


def _extremes(ids: Int[Array, "B S"], block: int) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    padded = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge")
    blocks = padded.reshape(ids.shape[0], -1, block)
    return blocks.min(-1), blocks.max(-1)


def _first(which: Bool[Array, "B N M"]) -> Int[Array, "B N"]:
    """The first that is true; 0 if none is."""
    return jnp.argmax(which, axis=-1).astype(jnp.int32)


def _end(which: Bool[Array, "B N M"]) -> Int[Array, "B N"]:
    """One past the last that is true; 0 if none is."""
    place = jnp.arange(1, which.shape[-1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(which, place, 0), axis=-1)
