"""The mixture of experts: a sigmoid router whose bias selects but never weighs, routed experts, a shared expert.

Every token goes to its experts; none is dropped. Rows are sorted by expert and multiplied group by group.

Axes: T tokens, D model, E experts, k experts per token, M = T * k routed rows, F expert width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.model.layers import recomputed, swiglu
from pallas_kernels import fused_moe, grouped_matmul, grouped_swiglu
from pallas_kernels.residuals import keep


class Routing(NamedTuple):
    """What the router decided, all in float32."""

    logits: Float[Array, "T E"]
    indices: Int[Array, "T k"]
    weights: Float[Array, "T k"]


def route(x: Float[Array, "T D"], router: Any, config: ModelConfig) -> Routing:
    """Scores every expert by a sigmoid and chooses the best by score plus selection bias.

    With groups, only the `topk_group` groups whose two best biased scores sum highest can be chosen from. Weights are
    the chosen experts' unbiased scores, normalised where the model does so, times `routed_scaling_factor`.
    """
    logits = jax.lax.dot_general(
        x.astype(jnp.float32),
        router.weight[...].astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    scores = jax.nn.sigmoid(logits)
    biased = jax.lax.stop_gradient(scores) + router.bias[...].astype(jnp.float32)
    _, indices = jax.lax.top_k(_only_best_groups(biased, config), config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, indices, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routing(logits, indices, weights * config.routed_scaling_factor)


def _only_best_groups(biased: Float[Array, "T E"], config: ModelConfig) -> Float[Array, "T E"]:
    if config.topk_group == config.n_group:
        return biased
    grouped = biased.reshape(biased.shape[0], config.n_group, -1)
    group_scores = jax.lax.top_k(grouped, 2)[0].sum(-1)
    _, best = jax.lax.top_k(group_scores, config.topk_group)
    kept = jax.nn.one_hot(best, config.n_group, dtype=jnp.bool_).any(axis=1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(biased.shape)


def moe(x: Float[Array, "T D"], module: Any, config: ModelConfig) -> tuple[Float[Array, "T D"], Routing]:
    """Routed experts plus the shared expert (never scaled), by grouped matmuls; differentiable."""
    routing = route(x, module.router, config)
    out = routed_experts(x, routing, module.experts, config)
    return _add_shared(out, x, module), routing


def moe_decode(x: Float[Array, "T D"], module: Any, config: ModelConfig, layer: Array | None) -> Float[Array, "T D"]:
    """`moe` for decoding: expert weights stay stacked over layers, for few tokens in one fused op."""
    routing = route(x, module.router, config)
    if x.shape[0] * config.num_experts_per_tok <= 4 * config.n_routed_experts:
        e = module.experts
        gate, up, down = (w[...].astype(x.dtype) for w in (e.gate, e.up, e.down))
        out = fused_moe(
            x, gate, up, down, routing.indices, routing.weights,
            layer=layer, transpose_rhs=True, implementation=config.implementation,
        )  # fmt: skip
    else:
        out = routed_experts(x, routing, module.experts, config, layer)
    return _add_shared(out, x, module)


def _add_shared(out: Float[Array, "T D"], x: Float[Array, "T D"], module: Any) -> Float[Array, "T D"]:
    return out + swiglu(x, module.shared) if hasattr(module, "shared") else out


@functools.partial(recomputed, static_argnums=3)
def routed_experts(
    x: Float[Array, "T D"], routing: Routing, experts: Any, config: ModelConfig, layer: Array | None = None
) -> Float[Array, "T D"]:
    """Sends each token to its experts and sums their answers by weight; only the routed work is done."""
    top_k = config.num_experts_per_tok
    flat = routing.indices.reshape(-1)
    order = keep(jnp.argsort(flat, stable=True))  # routed rows sorted by expert
    place = keep(jnp.argsort(order))  # where each (token, choice) went
    sizes = keep(jnp.bincount(flat, length=config.n_routed_experts).astype(jnp.int32))

    gate, up, down = (w[...].astype(x.dtype) for w in (experts.gate, experts.up, experts.down))
    how = {"transpose_rhs": True, "layer": layer, "implementation": config.implementation}
    rows = _dispatch(x, order, place, top_k)
    hidden = grouped_swiglu(rows, gate, up, sizes, keep_products=config.remat == "none", **how)
    hidden = _weighted(hidden, _permute(routing.weights.reshape(-1), order, place))
    answers = _permute(grouped_matmul(hidden, down, sizes, **how), place, order)
    return answers.reshape(-1, top_k, x.shape[-1]).astype(jnp.float32).sum(1).astype(x.dtype)


def _weighted(hidden: Float[Array, "M F"], weights: Float[Array, " M"]) -> Float[Array, "M F"]:
    """The experts' hidden rows, weighted here and not after `down`: the answers need not wait for the backward pass."""
    return (hidden.astype(jnp.float32) * weights[:, None]).astype(hidden.dtype)


# Dispatch and permutation are gathers both ways: XLA would derive a scatter-add from a gather, slow everywhere.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(
    x: Float[Array, "T D"], order: Int[Array, " M"], place: Int[Array, " M"], top_k: int
) -> Float[Array, "M D"]:
    """Each token's row once per chosen expert, sorted by expert."""
    return x[order // top_k]


def _dispatch_bwd(top_k, place, dout):
    by_token = dout[place].reshape(-1, top_k, dout.shape[-1])
    return by_token.astype(jnp.float32).sum(1).astype(dout.dtype), _no_gradient(place), _no_gradient(place)


_dispatch.defvjp(lambda x, order, place, top_k: (_dispatch(x, order, place, top_k), place), _dispatch_bwd)


@jax.custom_vjp
def _permute(x: Float[Array, "M ..."], order: Int[Array, " M"], back: Int[Array, " M"]) -> Float[Array, "M ..."]:
    """x[order], where `back` is the inverse of `order`."""
    return x[order]


_permute.defvjp(
    lambda x, order, back: (x[order], back),
    lambda back, dout: (dout[back], _no_gradient(back), _no_gradient(back)),
)


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)
