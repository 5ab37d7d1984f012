"""The compiled parts of serving: `read` takes tokens into pages, `choose` takes the next from logits, `draft` goes on.

Each is jitted once for each of a few sizes. None waits for the host: the token that a sequence was given last stays in
its slot on the device, from where the next step reads it.

Axes: N new tokens, R rows, C choices of a row (one, and one for each draft), W = R C, S slots, P pages that a row can
have, V vocabulary, D model.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from glm45_jax.config import ModelConfig
from glm45_jax.infer.sampling import SamplingParams, TokenCounts, sample
from glm45_jax.model import Params
from glm45_jax.model.over_mesh import mesh_in_force
from glm45_jax.model.paged import Ragged, mtp_paged_step, paged_step

MOST_LIKELIEST = 20  # tokens whose log-probabilities a request may ask for


class Reading(NamedTuple):
    """What a step reads; see `schedule.arrays_of`."""

    tokens: Int[Array, " N"]
    from_slot: Int[Array, " N"]
    following: Int[Array, " N"]
    starts: Int[Array, " R+1"]
    lengths: Int[Array, " R"]
    drafts: Int[Array, " R"]
    page_table: Int[Array, "R P"]
    to_slot: Int[Array, " R"]
    chooses: Bool[Array, " R"]
    num_rows: Int[Array, ""]


class Special(NamedTuple):
    """What only some requests need of the choice of a token."""

    counts: TokenCounts | None
    allowed: UInt32[Array, "W V/32"]  # bit v % 32 of word v // 32: whether token v may be chosen


class Chosen(NamedTuple):
    """What comes after each row's last token, and after each of its drafts, if they hold."""

    tokens: Int[Array, "R C"]
    logprobs: Float[Array, "R C"]
    last: Int[Array, " S"]


class Likeliest(NamedTuple):
    """The likeliest tokens in the model's own distribution, the likeliest first."""

    tokens: Int[Array, "W k"]
    logprobs: Float[Array, "W k"]


class Drafted(NamedTuple):
    accepted: Int[Array, " R"]  # drafts that hold: they are what was chosen
    tokens: Int[Array, "R most"]  # the next
    pages: Float[Array, "L n K p 2h"]


@functools.partial(jax.jit, static_argnames=("config", "most"), donate_argnames="pages")
def read(
    params: Params, config: ModelConfig, pages: Array, last: Int[Array, " S"], reading: Reading, *, most: int
) -> tuple[Float[Array, "W V"], Float[Array, "N D"] | None, Array]:
    """The logits after each row's last token and `most` drafts, one behind the other, and the pages.

    With drafts the hidden states too, for `draft`.
    """
    tokens = jnp.where(reading.from_slot >= 0, last[reading.from_slot], reading.tokens)
    batch = Ragged(tokens, reading.starts, reading.lengths, reading.page_table, reading.num_rows)
    place = jnp.minimum(jnp.arange(most + 1), reading.drafts[:, None])
    step = paged_step(params, config, pages, batch, jnp.maximum(_last_place(reading)[:, None] + place, 0).reshape(-1))
    return step.logits, step.hidden if most else None, step.pages


@jax.jit
def choose(
    logits: Float[Array, "W V"],
    last: Int[Array, " S"],
    sampling: SamplingParams,
    reading: Reading,
    vocab_size: Int[Array, ""],
    special: Special | None,
) -> Chosen:
    """The next tokens, and the slots' last tokens with those of rows that have a slot to put it.

    A token depends on its sequence's seed and its position, and on what was read before it: behind drafts that hold
    stands what would have been chosen without them, drawn or not.
    """
    rows = reading.lengths.shape[0]
    each = logits.shape[0] // rows
    counts, allowed = None, None
    if special is not None:
        counts = jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), special.counts)
        allowed = _bits(special.allowed, logits.shape[1])
    positions = (reading.lengths - reading.drafts)[:, None] + jnp.arange(each)
    sampling = jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), sampling)
    tokens, logprobs = (
        x.reshape(rows, each) for x in sample(logits, sampling, positions.reshape(-1), counts, vocab_size, allowed)
    )
    return whole_everywhere(Chosen(tokens, logprobs, last.at[reading.to_slot].set(tokens[:, 0], mode="drop")))


@jax.jit
def likeliest(logits: Float[Array, "W V"], vocab_size: Int[Array, ""]) -> Likeliest:
    """What could have been chosen, for requests that ask for it: of `MOST_LIKELIEST` tokens, or of all there are."""
    real = jnp.where(jnp.arange(logits.shape[1]) < vocab_size, logits, -jnp.inf)
    values, tokens = jax.lax.top_k(real, min(MOST_LIKELIEST, logits.shape[1]))
    return whole_everywhere(Likeliest(tokens, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)))


@functools.partial(jax.jit, static_argnames=("config", "most"), donate_argnames="pages")
def draft(
    params: Params,
    config: ModelConfig,
    pages: Array,
    hidden: Float[Array, "N D"],
    chosen: Int[Array, "R C"],
    sampling: SamplingParams,
    reading: Reading,
    vocab_size: Int[Array, ""],
    *,
    most: int,
) -> Drafted:
    """Which drafts hold, and the next `most` by the MTP layer: what it would choose with the main model's noise.

    The layer reads all that the step has read, with the tokens that follow now known, then its own drafts in a chain.
    What it writes behind drafts that don't hold, and of the chain, is written anew when the true tokens are there.
    """
    base, place = _last_place(reading), jnp.arange(chosen.shape[1])
    given = reading.tokens.at[base[:, None] + 1 + place[:-1]].get(mode="fill", fill_value=-1)
    holds = (given == chosen[:, :-1]) & (place[:-1] < reading.drafts[:, None])
    accepted = jnp.cumprod(holds, axis=1).sum(1)
    known = reading.chooses[:, None] & (place <= reading.drafts[:, None])
    at = jnp.where(known, base[:, None] + place, reading.tokens.shape[0])
    following = reading.following.at[at].set(chosen, mode="drop")
    batch = Ragged(following, reading.starts, reading.lengths, reading.page_table, reading.num_rows)
    wanted = jnp.maximum(base + accepted, 0)
    step = mtp_paged_step(params, config, pages, batch, hidden, wanted)
    position, h = reading.lengths - reading.drafts + accepted, step.hidden[wanted]
    drafts = [sample(step.logits, sampling, position + 1, None, vocab_size)[0]]
    every = jnp.arange(base.shape[0] + 1)
    for i in range(1, most):
        batch = Ragged(drafts[-1], every, position + i, reading.page_table, reading.num_rows)
        step = mtp_paged_step(params, config, step.pages, batch, h, every[:-1])
        h = step.hidden
        drafts.append(sample(step.logits, sampling, position + 1 + i, None, vocab_size)[0])
    accepted, found = whole_everywhere((accepted, jnp.stack(drafts, axis=1)))
    return Drafted(accepted, found, step.pages)


def whole_everywhere(tree: Any) -> Any:
    """Whole on every device of the mesh in force: any process may read it."""
    mesh = mesh_in_force()
    if mesh is None:
        return tree
    put = jax.sharding.reshard if AxisType.Explicit in mesh.axis_types else jax.lax.with_sharding_constraint
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, PartitionSpec())), tree)


def _last_place(reading: Reading) -> Int[Array, " R"]:
    """Of each row's last token before its drafts."""
    return reading.starts[1:] - 1 - reading.drafts


def _bits(words: UInt32[Array, "R W"], count: int) -> Array:
    places = jnp.arange(count)
    return (words[:, places // 32] >> (places % 32).astype(jnp.uint32)) & 1 == 1
