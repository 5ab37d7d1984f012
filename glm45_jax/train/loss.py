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
from jaxtyping import Array, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.model.decoder import Rows, head_weight, hidden_states, mtp_head_weight, mtp_hidden, rows_of
from glm45_jax.model.moe import Routing
from glm45_jax.model.params import Params
from pallas_kernels import weighted_linear_cross_entropy

Batch = Mapping[str, Array]


class Totals(NamedTuple):
    """What the loss's means divide by. Those of a whole batch, when a micro-batch contributes to it."""

    tokens: Float[Array, ""]  # targets of the next-token loss
    mtp_tokens: Float[Array, ""]
    sequences: Float[Array, ""]


def totals_of(batch: Batch) -> Totals:
    """The denominators of a batch: targets, MTP targets, rows."""
    rows = _rows(batch)
    count = lambda ahead: jnp.maximum(_target_weights(batch, rows, ahead).sum(), 1.0)  # noqa: E731
    return Totals(count(1), count(2), jnp.float32(batch["tokens"].shape[0]))


def loss_fn(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    mtp_weight: float | Array = 0.3,
    balance_weight: float | Array = 1e-4,
    totals: Totals | None = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of a batch and its parts.

    Args:
      batch: `tokens` [B, S]; optional `segment_ids` [B, S] (0 is padding; sequences of one row don't see each other and
        nothing is predicted across their borders), `positions`, `attention_mask`, and `loss_mask` [B, S], which says of
        each token whether it counts as a target.
      mtp_weight: of the MTP layer's loss (0.3 for the first 15T tokens of GLM-4.5, then 0.1); without the layer unused.
      balance_weight: of the balance loss.
      totals: denominators, when the batch is a part of a larger one; by default the batch's own.

    Returns:
      The loss, and `cross_entropy` (the plain mean over next tokens), `mtp_cross_entropy`, `balance_loss`, `tokens`,
      and `expert_load` [Lm (+1 with MTP), E]: tokens, padding left out, that each expert got.
    """
    tokens, rows = batch["tokens"], _rows(batch)
    totals = totals_of(batch) if totals is None else totals
    valid = rows.segment_ids != 0

    def summarize(routing: Routing, valid=valid):
        return expert_load(routing, valid), balance_loss(routing, valid) / totals.sequences

    hidden, _, summary = hidden_states(params, config, tokens, rows, summarize=summarize)
    weights = _target_weights(batch, rows, ahead=1) / totals.tokens
    cross_entropy = _cross_entropy(config, hidden[:, :-1], head_weight(params, config), tokens[:, 1:], weights)
    metrics: dict[str, Any] = {"cross_entropy": cross_entropy, "tokens": totals.tokens}
    loads, balances = ([], []) if summary is None else ([summary[0]], [summary[1].sum()])
    loss = cross_entropy
    if config.has_mtp:
        out, routing = mtp_hidden(params, config, hidden[:, :-1], tokens[:, 1:], Rows(*(x[:, :-1] for x in rows)))
        load, balance = summarize(routing, valid[:, :-1])
        loads.append(load[None])
        balances.append(balance)
        weights = _target_weights(batch, rows, ahead=2) / totals.mtp_tokens
        mtp = _cross_entropy(config, out[:, :-1], mtp_head_weight(params, config), tokens[:, 2:], weights)
        metrics["mtp_cross_entropy"] = mtp
        loss += mtp_weight * mtp
    if loads:
        metrics |= {"expert_load": jnp.concatenate(loads), "balance_loss": sum(balances)}
        loss += balance_weight * metrics["balance_loss"]
    return loss, metrics


def _rows(batch: Batch) -> Rows:
    optional = (batch.get(name) for name in ("positions", "segment_ids", "attention_mask"))
    return rows_of(batch["tokens"], *optional)


def _target_weights(batch: Batch, rows: Rows, ahead: int) -> Float[Array, "B S-ahead"]:
    """1 where the token `ahead` of a position is a target: in the same segment all the way, not padding, not masked."""
    segments = rows.segment_ids
    same = segments[:, :-ahead] != 0
    for step in range(1, ahead + 1):
        same &= segments[:, :-ahead] == segments[:, step : segments.shape[1] - ahead + step]
    if batch.get("loss_mask") is not None:
        same &= batch["loss_mask"][:, ahead:] != 0
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
    length = jnp.maximum(valid.sum(1, dtype=jnp.float32), 1.0)[:, None]
    share = _chosen(indices, valid, experts).sum(1) / (top_k * length)
    normalised = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    mean = jnp.where(valid[..., None], normalised, 0).sum(1) / length
    return experts * jnp.sum(share * mean)


def _chosen(indices: Int[Array, "B S k"], valid: Array, experts: int) -> Float[Array, "B S E"]:
    """How often each token chose each expert (0 or 1); nothing for padding."""
    chosen = (indices[..., None] == jnp.arange(experts)).any(axis=2)
    return jnp.where(valid[..., None], chosen, False).astype(jnp.float32)
