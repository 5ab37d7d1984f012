"""Grouped-query attention: projections, and the masked softmax over the keys of a cache.

Whole sequences go through `pallas_kernels.flash_attention`. Which key a query sees is said by two things: its place (a
key no later in the row) and its segment (the same id; padding has id 0). Positions only turn the rotary embedding.
Softmax runs in float32.

Axes: B batch, S queries, T keys, H heads, K kv heads, h head dim, D model, O output features.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from glm45_jax.config import ModelConfig
from glm45_jax.model.layers import leave_tensor, linear, product, rms_norm, rotary_tables, rotate
from glm45_jax.model.quantized import is_quantized
from glm45_jax.parallel import local
from pallas_kernels import flash_attention

_MASKED = -1e30  # finite, so that a row that sees nothing (padding) stays free of NaN


class Sequence(NamedTuple):
    """The rows of a batch as attention sees them, S tokens here of T in all (S = T without a context axis)."""

    segment_ids: Int[Array, "B S"]
    kv_segment_ids: Int[Array, "B T"]
    rotary: tuple[Float[Array, "B S r"], Float[Array, "B S r"]]


def sequence_of(segment_ids: Int[Array, "B s"], positions: Int[Array, "B s"], config: ModelConfig) -> Sequence:
    """From each device's piece of the rows, which `tensor` cuts too."""
    segment_ids, positions = (local.gather(x, "tensor", axis=1) for x in (segment_ids, positions))
    return Sequence(segment_ids, over_context(segment_ids, axis=1), rotary_tables(config, positions))


def attend_sequence(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B K T h"],
    v: Float[Array, "B K T h"],
    rows: Sequence,
    config: ModelConfig,
) -> Float[Array, "B H S h"]:
    """Causal attention within segments; keys and values are those of whole rows (`over_context`)."""
    how = {"heads_first": True, "implementation": config.implementation, "kv_segment_ids": rows.kv_segment_ids}
    if not local.live("context"):
        return flash_attention(q, k, v, segment_ids=rows.segment_ids, **how)
    parts = []
    for half, offset in enumerate(_offsets(q.shape[2])):
        piece = slice(half * q.shape[2] // 2, (half + 1) * q.shape[2] // 2)
        segments = rows.segment_ids[:, piece]
        parts.append(flash_attention(q[:, :, piece], k, v, segment_ids=segments, q_offset=offset, **how))
    return jnp.concatenate(parts, axis=2)


# Over a context axis of C devices a row is cut into 2 C pieces, and device i has the pieces i and 2 C - 1 - i: one
# whose queries see little and one whose queries see much, the same work for all. Keys and values, few with grouped
# queries, are gathered.


def _offsets(length: int) -> tuple[Array, Array]:
    """Where in the row the two pieces of a device's `length` tokens begin."""
    devices, mine, piece = local.count("context"), local.index("context"), length // 2
    return mine * piece, (2 * devices - 1 - mine) * piece


def over_context(x: Shaped[Array, ...], axis: int) -> Shaped[Array, ...]:
    """The whole row, in order, from the devices' pieces."""
    if not local.live("context"):
        return x
    whole = local.gather(x, "context", axis)
    return jnp.take(whole, cut_order(local.count("context"), whole.shape[axis])[1], axis=axis)


@functools.cache
def cut_order(devices: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which tokens lie when cut over a context axis, and the order that undoes it."""
    pieces = np.arange(length).reshape(2 * devices, -1)
    pairs = [i for pair in zip(range(devices), range(2 * devices - 1, devices - 1, -1)) for i in pair]
    order = pieces[pairs].reshape(-1)
    return order, np.argsort(order)


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
    k, v = (_heads(_project_kv(x, projection, config), config) for projection in (module.k, module.v))
    if config.use_qk_norm:
        k = rms_norm(k, module.k_norm.scale[...], config.rms_norm_eps)
    return rotate(k, *rotary), v


def _project_kv(x: Float[Array, "B S D"], projection: Any, config: ModelConfig) -> Float[Array, "B S O"]:
    """The projection, by this device's heads alone where it has more (see `own_heads`)."""
    weight = projection.weight.get_value()
    if not _has_others_heads(weight.shape[0], config):
        return linear(x, projection)
    y = product(x, _own(weight, -2, config))
    return y + _own(projection.bias[...], -1, config).astype(x.dtype) if hasattr(projection, "bias") else y


def own_heads(stacked: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A stack of layers with this device's kv heads alone, where a tensor axis larger than their number has all whole.

    For loops over the layers: one that cuts layer and head at once, XLA for TPU lets copy the stack in every round.
    """
    attention = stacked["attention"]
    if not _has_others_heads(attention["k"]["weight"].shape[-2], config):
        return stacked
    cut = {
        name: {part: _own(x, -2 if part == "weight" else -1, config) for part, x in attention[name].items()}
        for name in ("k", "v")
    }
    return {**stacked, "attention": {**attention, **cut}}


def _has_others_heads(rows: int, config: ModelConfig) -> bool:
    """Whether a projection of so many rows is of more heads than this device computes."""
    devices, of_all = local.count("tensor"), config.num_key_value_heads * config.head_dim
    return devices > 1 and rows * devices > max(of_all, devices * config.head_dim)


def _own(x: Any, axis: int, config: ModelConfig) -> Any:
    """This device's head of those that lie along `axis`."""
    first = local.index("tensor") * config.num_key_value_heads // local.count("tensor") * config.head_dim
    if is_quantized(x):
        return x.rows(first, config.head_dim)
    return jax.lax.dynamic_slice_in_dim(x, first, config.head_dim, axis % x.ndim)


def _heads(x: Float[Array, "B S O"], config: ModelConfig) -> Float[Array, "B H S h"]:
    """Heads first, before the norm: XLA for CPU would else fuse the norm into the product, at half its speed."""
    return x.reshape(*x.shape[:2], -1, config.head_dim).swapaxes(1, 2)


def output(attended: Float[Array, "B H S h"], module: Any, h: Float[Array, "B s D"]) -> Float[Array, "B s D"]:
    """What attention adds to `h`, of which each device may have a piece."""
    return leave_tensor(linear(attended.swapaxes(1, 2).reshape(attended.shape[0], attended.shape[2], -1), module.o), h)


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
