"""Decoding with a KV cache: `init_cache`, `prefill`, `decode_step`.

These loop over the layer *number* and read the stacked weights in place: expert weights and caches are never sliced by
the loop, which would copy every expert at every step.

A cache row is a list of slots. A token may see the slots before its own whose segment is its own; empty slots and
padding have segment 0, so prompts of different lengths, padded on either side, and packed rows are all one case.

Axes: B batch, S new tokens, T slots, L layers, K kv heads, h head dim, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model.attention import (
    attend,
    attend_one,
    attend_sequence,
    keys_values,
    output,
    over_context,
    own_heads,
    queries,
    sequence_of,
)
from glm45_jax.model.decoder import embed, head_logits, rows_of
from glm45_jax.model.layers import FEW_ROWS, InStack, enter_tensor, rms_norm, rotary_tables, swiglu
from glm45_jax.model.moe import moe_decode
from glm45_jax.model.over_mesh import mesh_in_force, over_serving_mesh
from glm45_jax.model.params import Params, layer_axes, merge, stacked_kinds, whole
from glm45_jax.model.quantized import Quantized, is_quantized
from glm45_jax.parallel import local
from glm45_jax.parallel.local import SEQUENCE_AXES
from glm45_jax.parallel.sharding import as_axes, rules_of

_ROWS_WRITTEN_APART = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and where each row stands."""

    k: Float[Array, "L B K T h"]
    v: Float[Array, "L B K T h"]
    segment_ids: Int[Array, "B T"]  # 0: empty, or padding
    length: Int[Array, " B"]  # the next free slot
    position: Int[Array, " B"]  # the rotary position of the next token
    segment: Int[Array, " B"]  # the segment that the next token goes on with

    @property
    def capacity(self) -> int:
        return self.k.shape[3]


def init_cache(config: ModelConfig, batch_size: int, capacity: int, dtype: Any = None) -> KVCache:
    """An empty cache for `batch_size` rows of up to `capacity` tokens, prompt and answer together.

    Over a tensor axis of more devices than there are kv heads, each device has a head of its own, K is their number.
    """
    mesh = mesh_in_force()
    heads = max(config.num_key_value_heads, 1 if mesh is None else mesh.shape.get("tensor", 1))
    shape = (config.num_hidden_layers, batch_size, heads, capacity, config.head_dim)
    dtype = dtype or config.dtype
    zeros = jnp.zeros(batch_size, jnp.int32)
    return KVCache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((batch_size, capacity), jnp.int32),
        zeros,
        zeros,
        zeros,
    )


def prefill(
    params: Params,
    config: ModelConfig,
    cache: KVCache,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    attention_mask: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads the prompts into an empty cache. Returns the logits after each row's last token, and the cache.

    Padding (mask or segment 0) may stand on either side. With padding on the right the next token overwrites it. Of the
    last layer only what those logits and the cache need is computed: keys and values, and the rest for last tokens.

    Raises:
      UserError: more tokens than slots.
    """
    tokens = jnp.asarray(tokens)
    if tokens.shape[1] > cache.capacity:
        raise UserError(f"a prompt of {tokens.shape[1]} tokens does not fit a cache of {cache.capacity} slots")
    rows = rows_of(tokens, positions, segment_ids, attention_mask)
    place = jnp.arange(tokens.shape[1])
    last = jnp.max(jnp.where(rows.segment_ids != 0, place, 0), axis=1)
    position, segment = (x[jnp.arange(last.size), last] for x in (rows.positions, rows.segment_ids))
    is_last = place == last[:, None]

    def run(params, kv, new, by_row):
        (tokens, rows, is_last), (last, segment) = new, by_row
        seen = sequence_of(*rows, config)

        def attention(q, k, v, kv, layer):
            k, v = (over_context(x, axis=2) for x in (k, v))
            kv = tuple(
                jax.lax.dynamic_update_slice(stack, new[None, :, :, :length].astype(stack.dtype), (layer, 0, 0, 0, 0))
                for stack, new in zip(kv, (k, v))
            )
            if q.shape[2] == 1:
                slots, own = last[:, None], segment[:, None]
                return attend(q, k, v, slots=slots, segment_ids=own, kv_segment_ids=seen.kv_segment_ids), kv
            return attend_sequence(q, k, v, seen, config), kv

        h, kv = cached_layers(params, config, tokens, seen.rotary, kv, attention, is_last)
        return own_logits(params, config, h[:, 0]), kv

    length = tokens.shape[1]
    new, by_row = (tokens, rows, is_last), (last, segment)
    logits, (k, v) = over_serving_mesh(run, config, params, (cache.k, cache.v), new, by_row)
    cache = KVCache(
        k, v,
        jax.lax.dynamic_update_slice(cache.segment_ids, rows.segment_ids, (0, 0)),
        last + 1, position + 1, segment,
    )  # fmt: skip
    return logits, cache


def decode_step(
    params: Params, config: ModelConfig, cache: KVCache, tokens: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """Appends one token to each row. Returns the logits for the token after it, and the cache.

    The cache is updated in place when it is donated (`jit(…, donate_argnums)`) or carried by a loop. A row that is full
    (`length` equal to `capacity`) overwrites its last slot: callers stop before.
    """
    batch = tokens.shape[0]
    slots = jnp.minimum(cache.length, cache.capacity - 1)
    kv_segment_ids = cache.segment_ids.at[jnp.arange(batch), slots].set(cache.segment)

    def run(params, kv, _, by_row):
        tokens, position, segment, slots, kv_segment_ids = by_row

        def attention(q, k, v, kv, layer):
            k, v = (_write(stack, new, layer, slots) for stack, new in zip(kv, (k, v)))
            return _attend_cached(q, k, v, layer, slots[:, None], segment[:, None], kv_segment_ids), (k, v)

        h, kv = cached_layers(params, config, tokens[:, None], rotary_tables(config, position[:, None]), kv, attention)
        return own_logits(params, config, h[:, 0]), kv

    by_row = tokens, cache.position, cache.segment, slots, kv_segment_ids
    logits, (k, v) = over_serving_mesh(run, config, params, (cache.k, cache.v), (), by_row)
    return logits, KVCache(k, v, kv_segment_ids, cache.length + 1, cache.position + 1, cache.segment)


def _attend_cached(q, k, v, layer, slots, segment_ids, kv_segment_ids):
    """Attention of one new token of each row [B, H, 1, h] to the cached keys and values of a layer."""

    def batched(q, k, v, layer, slots, segments, kv_segments):
        keys, values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).astype(q.dtype) for x in (k, v))
        return attend(q, keys, values, slots=slots, segment_ids=segments, kv_segment_ids=kv_segments)

    def row_by_row(q, k, v, layer, slots, segments, kv_segments):
        # XLA's CPU matmul wants its operand copied out of the stack: a row at a time keeps the copy small and cached
        def one(row):
            keys, values = (
                jax.lax.dynamic_slice(x, (layer, row, 0, 0, 0), (1, 1, *x.shape[2:]))[0, 0].astype(q.dtype)
                for x in (k, v)
            )
            seen = (jnp.arange(k.shape[3]) <= slots[row, 0]) & (kv_segments[row] == segments[row, 0])
            return attend_one(q[row, :, 0], keys, values, seen)

        return jax.lax.map(one, jnp.arange(q.shape[0]))[:, :, None]

    args = (q, k, v, layer, slots, segment_ids, kv_segment_ids)
    return jax.lax.platform_dependent(*args, cpu=row_by_row, default=batched)


def _write(
    stack: Float[Array, "L B K T h"], new: Float[Array, "B K 1 h"], layer: Int[Array, ""], slots: Int[Array, " B"]
) -> Float[Array, "L B K T h"]:
    """Puts one token of each row into its slot: one small update a row, which XLA does in place.

    Not so in a loop inside the layers' on a tpu7x, where each would copy the whole cache.
    """

    def write(row, stack):
        update = jax.lax.dynamic_index_in_dim(new, row)[None].astype(stack.dtype)
        return jax.lax.dynamic_update_slice(stack, update, (layer, row, 0, slots[row], 0))

    stack = jax.lax.fori_loop(0, new.shape[0], write, stack, unroll=new.shape[0] <= _ROWS_WRITTEN_APART)
    if stack.shape[-1] % 128 == 0:  # else XLA for TPU turns a float32 cache into another layout, and back, every step
        stack = with_layout_constraint(stack, Layout(major_to_minor=tuple(range(stack.ndim))))
    return stack


def cached_layers(params, config, tokens, rotary, kv, attention, is_last: Any = None):
    """All layers, by number; `attention(q, k, v, kv, layer)` reads and updates the cache.

    With `is_last` [B, S], true of one token in each row, the last layer goes on with those tokens alone.
    """

    def layer(index, carry, kind, first, cut=False):
        h, kv = carry
        few = tokens.size <= FEW_ROWS and not local.live()
        module, experts_layer = _layer(params[kind], index, config, kind, few)
        only = functools.partial(_only, chosen=is_last) if cut else None
        return cached_block(module, config, h, rotary, kv, attention, first + index, experts_layer, only)

    carry, first = (local.spread_like(embed(params["embed"]["weight"], tokens, config), tokens), kv), 0
    kinds = stacked_kinds(config)
    params = {**params, **{kind: own_heads(params[kind], config) for kind in kinds}}
    for kind, count in kinds.items():
        whole_layers = count - (is_last is not None and kind == list(kinds)[-1])
        carry = jax.lax.fori_loop(0, whole_layers, functools.partial(layer, kind=kind, first=first), carry)
        if whole_layers < count:
            carry = layer(whole_layers, carry, kind, first, cut=True)
        first += count
    h, kv = carry
    return rms_norm(h, params["final_norm"]["scale"], config.rms_norm_eps), kv


def cached_block(module, config, h, rotary, kv, attention, number, experts_layer=None, only: Any = None):
    """One layer, whose place in the cache is `number`; `only` takes the tokens that go on out of [B, s, D]."""
    own = rms_norm(h, module.input_norm.scale[...], config.rms_norm_eps)
    a, angles = enter_tensor(own), rotary
    k, v = keys_values(a, module.attention, config, rotary)
    if only is not None:
        h, a = only(h), only(own)
        angles = jax.tree.map(lambda x: only(local.own_piece(x, "tensor", axis=1)), rotary)
    attended, kv = attention(queries(a, module.attention, config, angles), k, v, kv, number)
    h = h + output(attended, module.attention, h)
    b = rms_norm(h, module.post_attention_norm.scale[...], config.rms_norm_eps)
    if hasattr(module, "mlp"):
        return h + swiglu(b, module.mlp), kv
    y = moe_decode(b.reshape(-1, b.shape[-1]), module.moe, config, experts_layer)
    return h + y.reshape(h.shape), kv


def _only(x: Float[Array, "B s D"], chosen: Bool[Array, "B s"]) -> Float[Array, "B 1 D"]:
    """The one token of each row that is chosen, on whichever device its piece of the row lies."""
    return local.total(jnp.where(chosen[..., None], x, 0).sum(1, keepdims=True), SEQUENCE_AXES)


def _layer(
    stacked: Params, index: Int[Array, ""], config: ModelConfig, kind: str, few: bool = False
) -> tuple[Any, Any]:
    """The module of one layer by number, and the number for its experts' op: their weights stay in the stack.

    Not so where the rules cut experts' matrices only to store them, and they have to be gathered. For products of `few`
    rows the other matrices stay there too.
    """
    stored = local.live(as_axes(rules_of(config)["embed"]))

    def take(path, x):
        if is_quantized(x):
            one = Quantized(x.values, x.scales, index)
            return one.cut_out() if stored else one
        if few and path[-1].key == "weight":
            return InStack(x, index)
        return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)

    take_all = functools.partial(jax.tree_util.tree_map_with_path, take, is_leaf=is_quantized)
    axes = layer_axes(config, kind)
    if "moe" not in stacked or local.live(as_axes(rules_of(config)["expert_embed"])):
        return merge(config, kind, whole(take_all(stacked), config, axes)), None
    without = lambda tree: {**tree, "moe": {k: v for k, v in tree["moe"].items() if k != "experts"}}  # noqa: E731
    layer = whole(take_all(without(stacked)), config, without(axes))
    layer["moe"]["experts"] = stacked["moe"]["experts"]
    return merge(config, kind, layer), index


def own_logits(params: Params, config: ModelConfig, h: Float[Array, "B D"]) -> Float[Array, "B v"]:
    """Of this device's part of the vocabulary."""
    table = params["embed" if config.tie_word_embeddings else "head"]["weight"]
    return head_logits(h, whole(table, config, (None, "embed")))
