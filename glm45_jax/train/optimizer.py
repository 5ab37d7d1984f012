"""The optimizer of GLM-4.5: Muon for every matrix, AdamW for embeddings, norms and biases, cosine schedule.

Groups follow from the logical axes under which the model declares its parameters, never from their number of
dimensions: a stack of experts [L, E, F, D] is L times E matrices, an embedding [V, D] is no matrix at all.

  muon        matrices: attention, MLPs, each expert of each layer, router, MTP projection and (`muon_head`) the head
  adamw       embeddings and, without `muon_head`, the heads; with weight decay, as Megatron decays whatever is not 1-D
  adamw_1d    norm scales and biases, without weight decay
  frozen      the router's selection bias: the loss-free balance rule alone moves it (`train/step.py`)

Source: arXiv 2508.06471 section 2.4 (Muon with N = 5, momentum 0.95, update RMS 0.2, weight decay 0.1). Muon's
direction itself, and how devices share the work for it, is in `train/muon.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model import param_axes, param_shardings
from glm45_jax.train.muon import scale_by_muon

Group = Literal["muon", "adamw", "adamw_1d", "frozen"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule. The defaults are the paper's, and common values where it is silent."""

    name: Literal["muon", "adamw"] = "muon"  # adamw: the matrices too
    learning_rate: float = 2.5e-4  # at the peak, for both groups
    min_learning_rate: float = 2.5e-5  # at the end of the cosine
    warmup_steps: int = 0  # linear from 0
    decay_steps: int | None = None  # where the cosine ends, counted from step 0; None: with the run
    warmup_tokens: int | None = None  # both by tokens instead: for batches that grow, and stages of several lengths
    decay_tokens: int | None = None
    weight_decay: float = 0.1  # decoupled; not on norms and biases
    clip_norm: float | None = 1.0  # of the gradient over all parameters
    muon_head: bool = True  # False: the output head is AdamW's
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_dtype: Literal["float32", "bfloat16"] | None = None  # None: float32 on CPU, bfloat16 on TPU and GPU
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # of Muon's state
    adam_dtype: Literal["float32", "bfloat16"] = "float32"  # of AdamW's state
    update_rms: float = 0.2  # of a Muon update, so that both groups share a learning rate
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        checks = [
            (self.name in ("muon", "adamw"), f"name is {self.name!r}, expected 'muon' or 'adamw'"),
            (self.learning_rate > 0, f"learning_rate is {self.learning_rate}, it must be positive"),
            (
                0 <= self.min_learning_rate <= self.learning_rate,
                f"min_learning_rate {self.min_learning_rate} lies outside 0..learning_rate ({self.learning_rate})",
            ),
            (self.warmup_steps >= 0, "warmup_steps is negative"),
            (self.decay_steps is None or self.decay_steps >= 1, "decay_steps must be at least 1"),
            (self.warmup_tokens is None or self.warmup_tokens >= 0, "warmup_tokens is negative"),
            (self.decay_tokens is None or self.decay_tokens >= 1, "decay_tokens must be at least 1"),
            (
                not self.by_tokens or not (self.warmup_steps or self.decay_steps),
                "the schedule is given by steps and by tokens; choose one of them",
            ),
            (self.weight_decay >= 0, "weight_decay is negative"),
            (self.clip_norm is None or self.clip_norm > 0, "clip_norm must be positive, or null for no clipping"),
            (0 <= self.momentum < 1, "momentum lies outside 0..1"),
            (0 <= self.b1 < 1 and 0 <= self.b2 < 1, "b1 and b2 must lie in 0..1"),
            (self.ns_steps >= 1, "ns_steps must be at least 1"),
        ]
        problems = [message for ok, message in checks if not ok]
        if problems:
            raise UserError("optimizer: " + "; ".join(problems))

    @property
    def by_tokens(self) -> bool:
        """Whether the learning rate follows the tokens seen rather than the steps."""
        return self.warmup_tokens is not None or self.decay_tokens is not None


def make_schedule(
    config: OptimizerConfig, steps: int, milestones: Sequence[tuple[int, int]] | None = None
) -> optax.Schedule:
    """Learning rate by step: linear from 0 over the warm-up, then a cosine that ends where the decay does, or the run.

    Args:
      steps: where the run ends.
      milestones: (step, tokens seen before it) between which tokens grow evenly; for a schedule by tokens.
    """
    if not config.by_tokens:
        return _warmup_cosine(config, config.warmup_steps, config.decay_steps or steps, "steps")
    if not milestones:
        raise UserError("optimizer: a schedule by tokens needs to know how many a step has; give warmup_steps instead")
    at, seen = np.array(milestones, np.float64).T
    end = config.decay_tokens or int(seen[-1])
    by_share = _warmup_cosine(config, config.warmup_tokens or 0, end, "tokens", scale=end)

    def schedule(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return by_share(jnp.interp(jnp.asarray(step, jnp.float32), jnp.asarray(at), jnp.asarray(seen / end)))

    return schedule


def _warmup_cosine(config: OptimizerConfig, warmup: int, end: int, unit: str, scale: int = 1) -> optax.Schedule:
    """By places in `unit` divided by `scale`."""
    if warmup >= end:
        raise UserError(
            f"optimizer.warmup_{unit} ({warmup}) reaches the end of the schedule ({end} {unit}); "
            "make it smaller, or the run longer"
        )
    peak, last, rise, length = config.learning_rate, config.min_learning_rate, warmup / scale, end / scale

    def schedule(place: jax.typing.ArrayLike) -> jax.Array:
        place = jnp.asarray(place, jnp.float32)
        share = jnp.clip((place - rise) / (length - rise), 0, 1)
        cosine = last + (peak - last) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        return jnp.where(place < rise, peak * place / rise, cosine) if rise else cosine

    return schedule


def make_optimizer(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    steps: int,
    milestones: Sequence[tuple[int, int]] | None = None,
) -> optax.GradientTransformation:
    """The whole update rule for a params tree of `config`: clipping, Muon and AdamW, weight decay, learning rate.

    Arithmetic is float32 whatever the parameters' dtype (Muon's iterations: `ns_dtype`), and so is the state unless
    said otherwise. Muon's work is divided over the mesh in force. `steps` and `milestones`: see `make_schedule`.
    """
    tail = optax.scale_by_learning_rate(make_schedule(optimizer, steps, milestones))
    decay = optax.add_decayed_weights(optimizer.weight_decay)
    adam = _stored_as(optimizer.adam_dtype, optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps))
    adam = optax.chain(_scaled(), adam)
    muon = scale_by_muon(
        optimizer.momentum,
        nesterov=optimizer.nesterov,
        ns_steps=optimizer.ns_steps,
        update_rms=optimizer.update_rms,
        ns_dtype=optimizer.ns_dtype,
        momentum_dtype=optimizer.momentum_dtype,
        shardings=functools.partial(param_shardings, config),
    )
    rules: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(muon, decay, tail),
        "adamw": optax.chain(adam, decay, tail),
        "adamw_1d": optax.chain(adam, tail),
        "frozen": optax.set_to_zero(),
    }
    by_group = optax.partition(rules, parameter_groups(config, optimizer))
    return _clipped(optimizer.clip_norm, by_group)


def parameter_groups(config: ModelConfig, optimizer: OptimizerConfig | None = None) -> dict[str, Any]:
    """The tree of parameters with the name of each one's group in its place."""
    optimizer = optimizer or OptimizerConfig()

    def group(path: tuple[Any, ...], axes: tuple[str | None, ...]) -> Group:
        return _group(tuple(k.key for k in path), axes, optimizer)

    return jax.tree_util.tree_map_with_path(group, param_axes(config), is_leaf=lambda x: isinstance(x, tuple))


def _group(path: tuple[str, ...], axes: tuple[str | None, ...], optimizer: OptimizerConfig) -> Group:
    if path[-2:] == ("router", "bias"):
        return "frozen"
    if "vocab" in axes:
        is_head = "head" in path
        return "muon" if is_head and optimizer.muon_head and optimizer.name == "muon" else "adamw"
    batch = _stacking_axes(axes)
    dims = len(axes) - batch
    if dims == 1:
        return "adamw_1d"
    if dims != 2:
        raise ValueError(f"{'/'.join(path)} with axes {axes} is neither vector nor matrix: declare its optimizer group")
    return "muon" if optimizer.name == "muon" else "adamw"


def _stacking_axes(axes: tuple[str | None, ...]) -> int:
    """How many leading axes count parameters of a kind (layers, experts) rather than belong to one."""
    batch = 1 if axes[:1] == ("layers",) else 0
    # The router's matrix [E, D] has an expert axis too, as its rows.
    return batch + (1 if axes[batch : batch + 1] == ("experts",) and len(axes) - batch == 3 else 0)


def _stored_as(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the floats of `inner`'s state as `dtype`; it computes in float32."""

    def cast(state: Any, dtype: str) -> Any:
        floats = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(dtype) if floats(x) else x, state)

    def init(params: optax.Params) -> optax.OptState:
        return cast(inner.init(optax.tree.cast(params, jnp.float32)), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _scaled() -> optax.GradientTransformationExtraArgs:
    """Gradients in float32, times `scale`."""

    def update(updates: Any, state: Any, params: Any = None, *, scale: Any = 1.0, **_: Any) -> Any:
        return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _clipped(clip_norm: float | None, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Clips by the norm over all gradients, in float32 whatever the dtypes of gradients and parameters.

    `inner` is told a factor instead of given clipped gradients: those would be a second copy of the largest leaves.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        scale = jnp.ones(())
        if clip_norm is not None:
            norm = optax.global_norm(optax.tree.cast(updates, jnp.float32))
            scale = clip_norm / jnp.maximum(norm, clip_norm)
        return inner.update(updates, state, optax.tree.cast(params, jnp.float32), scale=scale)

    return optax.GradientTransformation(inner.init, update)
