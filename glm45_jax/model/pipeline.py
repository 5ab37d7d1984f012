"""The MoE layers as a circular pipeline over the mesh axis `pipeline`; all else of the model is spread over it as over
data.

Between the stages' rounds nothing is unbalanced: embedding, dense layers, MTP layer, head and loss are each device's
for its own rows, and the pipeline takes the rows of all its devices as microbatches. Parameters lie at rest as for
FSDP, whatever the number of stages; at the start of a step one all-to-all brings each stage its layers, and its
transpose takes the gradients back.

Layers are cut into P r groups of n, in order; stage s has the groups s, s + P, …, and a microbatch goes round r times.
Where L is not P r n, the last layers are padding, which is skipped. At step t stage s works on item t - s of the M r
items (round, microbatch); it is idle in P - 1 of M r + P - 1 steps.

Axes: P stages, r rounds, n layers of a group, L layers, M microbatches, q = M / P of them from each device, b rows of
one, S tokens, D model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model.params import Params, layer_axes
from glm45_jax.parallel import local
from glm45_jax.parallel.sharding import as_axes, rules_of

AXIS = "pipeline"
# h, a layer's parameters (cut over all axes but this one), a microbatch's rows -> h and a summary, which is summed
Layer = Callable[[Float[Array, "b S D"], Params, Any], tuple[Float[Array, "b S D"], Any]]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Sizes of a pipeline."""

    stages: int
    rounds: int
    layers: int
    microbatches: int

    @property
    def group(self) -> int:
        """Layers of a group, padding included."""
        return -(-self.layers // (self.stages * self.rounds))

    @property
    def steps(self) -> int:
        return self.microbatches * self.rounds + self.stages - 1

    @property
    def waiting(self) -> int:
        """Microbatches that wait for their next round."""
        return self.microbatches - self.stages if self.rounds > 1 else 0

    def item(self, step: Array, stage: Array) -> tuple[Bool[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Whether a stage works at a step, in which round, on which microbatch."""
        item = step - stage
        works = (item >= 0) & (item < self.microbatches * self.rounds)
        item = jnp.clip(item, 0, self.microbatches * self.rounds - 1)
        return works, item // self.microbatches, item % self.microbatches


class Carry(NamedTuple):
    incoming: Float[Array, "b S D"]  # what the stage before made in the last step
    waiting: Float[Array, "w b S D"]  # on the first stage: for their next round
    stream: Float[Array, "q b S D"]  # microbatches on their way to the first stage, and from the last one home


def schedule_of(config: ModelConfig, rows: int) -> Schedule:
    """The schedule for `rows` rows on each device.

    Raises:
      UserError: numbers that don't divide.
    """
    stages = local.count(AXIS)
    microbatches = config.parallel.microbatches or stages
    if microbatches % stages or rows * stages % microbatches:
        raise UserError(
            f"a pipeline of {stages} stages with {rows} rows on each device cannot have {microbatches} microbatches: "
            f"take a multiple of {stages} that divides {rows * stages} (parallel.microbatches)"
        )
    return Schedule(stages, config.parallel.pipeline_repeats, config.num_moe_layers, microbatches)


def run_pipeline(
    layer: Layer, stack: Params, h: Float[Array, "B S D"], rows: Any, config: ModelConfig
) -> tuple[Float[Array, "B S D"], Any]:
    """All MoE layers over this device's rows, by all stages.

    Args:
      stack: the layers' parameters [L, …] as they lie at rest.
      rows: a tree of arrays [B, …] that the layers read beside h.

    Returns:
      h after the last layer, and this stage's part of the summaries' sums over microbatches, [L, …] each.
    """
    plan = schedule_of(config, h.shape[0])
    own, stage = _own_layers(stack, config, plan), local.index(AXIS)
    cut = lambda x, m: x.reshape(m, -1, *x.shape[1:])  # noqa: E731
    all_rows = jax.tree.map(lambda x: cut(local.gather(x, AXIS, axis=0), plan.microbatches), rows)
    stream = cut(h, plan.microbatches // plan.stages)
    around, home = ([(s, (s + by) % plan.stages) for s in range(plan.stages)] for by in (1, -1))

    def step(carry: Carry, t: Array) -> tuple[Carry, Any]:
        works, round_, number = plan.item(t, stage)
        slot, place = t % stream.shape[0], t % max(plan.waiting, 1)
        queued = carry.waiting[place] if plan.waiting else carry.incoming
        first = jnp.where(round_ == 0, carry.stream[slot], queued)
        x = jnp.where(stage == 0, first, carry.incoming)
        waiting = carry.waiting.at[place].set(carry.incoming) if plan.waiting else carry.waiting
        pick = lambda tree, i: jax.tree.map(lambda a: a[i], tree)  # noqa: E731
        y, summary = _group(layer, pick(own, round_), x, pick(all_rows, number), works, round_, stage, plan)
        moved = jax.lax.ppermute(carry.stream[slot], AXIS, home)
        moved = jnp.where(stage == plan.stages - 1, y, moved)  # the last stage's are done, after the last round
        sent = jax.lax.ppermute(y, AXIS, around)
        return Carry(sent, waiting, carry.stream.at[slot].set(moved)), (round_, summary)

    empty = jnp.zeros((plan.waiting, *stream.shape[1:]), h.dtype)
    start = local.spread(Carry(jnp.zeros_like(stream[0]), empty, stream), local.live())
    end, (rounds, summaries) = jax.lax.scan(step, start, jnp.arange(plan.steps))
    # what the last stage put down at step t has been moved on since by one device for each time its slot came up
    out = jnp.roll(end.stream, -((plan.steps - plan.microbatches * plan.rounds) % stream.shape[0]), axis=0)
    return out.reshape(h.shape), jax.tree.map(lambda x: _by_layer(x, rounds, stage, plan), summaries)


def _group(layer, params, x, rows, works, round_, stage, plan: Schedule):
    """One group of layers; a layer that is padding, or an idle stage, does nothing."""
    first = (round_ * plan.stages + stage) * plan.group
    shapes = jax.eval_shape(layer, x, jax.tree.map(lambda a: a[0], params), rows)[1]

    def one(x: Array, numbered: tuple[Array, Params]) -> tuple[Array, Any]:
        number, params = numbered
        everywhere = lambda tree: local.spread(tree, local.live())  # noqa: E731
        run = lambda: everywhere(layer(x, params, rows))  # noqa: E731
        skip = lambda: everywhere((x, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)))  # noqa: E731
        return jax.lax.cond(works & (first + number < plan.layers), run, skip)

    return jax.lax.scan(one, x, (jnp.arange(plan.group), params))


def _own_layers(stack: Params, config: ModelConfig, plan: Schedule) -> Params:
    """This stage's layers [r, n, …], put together over the pipeline's axis, from all layers' pieces [L, …]."""
    rules, total = rules_of(config), plan.stages * plan.rounds * plan.group

    def one(x: Array, axes: tuple[str | None, ...]) -> Array:
        x = jnp.pad(x, [(0, total - plan.layers)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape(plan.rounds, plan.stages, plan.group, *x.shape[1:])
        cut = [i for i, axis in enumerate(axes) if axis and AXIS in as_axes(rules[axis])]
        if not cut:
            return x[:, local.index(AXIS)]
        if "router" not in axes:
            x = x.astype(config.dtype)
        return jax.lax.all_to_all(x, AXIS, split_axis=1, concat_axis=3 + cut[0], tiled=True)[:, 0]

    return jax.tree.map(one, stack, layer_axes(config, "moe_layers"))


def _by_layer(summaries: Array, rounds: Int[Array, " steps"], stage: Array, plan: Schedule) -> Array:
    """Sums over this stage's microbatches, from [steps, n, …] to [L, …]; zero for other stages' layers."""
    is_round = (rounds == jnp.arange(plan.rounds)[:, None]).astype(summaries.dtype)
    sums = jnp.einsum("rt,t...->r...", is_round, summaries)
    is_own = (jnp.arange(plan.stages) == stage).astype(sums.dtype)
    placed = jnp.einsum("p,rn...->rpn...", is_own, sums)
    return placed.reshape(math.prod(placed.shape[:3]), *placed.shape[3:])[: plan.layers]
