"""The routed experts, on one device or many: each token's row to its experts, their MLPs, the weighted sum back.

Rows are sorted by expert and multiplied group by group. Where the experts are cut over mesh axes, rows and experts meet
in one of two ways, which give the same values and gradients:

  all_to_all  each row travels to the device of its expert, and the answer back, in rounds (`expert_rounds.py`).
  all_gather  every device gets all tokens of its group, answers for its experts, and the answers are summed. Cheaper
              for groups of few devices, and for the few tokens of decoding. Buffers hold the worst case; tokens go in
              chunks, so that they stay small.

No token is dropped, unless `parallel.expert_capacity` says how many rows, in means, a device answers in all_to_all:
the rest is dropped, and counted.

Axes: T tokens, D model, E experts (e of them on a device), k experts per token, M = T k routed rows, R of them met
here, n devices that share the experts, F expert width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.model.expert_rounds import dropped_rows, in_rounds, packed, plan_journey, rounds_for, unpacked
from glm45_jax.model.layers import recomputed
from glm45_jax.model.quantized import is_quantized, values_and_scales
from glm45_jax.parallel import local
from glm45_jax.parallel.sharding import as_axes, rules_of
from pallas_kernels import fused_moe, grouped_matmul, grouped_swiglu
from pallas_kernels.residuals import keep

Answers = tuple[Float[Array, "T D"], Int[Array, ""]]  # of the experts, and how many choices were dropped

_MOST_OF_MEAN = 2  # without chunks given: rows of a buffer, in those of a device's tokens


def routed_experts(
    x: Float[Array, "T D"],
    indices: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    experts: Any,
    config: ModelConfig,
    layer: Array | None = None,
) -> Answers:
    """sum_i weight_i * expert_i(x) over each token's experts; only the routed work is done."""
    matrices = _matrices(experts, x.dtype)
    axes = local.live(as_axes(rules_of(config)["experts"]))
    travels = _travels(x, axes, config)
    run = _by_all_to_all if travels else _by_all_gather
    step = recomputed(functools.partial(run, config=config, axes=axes))
    chunks = 1 if travels else _chunks(x.shape[0], axes, config)
    if chunks == 1:
        return step(x, indices, weights, matrices, layer)

    def chunk(dropped: Array, arrays: tuple[Array, ...]) -> tuple[Array, Array]:
        answers, more = step(*arrays, matrices, layer)
        return dropped + more, answers

    split = tuple(a.reshape(chunks, -1, a.shape[1]) for a in (x, indices, weights))
    dropped, answers = jax.lax.scan(chunk, jnp.int32(0), split)
    return answers.reshape(x.shape), dropped


def few_tokens(x, indices, weights, experts, config: ModelConfig, layer=None) -> Answers:
    """`routed_experts` of decoding: one op that reads the chosen experts' weights where they lie."""
    matrices = _matrices(experts, x.dtype)
    axes = local.live(as_axes(rules_of(config)["experts"]))
    how = {"layer": layer, "transpose_rhs": True, "implementation": config.implementation}
    if axes:
        how["expert_offset"] = _first_expert(axes, config)
    matrices, scales = values_and_scales(matrices)
    how |= dict(zip(("gate_scale", "up_scale", "down_scale"), scales))
    everyone = tuple(local.gather(a, axes, axis=0) for a in (x, indices, weights))
    out = fused_moe(everyone[0], *matrices, *everyone[1:], **how)
    return _to_their_devices(out, x, axes), jnp.int32(0)


def _matrices(experts: Any, dtype: Any) -> tuple[Any, ...]:
    """gate, up and down; what is quantised stays so."""
    each = (w.get_value() for w in (experts.gate, experts.up, experts.down))
    return tuple(w if is_quantized(w) else w.astype(dtype) for w in each)


def _travels(x: Float[Array, "T D"], axes: tuple[str, ...], config: ModelConfig) -> bool:
    """Whether rows travel one by one; not where devices of the group have the same tokens."""
    if not axes or local.varying_over(x, axes) != axes or config.parallel.dispatch == "all_gather":
        return False
    return config.parallel.dispatch == "all_to_all" or 2 * local.count(axes) >= config.num_experts_per_tok


def _chunks(tokens: int, axes: tuple[str, ...], config: ModelConfig) -> int:
    """Into how many chunks the tokens are cut: as few as keep the worst case's rows to twice the mean of all."""
    devices, top_k = local.count(axes), config.num_experts_per_tok
    if config.parallel.expert_chunks is not None:
        return math.gcd(config.parallel.expert_chunks, tokens)
    wanted = math.ceil(devices * min(top_k, config.n_routed_experts // devices) / (_MOST_OF_MEAN * top_k))
    return next(n for n in range(min(wanted, tokens), tokens + 1) if tokens % n == 0)


# --- all_gather ------------------------------------------------------------------------------------------------------


def _by_all_gather(x, indices, weights, matrices, layer, *, config: ModelConfig, axes: tuple[str, ...]) -> Answers:
    """Also the way of one device, which has every expert and gathers nothing."""
    everyone, chosen, weights = (local.gather(a, axes, axis=0) for a in (x, indices, weights))
    here = config.n_routed_experts // local.count(axes)
    top_k = chosen.shape[1]
    number = chosen.reshape(-1) - _first_expert(axes, config)
    number = jnp.where((number >= 0) & (number < here), number, here)  # those of other devices come last
    order = keep(jnp.argsort(number, stable=True))  # routed rows sorted by expert
    place = keep(jnp.argsort(order))  # where each (token, choice) went
    sizes = keep(jnp.bincount(number, length=here + 1)[:here].astype(jnp.int32))
    order = order[: everyone.shape[0] * min(top_k, here)]

    rows = _dispatch(everyone, order, place, top_k)
    answers = _mlps(rows, _permute(weights.reshape(-1), order, place), matrices, sizes, layer, config)
    out = _sum_of_choices(_permute(answers, place, order), top_k)
    return _to_their_devices(out, x, axes), jnp.int32(0)


def _first_expert(axes: tuple[str, ...], config: ModelConfig) -> Int[Array, ""]:
    return local.index(axes) * (config.n_routed_experts // local.count(axes))


def _to_their_devices(out: Float[Array, "nT D"], x: Float[Array, "T D"], axes: tuple[str, ...]) -> Float[Array, "T D"]:
    """The devices' answers summed, each device its own tokens'."""
    own = local.varying_over(x, axes)
    shared = tuple(name for name in axes if name not in own)
    return local.total(local.scatter_total(out, own, axis=0), shared)


# --- all_to_all ------------------------------------------------------------------------------------------------------


def _by_all_to_all(x, indices, weights, matrices, layer, *, config: ModelConfig, axes: tuple[str, ...]) -> Answers:
    top_k, number = indices.shape[1], indices.reshape(-1)
    order = keep(jnp.argsort(number, stable=True))
    place = keep(jnp.argsort(order))
    sizes = keep(jnp.bincount(number, length=config.n_routed_experts).astype(jnp.int32))
    journey = plan_journey(sizes, axes)
    plan = rounds_for(number.size, axes, config.parallel.expert_chunks, config.parallel.expert_capacity)
    rows, weights = _dispatch(packed(x), order, place, top_k), _permute(weights.reshape(-1), order, place)

    def experts(rows, weights, matrices, groups, layer):
        return _mlps(rows, weights, matrices, groups, layer, config)

    answers = in_rounds(experts, plan, rows, weights, matrices, journey, layer)
    return unpacked(_sum_of_choices(_permute(answers, place, order), top_k)), dropped_rows(journey, plan)


# --- rows ------------------------------------------------------------------------------------------------------------


def _mlps(rows, weights, matrices, sizes, layer, config: ModelConfig) -> Float[Array, "R D"]:
    """The weighted answers of rows sorted by expert. The weight is multiplied before `down`: then the answers need not
    wait for the backward pass."""
    (gate, up, down), (gate_scale, up_scale, down_scale) = values_and_scales(matrices)
    how = {"transpose_rhs": True, "layer": layer, "implementation": config.implementation}
    scales = {"gate_scale": gate_scale, "up_scale": up_scale}
    keep_products = config.remat == "none" and not local.live()
    hidden = grouped_swiglu(rows, gate, up, sizes, keep_products=keep_products, **scales, **how)
    weighted = (hidden.astype(jnp.float32) * weights[:, None]).astype(hidden.dtype)
    return grouped_matmul(weighted, down, sizes, rhs_scale=down_scale, **how)


def _sum_of_choices(answers: Float[Array, "M ..."], top_k: int) -> Float[Array, "T ..."]:
    return answers.reshape(-1, top_k, *answers.shape[1:]).astype(jnp.float32).sum(1).astype(answers.dtype)


# Dispatch and permutation are gathers both ways: XLA would derive a scatter-add from a gather, slow everywhere. Of the
# rows sorted by expert all or only the first R are wanted; a place past them reads zero.


def _rows_at(x: Array, place: Int[Array, " M"], fewer: bool) -> Array:
    return x.at[place].get(mode="fill", fill_value=0) if fewer else x[place]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(
    x: Float[Array, "T ..."], order: Int[Array, " R"], place: Int[Array, " M"], top_k: int
) -> Float[Array, "R ..."]:
    """Each token's row once per chosen expert, sorted by expert."""
    return x[order // top_k]


def _dispatch_bwd(top_k, residuals, dout):
    order, place = residuals
    by_token = _rows_at(dout, place, fewer=order.size < place.size)
    return _sum_of_choices(by_token, top_k), _no_gradient(order), _no_gradient(place)


_dispatch.defvjp(lambda x, order, place, top_k: (_dispatch(x, order, place, top_k), (order, place)), _dispatch_bwd)


@jax.custom_vjp
def _permute(x: Float[Array, "M ..."], order: Int[Array, " R"], back: Int[Array, " M"]) -> Float[Array, "R ..."]:
    """x[order], where `back` is the inverse of `order`."""
    return _rows_at(x, order, fewer=x.shape[0] < order.size)


_permute.defvjp(
    lambda x, order, back: (_permute(x, order, back), (order, back)),
    lambda residuals, dout: (
        _rows_at(dout, residuals[1], fewer=dout.shape[0] < residuals[1].size),
        *map(_no_gradient, residuals),
    ),
)


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)
