"""The forward pass of whole sequences: embedding, scanned layers, final norm, head.

Compile time does not grow with depth: layers of a kind are one scanned body over their stacked parameters.

Axes: B batch, S sequence, D model, V vocabulary, L layers, Lm MoE layers, E experts, k experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model.attention import (
    Sequence,
    attend_sequence,
    keys_values,
    output,
    over_context,
    queries,
    sequence_of,
)
from glm45_jax.model.layers import enter_tensor, linear, product, rms_norm, swiglu
from glm45_jax.model.moe import Routing, moe
from glm45_jax.model.over_mesh import over_mesh
from glm45_jax.model.params import (
    WHOLE,
    Params,
    layer_axes,
    merge,
    merge_outer,
    param_axes,
    stacked_kinds,
    whole,
)
from glm45_jax.model.pipeline import run_pipeline
from glm45_jax.parallel import local

_BLOCK_OUTPUT = "block_output"  # what attention, MLP and experts add to the residual stream, to remat policies


class ForwardOutput(NamedTuple):
    """What `forward` returns; the last two are None unless collected."""

    logits: Float[Array, "B S V"]  # float32
    hidden: Float[Array, "B S D"]  # after the final norm
    hidden_states: Float[Array, "L+1 B S D"] | None = None  # embeddings, each layer's output; the last one normed
    router: Routing | None = None  # logits [Lm, B, S, E], indices and weights [Lm, B, S, k]


class Rows(NamedTuple):
    """Where the tokens of a batch of sequences stand: which segment each belongs to and its rotary position."""

    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]


def rows_of(
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    attention_mask: Int[Array, "B S"] | None = None,
) -> Rows:
    """Segments and positions from what the caller gave.

    Padding (mask 0) is segment 0. Positions restart with each segment when `segment_ids` is given and else count from
    the row's start, over padding too, as transformers does without `position_ids`.
    """
    for name, value in (("positions", positions), ("segment_ids", segment_ids), ("attention_mask", attention_mask)):
        if value is not None and value.shape != tokens.shape:
            raise UserError(f"{name} has shape {value.shape}, tokens {tokens.shape}; they must be equal")
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if positions is None:
        positions = place if segment_ids is None else place - _segment_starts(segment_ids)
    segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    if attention_mask is not None:
        segments = jnp.where(attention_mask != 0, segments, 0)
    return Rows(segments.astype(jnp.int32), positions)


def _segment_starts(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The index at which each token's segment begins."""
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    place = jnp.arange(segment_ids.shape[1])
    return jax.lax.cummax(jnp.where(begins, place, 0), axis=1)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    attention_mask: Int[Array, "B S"] | None = None,
    collect: Collection[str] = (),
) -> ForwardOutput:
    """The model over whole sequences. Pure; composes with `jit` (config static), `grad` and `vmap`.

    Args:
      params: the tree of `init_params` or `load_checkpoint`.
      tokens: ids, all below `vocab_size`.
      positions: of the rotary embedding; see `rows_of` for the default.
      segment_ids: of packed sequences; tokens see only their own segment. 0 is padding.
      attention_mask: 1 for tokens, 0 for padding, on either side.
      collect: any of "hidden_states", "router".
    """
    unknown = set(collect) - {"hidden_states", "router"}
    if unknown:
        raise UserError(f"forward can collect 'hidden_states' and 'router', not {sorted(unknown)}")
    tokens = jnp.asarray(tokens)

    def run(params: Params, tokens: Array, rows: Rows) -> ForwardOutput:
        hidden, states, routing = hidden_states(params, config, tokens, rows, keep_states="hidden_states" in collect)
        logits = head_logits(hidden, head_weight(params, config))
        if states is not None:
            states = jnp.concatenate([states[:-1], hidden[None]])
        return ForwardOutput(logits, hidden, states, _of_all(routing) if "router" in collect else None)

    rows = rows_of(tokens, positions, segment_ids, attention_mask)
    router: Any = Routing(1, 1, 1, None) if "router" in collect and config.num_moe_layers else 1
    return over_mesh(run, config, params, (tokens, rows), ForwardOutput(0, 0, 1, router))  # pyright: ignore


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    rows: Rows,
    *,
    keep_states: bool = False,
    summarize: Callable[[Routing, Array], Any] = lambda routing, _: routing,
    pipelined: bool = False,
) -> tuple[Float[Array, "B S D"], Array | None, Any]:
    """The main model without its head.

    Returns:
      Hidden states after the final norm; the embeddings and every layer's output [L+1, B, S, D] if asked for; and what
      `summarize` made of each MoE layer's routing and the tokens' segments, stacked [Lm, …] (None without MoE layers).
      If `pipelined`, stages of a pipeline axis share the MoE layers, and the summaries are a stage's part of their sum.
    """
    h = local.spread(embed(params["embed"]["weight"], tokens, config), local.live())
    seen = sequence_of(*rows, config)
    states, summaries = [h[None]], None
    for kind in stacked_kinds(config):
        by_stages = pipelined and kind == "moe_layers" and local.live("pipeline")

        def body(h, layer_params, rows, apart=(), kind=kind):
            places, seen = rows
            module = merge(config, kind, whole(layer_params, config, layer_axes(config, kind), apart))
            h, routing = block(module, config, h, seen)
            return h, (h if keep_states else None, None if routing is None else summarize(routing, places.segment_ids))

        if by_stages:
            layer = remat(functools.partial(body, apart=("pipeline",)), config)
            h, (outputs, summary) = run_pipeline(layer, params[kind], h, (rows, seen), config)
        else:
            layer = remat(lambda h, layer_params, body=body: body(h, layer_params, (rows, seen)), config)
            h, (outputs, summary) = jax.lax.scan(layer, h, params[kind])
        summaries = summary if kind == "moe_layers" else summaries
        states.append(outputs)
    h = rms_norm(h, params["final_norm"]["scale"], config.rms_norm_eps)
    return h, jnp.concatenate(states) if keep_states else None, summaries


def _of_all(routing: Routing | None) -> Routing | None:
    """With the count of what was dropped on all devices."""
    return None if routing is None else routing._replace(dropped=local.total(routing.dropped))


def block(
    module: Any, config: ModelConfig, h: Float[Array, "B S D"], rows: Sequence
) -> tuple[Float[Array, "B S D"], Routing | None]:
    """One decoder layer: h + attention(norm h), then + MLP or experts(norm of that)."""
    a = enter_tensor(rms_norm(h, module.input_norm.scale[...], config.rms_norm_eps))
    q, (k, v) = (project(a, module.attention, config, rows.rotary) for project in (queries, keys_values))
    attended = attend_sequence(q, *(over_context(x, axis=2) for x in (k, v)), rows, config)
    h = h + checkpoint_name(output(attended, module.attention, h), _BLOCK_OUTPUT)
    b = rms_norm(h, module.post_attention_norm.scale[...], config.rms_norm_eps)
    if hasattr(module, "mlp"):
        return h + checkpoint_name(swiglu(b, module.mlp), _BLOCK_OUTPUT), None
    batch, length, dim = b.shape
    y, routing = moe(b.reshape(-1, dim), module.moe, config)
    routing = Routing(*(x.reshape(batch, length, -1) for x in routing[:-1]), routing.dropped)
    return h + checkpoint_name(y.reshape(b.shape), _BLOCK_OUTPUT), routing


def remat(body: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """`body` with the config's policy for what the backward pass recomputes."""
    policies: dict[str, Any] = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "save_block_outputs": jax.checkpoint_policies.save_only_these_names(_BLOCK_OUTPUT),
    }
    if config.remat == "none":
        if not local.live():
            return body
        policies["none"] = jax.checkpoint_policies.save_anything_except_these_names(WHOLE)
    if config.remat not in policies:
        raise UserError(f"remat policy {config.remat!r} is unknown; choose 'none', {', '.join(map(repr, policies))}")
    return jax.checkpoint(body, policy=policies[config.remat], prevent_cse=False)


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B S"], config: ModelConfig) -> Float[Array, "B S D"]:
    """The tokens' rows of the table. Devices that `tensor` gives the same tokens keep their part of the vocabulary."""
    if not local.live("tensor") or local.varying_over(tokens, "tensor"):
        return vocabulary(table, config)[tokens].astype(config.dtype)
    part = whole(table, config, (None, "embed"))
    here = tokens - local.index("tensor") * part.shape[0]
    known = (here >= 0) & (here < part.shape[0])
    rows = jnp.where(known[..., None], part[jnp.where(known, here, 0)], 0)
    return local.total(rows.astype(config.dtype), "tensor")


def vocabulary(table: Float[Array, "v d"], config: ModelConfig) -> Float[Array, "V D"]:
    """The whole embedding or head, of which each device holds a part."""
    return whole(table, config, ("vocab", "embed"))


def head_weight(params: Params, config: ModelConfig) -> Float[Array, "V D"]:
    return vocabulary(params["embed" if config.tie_word_embeddings else "head"]["weight"], config)


def head_logits(hidden: Float[Array, "*n D"], weight: Float[Array, "V D"]) -> Float[Array, "*n V"]:
    """Logits in float32; `weight` may be `Quantized`."""
    return product(hidden, weight, jnp.float32)


# --- multi-token prediction ----------------------------------------------------------------------------------------


class MTPOutput(NamedTuple):
    """Position t holds what the MTP layer says of token t + 2."""

    logits: Float[Array, "B S-1 V"]
    hidden: Float[Array, "B S-1 D"]  # after the MTP layer's own norm
    router: Routing


def mtp_forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    attention_mask: Int[Array, "B S"] | None = None,
    hidden: Float[Array, "B S D"] | None = None,
) -> MTPOutput:
    """The multi-token-prediction layer over whole sequences; `hidden` is `forward(…).hidden`, if at hand already."""
    if not config.has_mtp:
        raise UserError("this model has no MTP layer (num_nextn_predict_layers is 0)")
    tokens = jnp.asarray(tokens)

    def run(params: Params, tokens: Array, next_tokens: Array, rows: Rows, hidden: Array | None) -> MTPOutput:
        if hidden is None:
            hidden, _, _ = hidden_states(params, config, tokens, rows)
        out, routing = mtp_hidden(params, config, hidden, next_tokens, rows)
        return MTPOutput(head_logits(out, mtp_head_weight(params, config)), out, _of_all(routing))

    rows = rows_of(tokens, positions, segment_ids, attention_mask)
    arrays = (tokens, shifted(tokens, 1), rows, hidden)
    out = over_mesh(run, config, params, arrays, MTPOutput(0, 0, Routing(0, 0, 0, None)))
    cut = lambda x: x if x.ndim == 0 else x[:, :-1]  # noqa: E731  the last token has none after it
    return jax.tree.map(cut, out)


def shifted(x: Int[Array, "B S"], by: int) -> Int[Array, "B S"]:
    """What stands `by` places further on in each row; 0 past its end."""
    return jnp.pad(x[:, by:], ((0, 0), (0, by)))


def mtp_hidden(
    params: Params, config: ModelConfig, hidden: Float[Array, "B S D"], next_tokens: Int[Array, "B S"], rows: Rows
) -> tuple[Float[Array, "B S D"], Routing]:
    """From the hidden state at t (after the final norm) and token t + 1: the hidden state that predicts token t + 2."""

    rows_seen = sequence_of(*rows, config)

    def run(layer, h):
        module = mtp_module(params, layer, config)
        z = mtp_input(module, config, h, embed(mtp_embed_weight(params, config), next_tokens, config))
        z, routing = block(module.block, config, z, rows_seen)
        return rms_norm(z, module.norm.scale[...], config.rms_norm_eps), routing

    return remat(run, config)(mtp_layer(params), hidden)


def mtp_layer(params: Params) -> Params:
    """The MTP layer's parameters but for its embedding and head, where it has its own."""
    return {name: value for name, value in params["mtp"].items() if name not in ("embed", "head")}


def mtp_module(params: Params, layer: Params, config: ModelConfig) -> Any:
    """The MTP layer's module from what `mtp_layer` gives, gathered."""
    outer = {k: v for k, v in params.items() if k not in stacked_kinds(config)}
    layer = whole(layer, config, {name: param_axes(config)["mtp"][name] for name in layer})
    return merge_outer(config, {**outer, "mtp": {**params["mtp"], **layer}}).mtp


def mtp_input(
    module: Any, config: ModelConfig, hidden: Float[Array, "B S D"], embedded: Float[Array, "B S D"]
) -> Float[Array, "B S D"]:
    """eh_proj over the two normed halves, the embedding first."""
    e = rms_norm(embedded, module.enorm.scale[...], config.rms_norm_eps)
    g = rms_norm(hidden, module.hnorm.scale[...], config.rms_norm_eps)
    return linear(jnp.concatenate([e, g], axis=-1), module.eh_proj)


def mtp_embed_weight(params: Params, config: ModelConfig) -> Float[Array, "V D"]:
    return (params["mtp"] if config.mtp_own_embed else params)["embed"]["weight"]


def mtp_head_weight(params: Params, config: ModelConfig) -> Float[Array, "V D"]:
    return vocabulary(params["mtp"]["head"]["weight"], config) if config.mtp_own_head else head_weight(params, config)
