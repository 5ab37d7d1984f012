"""The training loss: next-token cross-entropy, the MTP layer's, and the sequence-level balance loss.

loss = cross_entropy + mtp_weight * mtp_cross_entropy + balance_weight * balance_loss
(arXiv 2508.06471, section 2; the balance loss as DeepSeek-V3 and Megatron define it).

Axes: B batch, S sequence, Lm MoE layers, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.model.decoder import Rows as Places
from glm45_jax.model.decoder import head_weight, hidden_states, mtp_head_weight, mtp_hidden, rows_of, shifted
from glm45_jax.model.moe import Routing
from glm45_jax.model.over_mesh import over_mesh
from glm45_jax.model.params import Params
from glm45_jax.model.quantized import refuse_quantized
from glm45_jax.parallel import local
from glm45_jax.parallel.local import SEQUENCE_AXES
from pallas_kernels import weighted_linear_cross_entropy

Batch = Mapping[str, Array]
Metrics = dict[str, Any]


class Rows(NamedTuple):
    """What the loss reads of a batch, each [B, S]: what a token predicts stands at its own place."""

    tokens: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    next: Int[Array, "B S"]  # the token after
    after_next: Int[Array, "B S"]
    has_next: Bool[Array, "B S"]  # not the last of its row
    is_target: Float[Array, "B S"]  # 1 where the next token counts
    is_mtp_target: Float[Array, "B S"]  # 1 where the one after it does


class Totals(NamedTuple):
    """What the loss's means divide by. Those of a whole batch, when a micro-batch contributes to it."""

    tokens: Float[Array, ""]  # targets of the next-token loss
    mtp_tokens: Float[Array, ""]
    sequences: Float[Array, ""]


def rows_of_batch(batch: Batch) -> Rows:
    """The batch as the loss reads it. Shifts along rows are done here, before rows are cut over devices."""
    tokens = jnp.asarray(batch["tokens"])
    segments, positions = rows_of(tokens, *(batch.get(n) for n in ("positions", "segment_ids", "attention_mask")))
    targets = [_is_target(batch, segments, ahead) for ahead in (1, 2)]
    has_next = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1, tokens.shape)
    return Rows(tokens, segments, positions, shifted(tokens, 1), shifted(tokens, 2), has_next, *targets)


def totals_of(rows: Rows) -> Totals:
    """The denominators of a batch: targets, MTP targets, rows."""
    count = lambda weights: jnp.maximum(weights.sum(), 1.0)  # noqa: E731
    return Totals(count(rows.is_target), count(rows.is_mtp_target), jnp.float32(rows.tokens.shape[0]))


def loss_fn(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    mtp_weight: float | Array = 0.3,
    balance_weight: float | Array = 1e-4,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of a batch and its parts.

    Args:
      batch: `tokens` [B, S]; optional `segment_ids` [B, S] (0 is padding; sequences of one row don't see each other and
        nothing is predicted across their borders), `positions`, `attention_mask`, and `loss_mask` [B, S], which says of
        each token whether it counts as a target.
      mtp_weight: of the MTP layer's loss (0.3 for the first 15T tokens of GLM-4.5, then 0.1); without the layer unused.
      balance_weight: of the balance loss.

    Returns:
      The loss, and `cross_entropy` (the plain mean over next tokens), `mtp_cross_entropy`, `balance_loss`, `tokens`,
      `expert_load` [Lm (+1 with MTP), E]: tokens, padding left out, that each expert got, and `dropped`: choices that
      found no room.
    """
    rows = rows_of_batch(batch)
    totals = totals_of(rows)
    weights = jnp.float32(mtp_weight), jnp.float32(balance_weight)

    def run(params: Params, rows: Rows) -> tuple[Array, Metrics]:
        return local.total(partial_loss(params, config, rows, totals, *weights))

    loss, metrics = over_mesh(run, config, params, (rows,), None)
    return loss, metrics | {"tokens": totals.tokens}


def partial_loss(
    params: Params, config: ModelConfig, rows: Rows, totals: Totals, mtp_weight: Any, balance_weight: Any
) -> tuple[Float[Array, ""], Metrics]:
    """What these rows add to the loss of a batch and to its parts: a micro-batch's, a device's."""
    refuse_quantized(params, "the loss of training")
    place = Places(rows.segment_ids, rows.positions)

    def summarize(routing: Routing, segment_ids: Array):
        valid = segment_ids != 0
        return expert_load(routing, valid), balance_loss(routing, valid) / totals.sequences, routing.dropped

    hidden, _, summary = hidden_states(params, config, rows.tokens, place, summarize=summarize, pipelined=True)
    cross_entropy = _cross_entropy(
        config, hidden, head_weight(params, config), rows.next, rows.is_target / totals.tokens
    )
    metrics: Metrics = {"cross_entropy": cross_entropy}
    parts = [] if summary is None else [summary]
    loss = cross_entropy
    if config.has_mtp:
        # the last token has none after it for the MTP layer to read: padding, there
        known = jnp.where(rows.has_next, rows.segment_ids, 0)
        out, routing = mtp_hidden(params, config, hidden, rows.next, place._replace(segment_ids=known))
        parts.append(jax.tree.map(lambda x: x[None], summarize(routing, known)))
        weights = rows.is_mtp_target / totals.mtp_tokens
        mtp = _cross_entropy(config, out, mtp_head_weight(params, config), rows.after_next, weights)
        metrics["mtp_cross_entropy"] = mtp
        loss += mtp_weight * mtp
    if parts:
        load, balance, dropped = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        metrics |= {"expert_load": load, "balance_loss": balance.sum(), "dropped": dropped.sum()}
        loss += balance_weight * metrics["balance_loss"]
    return loss, metrics


def _is_target(batch: Batch, segments: Int[Array, "B S"], ahead: int) -> Float[Array, "B S"]:
    """1 where the token `ahead` of a position is a target: in the same segment all the way, not padding, not masked."""
    same = segments != 0
    for step in range(1, ahead + 1):
        same &= segments == shifted(segments, step)
    if batch.get("loss_mask") is not None:
        same &= shifted(jnp.asarray(batch["loss_mask"]), ahead) != 0
    return same.astype(jnp.float32)


def _cross_entropy(config, hidden, head, targets, weights):
    hidden, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    return weighted_linear_cross_entropy(
        hidden, head, targets, weights, transpose_head=True, implementation=config.implementation
    )


def expert_load(routing: Routing, valid: Array) -> Int[Array, " E"]:
    """Tokens that each expert of a layer got, padding left out."""
    return _chosen(routing.indices, valid, routing.logits.shape[-1]).sum((0, 1)).astype(jnp.int32)


def balance_loss(routing: Routing, valid: Array) -> Float[Array, ""]:
    """Sum over sequences of E * sum_i f_i P_i: 1 for a sequence whose experts share the load evenly.

    f_i is the share of the sequence's choices that fall on expert i, P_i the mean normalised score. Choices are the top
    k of the scores without the selection bias, as in Megatron: the loss judges the router, not the correction.
    """
    scores = jax.nn.sigmoid(routing.logits)
    experts, top_k = scores.shape[-1], routing.indices.shape[-1]
    _, indices = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)
    of_row = lambda x: local.total(x.sum(1, dtype=jnp.float32), SEQUENCE_AXES)  # noqa: E731  its pieces on all devices
    length = jnp.maximum(of_row(valid), 1.0)[:, None]
    share = of_row(_chosen(indices, valid, experts)) / (top_k * length)
    normalised = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    mean = jnp.where(valid[..., None], normalised, 0).sum(1) / length
    return experts * jnp.sum(share * mean)


def _chosen(indices: Int[Array, "B S k"], valid: Array, experts: int) -> Float[Array, "B S E"]:
    """How often each token chose each expert (0 or 1); nothing for padding."""
    chosen = (indices[..., None] == jnp.arange(experts)).any(axis=2)
    return jnp.where(valid[..., None], chosen, False).astype(jnp.float32)
