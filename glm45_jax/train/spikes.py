"""Which gradients are left out: those that are not finite, and those far larger than gradients have lately been.

A large gradient that is clipped still points where one bad batch does, and Muon gives every direction the same length.
Source of the rule: the norm against a running mean, as OLMo 2 (arXiv 2501.00656) and others skip steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glm45_jax.train.config import SpikeConfig

_MEMORY = 0.99  # of the running mean: about the last hundred steps


class NormTrack(NamedTuple):
    """How large gradients have been."""

    mean: Float[Array, ""]
    count: Int[Array, ""]  # norms in the mean
    in_a_row: Int[Array, ""]  # spikes just left out


def init_track() -> NormTrack:
    """Before the first step."""
    return NormTrack(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    track: NormTrack, norm: Float[Array, ""], loss: Float[Array, ""], config: SpikeConfig | None
) -> tuple[Bool[Array, ""], NormTrack]:
    """Whether the step is to be taken, and the track with its norm.

    The mean follows spikes too, cut to the limit, and after `patience` of them one is let through: where gradients have
    become larger for good, training goes on.
    """
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    spike, seen = jnp.zeros((), bool), norm
    if config is not None:
        limit = jnp.where(track.count >= config.warmup, config.factor * track.mean, jnp.inf)
        spike = finite & (norm > limit) & (track.in_a_row < config.patience)
        seen = jnp.minimum(norm, limit)
    rate = jnp.maximum(1 - _MEMORY, 1 / (track.count + 1))  # a plain mean at first
    mean = jnp.where(finite, track.mean + rate * (seen - track.mean), track.mean)
    in_a_row = jnp.where(spike, track.in_a_row + 1, jnp.where(finite, 0, track.in_a_row))
    return finite & ~spike, jax.tree.map(
        lambda x, like: x.astype(like.dtype), NormTrack(mean, track.count + finite, in_a_row), track
    )
