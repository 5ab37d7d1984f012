"""One step of training as a pure function: gradients over micro-batches, optimizer, loss-free balance of the experts.

Axes: A micro-batches, B batch, S sequence, Lm MoE layers (the MTP layer's behind them), E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from glm45_jax.model import Params, init_params
from glm45_jax.model.over_mesh import layout_of, shard_map
from glm45_jax.model.params import param_specs
from glm45_jax.model.quantized import refuse_quantized
from glm45_jax.parallel import local
from glm45_jax.train.config import TrainConfig
from glm45_jax.train.loss import Batch, Rows, Totals, partial_loss, rows_of_batch, totals_of
from glm45_jax.train.optimizer import make_optimizer
from glm45_jax.train.spikes import NormTrack, init_track, judge
from glm45_jax.train.timeline import learning_rate, milestones

Metrics = dict[str, Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "opt_state", "step", "skipped", "norms", "rng"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; a pytree."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]  # batches seen
    skipped: Int[Array, ""]  # of them, without an update because their gradient was not finite, or a spike
    norms: NormTrack  # of gradients, to tell spikes
    rng: jax.Array  # for losses that draw at random, by fold_in of the step; pre-training draws nothing


def init_state(config: TrainConfig, params: Params | None = None) -> TrainState:
    """The state before the first step, with fresh parameters (by `config.seed`) or the given ones. Pure."""
    init_key, rng = jax.random.split(jax.random.key(config.seed))
    params = init_params(config.model, init_key) if params is None else params
    refuse_quantized(params, "training")
    opt_state = _optimizer(config).init(params)
    # Two arrays, not one twice: a donated state must not hold a buffer in two places.
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), init_track(), rng)


def train_step(state: TrainState, batch: Batch, config: TrainConfig) -> tuple[TrainState, Metrics]:
    """Gradients of one batch and the update they give. Pure; jit it with `config` static and `state` donated.

    A gradient with an infinite or undefined value, or a spike (`config.skip_spikes`), changes nothing but counts.

    Args:
      config: with the settings of this step (`timeline.at`) where they change in the course of a run.
      batch: [B, S] arrays as `loss_fn` takes them, cut into `config.accumulation` micro-batches. All means are over the
        whole batch, so that the micro-batches change nothing but rounding.

    Returns:
      The next state, and metrics: `loss`, `cross_entropy`, `mtp_cross_entropy`, `balance_loss`, `grad_norm` (before
      clipping), `learning_rate`, `tokens` (targets), `expert_load` [Lm (+1), E], `load_max_over_mean` of the worst
      layer, `dropped` (choices of experts that found no room; 0 without `parallel.expert_capacity`), `skipped`.
    """
    gradient, metrics = gradients(state.params, batch, config)
    norm = optax.global_norm(optax.tree.cast(gradient, jnp.float32))
    updates, opt_state = _optimizer(config).update(gradient, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    if "expert_load" in metrics and config.bias_update_rate:
        params = balance_experts(params, metrics["expert_load"], config.bias_update_rate)

    taken, norms = judge(state.norms, norm, metrics["loss"], config.skip_spikes)
    old = state.params, state.opt_state
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(taken, new, old), (params, opt_state), old)
    rate = learning_rate(config)(state.step - state.skipped)
    skipped = state.skipped + ~taken
    metrics |= {"grad_norm": norm, "learning_rate": jnp.asarray(rate, jnp.float32), "skipped": skipped}
    new = TrainState(params, opt_state, state.step + 1, skipped, norms, state.rng)
    return new, metrics


def gradients(params: Params, batch: Batch, config: TrainConfig) -> tuple[Params, Metrics]:
    """The gradient of the loss over the whole batch, one micro-batch at a time, and the metrics of the batch.

    With a mesh in force every device computes its rows' part, and gradients come out cut as the parameters are.
    """
    rows = rows_of_batch(batch)
    totals = totals_of(rows)
    run = functools.partial(_gradients_here, config=config)
    layout = layout_of(rows.tokens.shape)
    if layout is None:
        gradient, metrics = run(params, rows, totals)
    else:
        layout.check_batch(config.accumulation)
        specs, everywhere = param_specs(config.model, layout.mesh), PartitionSpec()
        in_specs = (specs, *jax.tree.map(lambda _: layout.spec(), (rows,)), everywhere)
        gradient, metrics = shard_map(run, in_specs, (specs, everywhere))(params, layout.arrange_all(rows), totals)
    metrics["tokens"] = totals.tokens
    if "expert_load" in metrics:
        load = metrics["expert_load"]
        metrics["load_max_over_mean"] = jnp.max(load.max(1) / jnp.maximum(load.mean(1), 1e-9))
    return gradient, metrics


def _gradients_here(params: Params, rows: Rows, totals: Totals, config: TrainConfig) -> tuple[Params, Metrics]:
    """`gradients` of this device's rows, summed over the devices that hold the same piece of a parameter."""
    weights = config.mtp_loss_weight, config.balance_loss_weight
    everyones = local.spread(params, local.live())  # so that each device's gradients are its own until all are summed

    @functools.partial(jax.jit, inline=True)  # so that it is traced once, though its shapes are asked for first
    def micro(everyones: Params, part: Rows, totals: Totals) -> tuple[Params, Metrics]:
        grad = jax.value_and_grad(partial_loss, has_aux=True)
        (loss, metrics), gradient = grad(everyones, config.model, part, totals, *weights)
        return gradient, {"loss": loss, **metrics}

    if config.accumulation == 1:
        gradient, metrics = micro(everyones, rows, totals)
    else:
        split = jax.tree.map(lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), rows)

        def add(sums: Any, part: Rows) -> tuple[Any, None]:
            new = micro(everyones, part, totals)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, new), None

        shapes = jax.eval_shape(micro, everyones, jax.tree.map(lambda x: x[0], split), totals)
        none = local.spread(jax.tree.map(_zeros, shapes), local.live())
        (gradient, metrics), _ = jax.lax.scan(add, none, split)
    copies = lambda x: tuple(name for name in local.live() if name not in local.varying(x))  # noqa: E731
    gradient = jax.tree.map(lambda g, x: local.total(g, copies(x)), gradient, params)
    return gradient, local.total(metrics)


def balance_experts(params: Params, load: Int[Array, "Lm E"], rate: float) -> Params:
    """Loss-free balance: b_i <- b_i + rate * sign(mean(load) - load_i) for every MoE layer, the MTP layer's included.

    Source: arXiv 2408.15664; GLM-4.5 uses rate 0.001 for the first 15T tokens and 0 after.
    """
    step: Float[Array, "Lm E"] = rate * jnp.sign(load.mean(1, keepdims=True) - load)
    layers = params["moe_layers"]["moe"]["router"]["bias"].shape[0] if "moe_layers" in params else 0
    if layers:
        params = _add_at(params, ("moe_layers", "moe", "router", "bias"), step[:layers])
    if "mtp" in params:
        params = _add_at(params, ("mtp", "block", "moe", "router", "bias"), step[layers])
    return params


def _add_at(tree: Params, path: tuple[str, ...], value: Array) -> Params:
    """`tree` with `value` added to the leaf at `path`; the tree given stays as it is."""
    key, *rest = path
    return {**tree, key: _add_at(tree[key], tuple(rest), value) if rest else tree[key] + value}


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    # Sums of bfloat16 gradients are kept in float32.
    return jnp.zeros(like.shape, jnp.float32 if jnp.issubdtype(like.dtype, jnp.floating) else like.dtype)


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    return make_optimizer(config.model, config.optimizer, config.steps, milestones(config))
