"""The optimizer of GLM-4.5: Muon for every matrix, AdamW for embeddings, norms and biases, cosine schedule.

Groups follow from the logical axes under which the model declares its parameters, never from their number of
dimensions: a stack of experts [L, E, F, D] is L times E matrices, an embedding [V, D] is no matrix at all.

  muon        matrices: attention, MLPs, each expert of each layer, router, MTP projection and (`muon_head`) the head
  adamw       embeddings and, without `muon_head`, the heads; with weight decay, as Megatron decays whatever is not 1-D
  adamw_1d    norm scales and biases, without weight decay
  frozen      the router's selection bias: the loss-free balance rule alone moves it (`train/step.py`)

Sources: arXiv 2508.06471 section 2.4 (Muon with N = 5, momentum 0.95, update RMS 0.2, weight decay 0.1), arXiv
2502.16982 (update RMS), optax.contrib.muon (the momentum's bias correction; this agrees with it to rounding).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model import param_axes

Group = Literal["muon", "adamw", "adamw_1d", "frozen"]
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at zero (Jordan, 2024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule. The defaults are the paper's, and common values where it is silent."""

    name: Literal["muon", "adamw"] = "muon"  # adamw: the matrices too
    learning_rate: float = 2.5e-4  # at the peak, for both groups
    min_learning_rate: float = 2.5e-5  # at the end of the cosine
    warmup_steps: int = 0  # linear from 0
    decay_steps: int | None = None  # where the cosine ends, counted from step 0; None: with the run
    weight_decay: float = 0.1  # decoupled; not on norms and biases
    clip_norm: float | None = 1.0  # of the gradient over all parameters
    muon_head: bool = True  # False: the output head is AdamW's
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
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
            (self.weight_decay >= 0, "weight_decay is negative"),
            (self.clip_norm is None or self.clip_norm > 0, "clip_norm must be positive, or null for no clipping"),
            (0 <= self.momentum < 1, "momentum lies outside 0..1"),
            (0 <= self.b1 < 1 and 0 <= self.b2 < 1, "b1 and b2 must lie in 0..1"),
            (self.ns_steps >= 1, "ns_steps must be at least 1"),
        ]
        problems = [message for ok, message in checks if not ok]
        if problems:
            raise UserError("optimizer: " + "; ".join(problems))


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then a cosine that ends at `decay_steps` or `steps`."""
    end = config.decay_steps or steps
    if config.warmup_steps >= end:
        raise UserError(
            f"optimizer.warmup_steps ({config.warmup_steps}) reaches the end of the schedule ({end} steps); "
            "make it smaller, or the run longer"
        )
    peak, last = config.learning_rate, config.min_learning_rate
    if not config.warmup_steps:
        return optax.cosine_decay_schedule(peak, end, alpha=last / peak)
    return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, end, end_value=last)


def make_optimizer(config: ModelConfig, optimizer: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The whole update rule for a params tree of `config`: clipping, Muon and AdamW, weight decay, learning rate.

    State and arithmetic are float32 whatever the parameters' dtype. `steps` is the length of the run, for the schedule.
    """
    tail = optax.scale_by_learning_rate(make_schedule(optimizer, steps))
    decay = optax.add_decayed_weights(optimizer.weight_decay)
    adam = optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps)
    muon = scale_by_muon(
        optimizer.momentum,
        nesterov=optimizer.nesterov,
        ns_steps=optimizer.ns_steps,
        update_rms=optimizer.update_rms,
    )
    rules: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(muon, decay, tail),
        "adamw": optax.chain(adam, decay, tail),
        "adamw_1d": optax.chain(adam, tail),
        "frozen": optax.set_to_zero(),
    }
    by_group = optax.partition(rules, parameter_groups(config, optimizer))
    clip = optax.identity() if optimizer.clip_norm is None else optax.clip_by_global_norm(optimizer.clip_norm)
    return _in_float32(optax.chain(clip, by_group))


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


class MuonState(NamedTuple):
    """Steps taken, and the running mean of gradients."""

    count: jax.typing.ArrayLike
    momentum: optax.Params


def scale_by_muon(
    momentum: float = 0.95, *, nesterov: bool = True, ns_steps: int = 5, update_rms: float = 0.2, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Muon's direction for a tree of matrices [..., out, in], every leading axis a batch of separate matrices.

    The same numbers as `optax.contrib.scale_by_muon` with `MuonDimensionNumbers(-1, -2)` and its scaling by
    `consistent_rms`, in batched products on the arrays as they lie: optax reshapes and transposes each stack before
    and after, which costs a third of the time on CPU.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        count = optax.safe_increment(state.count)
        mean = optax.tree.update_moment(updates, state.momentum, momentum, 1)
        if nesterov:
            ahead = optax.tree.bias_correction(mean, momentum, optax.safe_increment(count))
            now = optax.tree.bias_correction(updates, momentum, count)
            direction = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        else:
            direction = optax.tree.bias_correction(mean, momentum, count)

        def scaled(x: jax.Array) -> jax.Array:
            return update_rms * max(x.shape[-2:]) ** 0.5 * orthogonalize(x, ns_steps, eps)

        return jax.tree.map(scaled, direction), MuonState(count, mean)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: Float[Array, "... out in"], steps: int = 5, eps: float = 1e-8) -> Float[Array, "... out in"]:
    """Brings the singular values of every matrix near 1 by `steps` of the quintic Newton-Schulz iteration.

    Works on the smaller Gram matrix: X (bA + cA^2) with A = X^T X where rows are more than columns, (bA + cA^2) X with
    A = X X^T otherwise. The two give the same result.
    """
    a, b, c = NS_COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + eps)

    def iterate(_: int, x: jax.Array) -> jax.Array:
        gram = jnp.einsum("...ki,...kj->...ij" if tall else "...ik,...jk->...ij", x, x)
        poly = b * gram + c * (gram @ gram)
        return a * x + (x @ poly if tall else poly @ x)

    return jax.lax.fori_loop(0, steps, iterate, x)  # a loop compiles faster than its unrolling, and runs as fast


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on float32 copies: optax gives Adam's second moment the dtype of the parameters otherwise."""

    def cast(tree: Any) -> Any:
        return optax.tree.cast(tree, jnp.float32)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(cast(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return inner.update(cast(updates), state, None if params is None else cast(params))

    return optax.GradientTransformation(init, update)
