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
    experts: Experts, plan: Rounds, rows: Float[Array, "M p Dp"], weights: Float[Array, " M"], matrices: Any,
    journey: Journey, more: Any,
) -> Float[Array, "M p Dp"]:  # fmt: skip
    """The experts' answers to a device's rows, which are `packed` and sorted by expert; zero for rows that are dropped.

    Differentiable in rows, weights and matrices. `more` goes to `experts` as it is; `experts` and `plan` are static.
    """
    return _in_rounds(
        experts, plan, *local.spread_like((rows, weights, matrices, journey, more), rows, journey, matrices)
    )


# A row travels in the form in which XLA for TPU sends it, in tiles that hold no other row's values: of bfloat16 two
# halves one upon the other. In any other form every round would turn all rows into it, and back.


def packed(rows: Float[Array, "M D"]) -> Float[Array, "M p Dp"]:
    """The form in which rows travel."""
    pieces = math.gcd(rows.shape[1], max(1, _WORD // rows.dtype.itemsize))
    return rows.reshape(rows.shape[0], pieces, -1)


def unpacked(rows: Float[Array, "M p Dp"]) -> Float[Array, "M D"]:
    return rows.reshape(rows.shape[0], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(experts, plan: Rounds, rows, weights, matrices, journey, more):
    matrices = _as_kernels_read(matrices)

    def answer(arrived, groups, nothing):
        here, their_weights = arrived
        return (packed(experts(unpacked(here), their_weights, matrices, groups, more)),), nothing

    (answers,), _ = _travel((rows, weights), (rows,), answer, (), journey, plan)
    return answers


def _fwd(experts, plan, *args):
    return _in_rounds(experts, plan, *args), args


def _bwd(experts, plan: Rounds, residuals, dout):
    rows, weights, matrices, journey, more = residuals
    matrices = _as_kernels_read(matrices)

    def gradients(arrived, groups, dmatrices):
        here, their_weights, dhere = arrived
        run = lambda *args: experts(*args, groups, more)  # noqa: E731
        drows, dweights, here_too = jax.vjp(run, unpacked(here), their_weights, matrices)[1](unpacked(dhere))
        return (packed(drows), dweights), jax.tree.map(jnp.add, dmatrices, here_too)

    none = jax.tree.map(jnp.zeros_like, matrices)
    (drows, dweights), dmatrices = _travel((rows, weights, dout), (rows, weights), gradients, none, journey, plan)
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (journey, more))
    return drows, dweights, dmatrices, *no_gradient


_in_rounds.defvjp(_fwd, _bwd)


# Rounds go by twos: the even ones have a buffer of their own and so have the odd ones. One that changed its role
# from round to round would be copied in each, since a loop's values keep their places.


def _travel(sent, back, work, state, journey: Journey, plan: Rounds):
    """Sends rows of all arrays `sent`; `work(arrived, groups, state)` gives what returns of them, and the next state.

    Returns arrays like `back` of what has returned, and the last state.
    """
    leg = functools.partial(_leg, journey, plan=plan)

    def fetch(number, into):
        return tuple(exchange(x, here, leg(number).there, plan.axes) for x, here in zip(sent, into))

    def send_back(number, answers, out):
        return tuple(exchange(x, into, leg(number).back, plan.axes) for x, into in zip(answers, out))

    def two(pair, carry):
        even, odd, answers, out, state = carry
        first, second = 2 * pair, 2 * pair + 1
        odd, out = fetch(second, odd), send_back(first - 1, answers, out)
        answers, state = work(even, leg(first).groups, state)
        even, out = fetch(second + 1, even), send_back(first, answers, out)
        answers, state = work(odd, leg(second).groups, state)
        return even, odd, answers, out, state

    even, odd, answers = (_buffers(arrays, plan, sent[0]) for arrays in (sent, sent, back))
    pairs, out = _count_pairs(journey, plan), tuple(_nothing_yet(x, plan) for x in back)
    _, _, answers, out, state = jax.lax.fori_loop(0, pairs, two, (fetch(0, even), odd, answers, out, state))
    return send_back(2 * pairs - 1, answers, out), state


def _as_kernels_read(matrices: Any) -> Any:
    """Laid out row by row once, and not in every round."""
    return jax.tree.map(lambda w: with_layout_constraint(w, Layout(major_to_minor=tuple(range(w.ndim)))), matrices)


def _buffers(arrays, plan: Rounds, like: Array) -> Any:
    """For what arrives. What lies in them before is never read: the experts read the rows of their groups alone."""
    return local.spread_like(tuple(jax.lax.empty((plan.rows, *x.shape[1:]), x.dtype) for x in arrays), like)


def _nothing_yet(rows: Array, plan: Rounds) -> Array:
    """For what comes back, which without a limit is all rows'."""
    if plan.limit is not None:
        return jnp.zeros_like(rows)
    return local.spread_like(jax.lax.empty(rows.shape, rows.dtype), rows)


def _count_pairs(journey: Journey, plan: Rounds) -> Int[Array, ""]:
    """Twos of rounds until every device has met all its rows.

    The busiest device has the mean at least: said with `maximum`, so that whoever reads the program (`glm45 plan`)
    knows how many rounds even loads take.
    """
    devices = journey.counts.shape[0]
    most = jnp.max(journey.counts.sum(0).reshape(devices, -1).sum(1))
    most = most if plan.limit is None else jnp.minimum(most, plan.limit)
    return jnp.maximum(-(-plan.least // 2), -(-most // (2 * plan.rows)))


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
