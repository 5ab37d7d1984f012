"""The mixture of experts: a sigmoid router whose bias selects but never weighs, routed experts, a shared expert.

Axes: T tokens, D model, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.model.experts import few_tokens, routed_experts
from glm45_jax.model.layers import product, swiglu

_FEW_ON_TPU = 512  # tokens


class Routing(NamedTuple):
    """What the router decided, in float32, and how many choices found no room (none without a capacity)."""

    logits: Float[Array, "T E"]
    indices: Int[Array, "T k"]
    weights: Float[Array, "T k"]
    dropped: Int[Array, ""]


def route(x: Float[Array, "T D"], router: Any, config: ModelConfig) -> Routing:
    """Scores every expert by a sigmoid and chooses the best by score plus selection bias.

    With groups, only the `topk_group` groups whose two best biased scores sum highest can be chosen from. Weights are
    the chosen experts' unbiased scores, normalised where the model does so, times `routed_scaling_factor`.
    """
    logits = product(x.astype(jnp.float32), router.weight.get_value(), precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits)
    biased = jax.lax.stop_gradient(scores) + router.bias[...].astype(jnp.float32)
    _, indices = jax.lax.top_k(_only_best_groups(biased, config), config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, indices, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routing(logits, indices, weights * config.routed_scaling_factor, jnp.int32(0))


def _only_best_groups(biased: Float[Array, "T E"], config: ModelConfig) -> Float[Array, "T E"]:
    if config.topk_group == config.n_group:
        return biased
    grouped = biased.reshape(biased.shape[0], config.n_group, -1)
    group_scores = jax.lax.top_k(grouped, 2)[0].sum(-1)
    _, best = jax.lax.top_k(group_scores, config.topk_group)
    kept = jax.nn.one_hot(best, config.n_group, dtype=jnp.bool_).any(axis=1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(biased.shape)


def moe(x: Float[Array, "T D"], module: Any, config: ModelConfig) -> tuple[Float[Array, "T D"], Routing]:
    """Routed experts plus the shared expert (never scaled); differentiable."""
    routing = route(x, module.router, config)
    out, dropped = routed_experts(x, routing.indices, routing.weights, module.experts, config)
    return _add_shared(out, x, module), routing._replace(dropped=dropped)


def moe_decode(x: Float[Array, "T D"], module: Any, config: ModelConfig, layer: Array | None) -> Float[Array, "T D"]:
    """`moe` for decoding: expert weights stay stacked over layers, for few tokens in one fused op.

    On TPU few are as many as keep waiting for the weights: sorted rows would be met in chunks, and each reads them all.
    """
    routing = route(x, module.router, config)
    args = x, routing.indices, routing.weights
    fused, by_rows = (lambda *a, f=f: f(*a, module.experts, config, layer)[0] for f in (few_tokens, routed_experts))
    if x.shape[0] * config.num_experts_per_tok <= 4 * config.n_routed_experts:
        out = fused(*args)
    elif x.shape[0] <= _FEW_ON_TPU:
        out = jax.lax.platform_dependent(*args, tpu=fused, default=by_rows)
    else:
        out = by_rows(*args)
    return _add_shared(out, x, module)


def _add_shared(out: Float[Array, "T D"], x: Float[Array, "T D"], module: Any) -> Float[Array, "T D"]:
    return out + swiglu(x, module.shared) if hasattr(module, "shared") else out
