"""Experts on several devices: rows travel to the device of their expert, and the answers back, in rounds.

On each device the rows that come in stand in one order: by expert, and for each expert by the device that they come
from, whose rows for one expert are one piece. A round takes the next R places of that order on every device, so that
what arrives is sorted already, a round meets few experts, and buffers are small whatever the router does: uneven loads
take more rounds, and no row is dropped. While one round's rows are multiplied, the next ones arrive and the last
answers return. In the backward pass rows travel anew.

Axes: M rows of a device, R rows of a round, n devices, E experts (e of them on a device), D model, F expert width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from glm45_jax.parallel import local
from glm45_jax.parallel.exchange import Pieces, exchange

# rows sorted by expert [R, D], their weights [R], the matrices, rows of each expert [e], what else -> answers [R, D]
Experts = Callable[..., Float[Array, "R D"]]

_ROUNDS = 2  # of even loads, and of loads an eighth above them
_SLACK = 1.125
_LEAST_ROWS = 1024
_WORD = 4  # bytes


class Journey(NamedTuple):
    """Where the rows of all devices go: [from device, expert]."""

    counts: Int[Array, "n E"]  # rows
    held: Int[Array, "n E"]  # where the first of them stands on its device
    lands: Int[Array, "n E"]  # its place in the order of the expert's device


class Leg(NamedTuple):
    """One round of a journey."""

    there: Pieces
    back: Pieces
    groups: Int[Array, " e"]  # rows of each expert here


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What is static of a journey: rows of a round, rounds at least, rows at most (None: all there are), mesh axes."""

    rows: int
    least: int
    limit: int | None
    axes: tuple[str, ...]


def rounds_for(num_rows: int, axes: tuple[str, ...], rounds: int | None, capacity: float | None) -> Rounds:
    """For devices with `num_rows` rows each: the rows of a round from the rounds that even loads take."""
    limit = None if capacity is None else math.ceil(capacity * num_rows)
    if rounds is None:
        rows = min(max(_LEAST_ROWS, math.ceil(_SLACK * num_rows / _ROUNDS)), num_rows)
    else:
        rows = math.ceil(num_rows / rounds)
    met = num_rows if limit is None else min(num_rows, limit)  # by the busiest device, at least
    rows = min(rows, met)
    return Rounds(rows, math.ceil(met / rows), limit, axes)


def plan_journey(sizes: Int[Array, " E"], axes: tuple[str, ...]) -> Journey:
    """From how many rows this device has for each expert."""
    counts = jax.lax.all_gather(sizes, axes)
    exclusive = lambda a, axis: jnp.cumsum(a, axis) - a  # noqa: E731
    of_experts = exclusive(counts.sum(0).reshape(counts.shape[0], -1), 1).reshape(-1)
    return Journey(counts, exclusive(counts, 1), of_experts + exclusive(counts, 0))


def dropped_rows(journey: Journey, plan: Rounds) -> Int[Array, ""]:
    """Of this device's rows, those past the limit."""
    if plan.limit is None:
        return local.spread_like(jnp.int32(0), journey)
    mine = local.index(plan.axes)
    return jnp.sum(journey.counts[mine] - jnp.clip(plan.limit - journey.lands[mine], 0, journey.counts[mine]))


def in_rounds(
    experts: Experts, plan: Rounds, rows: Float[Array, "M D"], weights: Float[Array, " M"], matrices: Any,
    journey: Journey, more: Any,
) -> Float[Array, "M D"]:  # fmt: skip
    """The experts' answers to a device's rows, which are sorted by expert; zero for rows that are dropped.

    Differentiable in rows, weights and matrices. `more` goes to `experts` as it is; `experts` and `plan` are static.
    """
    return _in_rounds(
        experts, plan, *local.spread_like((rows, weights, matrices, journey, more), rows, journey, matrices)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(experts, plan: Rounds, rows, weights, matrices, journey, more):
    sent, matrices = (_packed(rows), weights), _as_kernels_read(matrices)

    def fetch(number, spare):
        there = _leg(journey, number, plan).there
        return tuple(exchange(x, into, there, plan.axes) for x, into in zip(sent, spare))

    def step(number, carry):
        (arrived, spare), answers, out = carry
        following = fetch(number + 1, spare)
        out = exchange(answers, out, _leg(journey, number - 1, plan).back, plan.axes)
        here, their_weights = arrived
        answers = experts(_rows(here), their_weights, matrices, _leg(journey, number, plan).groups, more)
        return (following, arrived), _packed(answers), out

    buffers = _buffers(sent, plan, rows)
    total = _count(journey, plan)
    start = (fetch(0, buffers), buffers), buffers[0], jnp.zeros_like(sent[0])
    _, answers, out = jax.lax.fori_loop(0, total, step, start)
    return _rows(exchange(answers, out, _leg(journey, total - 1, plan).back, plan.axes))


def _fwd(experts, plan, *args):
    return _in_rounds(experts, plan, *args), args


def _bwd(experts, plan: Rounds, residuals, dout):
    rows, weights, matrices, journey, more = residuals
    sent, matrices = (_packed(rows), weights, _packed(dout)), _as_kernels_read(matrices)

    def fetch(number, spare):
        there = _leg(journey, number, plan).there
        return tuple(exchange(x, into, there, plan.axes) for x, into in zip(sent, spare))

    def send(gradients, into, number):
        back = _leg(journey, number, plan).back
        return tuple(exchange(x, total, back, plan.axes) for x, total in zip(gradients, into))

    def step(number, carry):
        (arrived, spare), gradients, sums, dmatrices = carry
        following = fetch(number + 1, spare)
        sums = send(gradients, sums, number - 1)
        here, their_weights, dhere = arrived
        run = lambda *args: experts(*args, _leg(journey, number, plan).groups, more)  # noqa: E731
        drows, dweights, more_dmatrices = jax.vjp(run, _rows(here), their_weights, matrices)[1](_rows(dhere))
        gradients = _packed(drows), dweights
        return (following, arrived), gradients, sums, jax.tree.map(jnp.add, dmatrices, more_dmatrices)

    buffers = _buffers(sent, plan, rows)
    total = _count(journey, plan)
    *none, dmatrices = jax.tree.map(jnp.zeros_like, (*sent[:2], matrices))
    start = (fetch(0, buffers), buffers), buffers[:2], tuple(none), dmatrices
    _, gradients, sums, dmatrices = jax.lax.fori_loop(0, total, step, start)
    drows, dweights = send(gradients, sums, total - 1)
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (journey, more))
    return _rows(drows), dweights, dmatrices, *no_gradient


_in_rounds.defvjp(_fwd, _bwd)


# A row travels in the form in which XLA for TPU sends it, in tiles that hold no other row's values: of bfloat16 two
# halves one upon the other. In any other form every round would turn all rows into it, and back.


def _packed(rows: Float[Array, "M D"]) -> Float[Array, "M p Dp"]:
    pieces = math.gcd(rows.shape[1], max(1, _WORD // rows.dtype.itemsize))
    return rows.reshape(rows.shape[0], pieces, -1)


def _rows(packed: Float[Array, "M p Dp"]) -> Float[Array, "M D"]:
    return packed.reshape(packed.shape[0], -1)


def _as_kernels_read(matrices: Any) -> Any:
    """Laid out row by row once, and not in every round."""
    return jax.tree.map(lambda w: with_layout_constraint(w, Layout(major_to_minor=tuple(range(w.ndim)))), matrices)


def _buffers(arrays, plan: Rounds, like: Array) -> Any:
    return local.spread_like(tuple(jnp.zeros((plan.rows, *x.shape[1:]), x.dtype) for x in arrays), like)


def _count(journey: Journey, plan: Rounds) -> Int[Array, ""]:
    """Rounds until every device has met all its rows.

    The busiest device has the mean at least: said with `maximum`, so that whoever reads the program (`glm45 plan`)
    knows how many rounds even loads take.
    """
    devices = journey.counts.shape[0]
    most = jnp.max(journey.counts.sum(0).reshape(devices, -1).sum(1))
    most = most if plan.limit is None else jnp.minimum(most, plan.limit)
    return jnp.maximum(plan.least, -(-most // plan.rows))


def _leg(journey: Journey, number: Array, plan: Rounds) -> Leg:
    """Round `number`: what of the pieces falls into its places. Before the first round and after the last, nothing."""
    devices, mine = journey.counts.shape[0], local.index(plan.axes)
    here = journey.counts.shape[1] // devices
    ours = lambda table: jax.lax.dynamic_slice_in_dim(table, mine * here, here, 1)  # noqa: E731  [n, E] -> [n, e]
    first = number * plan.rows
    end = first + plan.rows if plan.limit is None else jnp.minimum(first + plan.rows, plan.limit)
    begins = jnp.maximum(journey.lands, first)
    sent = jnp.maximum(jnp.minimum(journey.lands + journey.counts, end) - begins, 0)
    sent = jnp.where(number < 0, 0, sent)
    passed = jnp.clip(begins - journey.lands, 0, journey.counts)
    at, from_ = jnp.clip(begins - first, 0, plan.rows), journey.held + passed
    there = Pieces(from_[mine], sent[mine], at[mine], ours(sent).reshape(-1))
    back = Pieces(ours(at).reshape(-1), ours(sent).reshape(-1), ours(from_).reshape(-1), sent[mine])
    return Leg(there, back, ours(sent).sum(0))
