"""Grouped-query attention: projections, and the masked softmax over the keys of a cache.

Whole sequences go through `pallas_kernels.flash_attention`. Which key a query sees is said by two things: its place (a
key no later in the row) and its segment (the same id; padding has id 0). Positions only turn the rotary embedding.
Softmax runs in float32.

Axes: B batch, S queries, T keys, H heads, K kv heads, h head dim, D model, O output features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.model.layers import linear, rms_norm, rotate

_MASKED = -1e30  # finite, so that a row that sees nothing (padding) stays free of NaN


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
    """Attention over keys that lie no later than the query's slot and in its segment: every score at once."""
    rows = (q * q.shape[-1] ** -0.5).reshape(*k.shape[:2], -1, q.shape[-1])  # all queries of a kv head
    scores = jnp.einsum("bkrh,bkth->bkrt", rows, k, preferred_element_type=jnp.float32)
    earlier = jnp.arange(k.shape[2]) <= slots[..., None]
    bias = jnp.where(earlier & (segment_ids[..., None] == kv_segment_ids[:, None]), 0.0, _MASKED)
    by_head = scores.reshape(*k.shape[:2], -1, *bias.shape[1:]) + bias[:, None, None]
    weights = jax.nn.softmax(by_head, axis=-1).reshape(scores.shape).astype(q.dtype)
    return jnp.einsum("bkrt,bkth->bkrh", weights, v).reshape(q.shape)


def attend_one(
    q: Float[Array, "H h"], k: Float[Array, "K T h"], v: Float[Array, "K T h"], seen: Bool[Array, " T"]
) -> Float[Array, "H h"]:
    """Attention of one query, keys first in the products, so that no large operand has to be transposed."""
    grouped = (q * q.shape[-1] ** -0.5).reshape(k.shape[0], -1, q.shape[-1])
    scores = jnp.einsum("kth,kgh->ktg", k, grouped, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, _MASKED), axis=1).astype(q.dtype)
    return jnp.einsum("ktg,kth->kgh", weights, v).reshape(q.shape)
