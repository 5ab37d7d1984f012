"""The compiled parts of serving: `read` takes new tokens into pages, `choose` takes the next tokens from logits.

Both are jitted once for each of a few sizes. Neither waits for the host: the token that a sequence was given last stays
in its slot on the device, from where the next step reads it.

Axes: N new tokens, R rows, S slots, P pages that a row can have, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from glm45_jax.config import ModelConfig
from glm45_jax.infer.sampling import SamplingParams, TokenCounts, sample
from glm45_jax.model import Params
from glm45_jax.model.paged import Ragged, paged_step


class Reading(NamedTuple):
    """What a step reads; see `schedule.arrays_of`."""

    tokens: Int[Array, " N"]
    from_slot: Int[Array, " N"]
    starts: Int[Array, " R+1"]
    lengths: Int[Array, " R"]
    page_table: Int[Array, "R P"]
    num_rows: Int[Array, ""]


class Special(NamedTuple):
    """What only some requests need of the choice of a token."""

    counts: TokenCounts
    allowed: UInt32[Array, "R V/32"]  # bit v % 32 of word v // 32: whether token v may be chosen


class Chosen(NamedTuple):
    tokens: Int[Array, " R"]
    logprobs: Float[Array, " R"]
    last: Int[Array, " S"]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="pages")
def read(
    params: Params, config: ModelConfig, pages: Array, last: Int[Array, " S"], reading: Reading
) -> tuple[Float[Array, "R V"], Array]:
    """The logits after each row's last token, and the pages with the new tokens."""
    tokens = jnp.where(reading.from_slot >= 0, last[reading.from_slot], reading.tokens)
    batch = Ragged(tokens, reading.starts, reading.lengths, reading.page_table, reading.num_rows)
    step = paged_step(params, config, pages, batch, jnp.maximum(reading.starts[1:] - 1, 0))
    return step.logits, step.pages


@jax.jit
def choose(
    logits: Float[Array, "R V"],
    last: Int[Array, " S"],
    sampling: SamplingParams,
    lengths: Int[Array, " R"],
    to_slot: Int[Array, " R"],
    vocab_size: Int[Array, ""],
    special: Special | None,
) -> Chosen:
    """The next token of each row, and the slots' last tokens with those of rows that have a slot to put it."""
    counts = None
    if special is not None:
        counts, logits = special.counts, jnp.where(_bits(special.allowed, logits.shape[1]), logits, -jnp.inf)
    tokens, logprobs = sample(logits, sampling, lengths, counts, vocab_size)
    return Chosen(tokens, logprobs, last.at[to_slot].set(tokens, mode="drop"))


def _bits(words: UInt32[Array, "R W"], count: int) -> Array:
    places = jnp.arange(count)
    return (words[:, places // 32] >> (places % 32).astype(jnp.uint32)) & 1 == 1
