"""Rows sent to other devices in pieces of any size: the ragged all-to-all, with one form for every platform.

A piece is some rows next to each other. Each device sends P pieces to each of n devices, so that the arrays that
describe them are [n P], by the other device. What a device receives is what the others wrote where they were told to.

Axes: M rows held, R rows of the buffer received into, n devices, P pieces from a device to another.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


class Pieces(NamedTuple):
    """What a device sends, and how much it gets."""

    starts: Int[Array, " nP"]  # first row of each piece sent
    sizes: Int[Array, " nP"]  # rows of each piece sent
    targets: Int[Array, " nP"]  # where its first row lands on the device it goes to
    received: Int[Array, " nP"]  # rows of each piece that comes in


def exchange(
    rows: Shaped[Array, "M ..."], into: Shaped[Array, "R ..."], pieces: Pieces, axes: tuple[str, ...]
) -> Shaped[Array, "R ..."]:
    """Sends pieces of `rows` along mesh axes. Returns `into` with what came in, for which it gives the memory."""
    run = {
        name: functools.partial(function, axis_name=axes)
        for name, function in {"cpu": _padded, "default": jax.lax.ragged_all_to_all}.items()
    }
    return jax.lax.platform_dependent(rows, into, *pieces, **run)


def _padded(rows, into, starts, sizes, targets, received, *, axis_name):
    """`jax.lax.ragged_all_to_all` by all_to_all, for platforms that lack it: every device sends every row to each.

    Beside its rows a device sends where each of them lands, -1 for those that aren't meant for the receiver.
    """
    devices = jax.lax.axis_size(axis_name)
    place = jnp.arange(rows.shape[0])[:, None] - starts
    inside = (place >= 0) & (place < sizes)  # [M, nP]
    lands = jnp.where(inside, targets + place, -1).reshape(rows.shape[0], devices, -1).max(-1)
    to_each = jnp.broadcast_to(rows, (devices, *rows.shape))
    arrived, at = (jax.lax.all_to_all(x, axis_name, 0, 0, tiled=True) for x in (to_each, lands.T))
    at = jnp.where(at < 0, into.shape[0], at).reshape(-1)
    return into.at[at].set(arrived.reshape(-1, *rows.shape[1:]), mode="drop")
