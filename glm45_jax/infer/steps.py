"""The parts of serving: `read` takes tokens into pages, `choose` takes the next from logits, `draft` goes on.

`programs.py` compiles each for a few sizes. None waits for the host: the token that a sequence was given last, and what
was drafted behind it, stay in its slot on the device, from where the next step reads them.

Axes: N new tokens, R rows, C choices of a row (one, and one for each draft), W = R C, S slots, P pages that a row can
have, V vocabulary, D model.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from glm45_jax.config import ModelConfig
from glm45_jax.infer.sampling import HostArray, SamplingParams, TokenCounts, sample
from glm45_jax.model import Params
from glm45_jax.model.over_mesh import mesh_in_force
from glm45_jax.model.paged import Pages, Ragged, mtp_paged_step, paged_step

MOST_LIKELIEST = 20  # tokens whose log-probabilities a request may ask for


class Reading(NamedTuple):
    """What a step reads; see `schedule.arrays_of`."""

    tokens: Int[HostArray, " N"]
    from_slot: Int[HostArray, " N"]
    following: Int[HostArray, " N"]
    starts: Int[HostArray, " R+1"]
    lengths: Int[HostArray, " R"]
    drafts: Int[HostArray, " R"]
    page_table: Int[HostArray, "R P"]
    to_slot: Int[HostArray, " R"]
    ahead: Bool[HostArray, " R"]
    chooses: Bool[HostArray, " R"]
    num_rows: Int[HostArray, ""]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, rows, and pages of a row."""
        return len(self.tokens), *self.page_table.shape

    def packed(self) -> np.ndarray:
        """As one array of int32: to hand over a dozen small ones takes a device longer than many a step."""
        return np.concatenate([np.ravel(x) for x in self], dtype=np.int32, casting="unsafe")

    @classmethod
    def unpacked(cls, flat: Int[Array, " n"], sizes: tuple[int, int, int]) -> Reading:
        """What was `packed`."""
        tokens, rows, width = sizes
        shapes = {"tokens": (tokens,), "from_slot": (tokens,), "following": (tokens,), "starts": (rows + 1,),
                  "page_table": (rows, width), "num_rows": ()}  # fmt: skip
        parts, at = {}, 0
        for name in cls._fields:
            shape = shapes.get(name, (rows,))
            part = flat[at : at + math.prod(shape)].reshape(shape)
            parts[name] = part.astype(bool) if name in ("ahead", "chooses") else part
            at += math.prod(shape)
        return cls(**parts)


class Rows(NamedTuple):
    """Of a step that is read, what the choice of tokens looks at: the same programs for all numbers of tokens."""

    lengths: Int[Array, " R"]
    drafts: Int[Array, " R"]
    to_slot: Int[Array, " R"]


class Slots(NamedTuple):
    """What the last step of each slot has left for the next one."""

    tokens: Int[HostArray, "S 1+D"]  # the last that was chosen, and what was drafted behind it
    accepted: Int[HostArray, " S"]  # drafts that held


class Special(NamedTuple):
    """What only some requests need of the choice of a token."""

    counts: TokenCounts | None
    allowed: UInt32[HostArray, "W V/32"]  # bit v % 32 of word v // 32: whether token v may be chosen


class Read(NamedTuple):
    """What a step has read, with what was not known when it was planned."""

    logits: Float[Array, "W V"]
    hidden: Float[Array, "N D"] | None  # for `draft`
    tokens: Int[Array, " N"]
    rows: Rows
    pages: Pages


class Chosen(NamedTuple):
    """What comes after each row's last token, and after each of its drafts, if they hold."""

    tokens: Int[Array, "R C"]
    logprobs: Float[Array, "R C"]
    slots: Slots


class Likeliest(NamedTuple):
    """The likeliest tokens in the model's own distribution, the likeliest first."""

    tokens: Int[Array, "W k"]
    logprobs: Float[Array, "W k"]


class Drafted(NamedTuple):
    accepted: Int[Array, " R"]  # drafts that hold: they are what was chosen
    tokens: Int[Array, "R most"]  # the next
    slots: Slots
    pages: Pages


def read(params: Params, config: ModelConfig, pages: Pages, slots: Slots, reading: Reading, *, most: int) -> Read:
    """The logits after each row's last token and `most` drafts, one behind the other."""
    tokens = jnp.where(reading.from_slot >= 0, slots.tokens.reshape(-1)[reading.from_slot], reading.tokens)
    held = jnp.where(reading.ahead, slots.accepted.at[reading.to_slot].get(mode="clip"), 0)
    reading = reading._replace(tokens=tokens, lengths=reading.lengths + held)
    batch = Ragged(reading.tokens, reading.starts, reading.lengths, reading.page_table, reading.num_rows)
    place = jnp.minimum(jnp.arange(most + 1), reading.drafts[:, None])
    step = paged_step(params, config, pages, batch, jnp.maximum(_last_place(reading)[:, None] + place, 0).reshape(-1))
    rows = Rows(reading.lengths, reading.drafts, reading.to_slot)
    tokens, rows = whole_everywhere((reading.tokens, rows))
    return Read(step.logits, step.hidden if most else None, tokens, rows, step.pages)


def choose(
    logits: Float[Array, "W V"],
    slots: Slots,
    sampling: SamplingParams,
    rows: Rows,
    vocab_size: Int[Array, ""],
    special: Special | None,
) -> Chosen:
    """The next tokens, and the slots with those of rows that have a slot to put it; drafts come to it by `draft`.

    A token depends on its sequence's seed and its position, and on what was read before it: behind drafts that hold
    stands what would have been chosen without them, drawn or not.
    """
    each = logits.shape[0] // len(rows.lengths)
    counts, allowed = None, None
    if special is not None:
        counts = jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), special.counts)
        allowed = _bits(special.allowed, logits.shape[1])
    positions = (rows.lengths - rows.drafts)[:, None] + jnp.arange(each)
    sampling = jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), sampling)
    tokens, logprobs = (
        x.reshape(-1, each) for x in sample(logits, sampling, positions.reshape(-1), counts, vocab_size, allowed)
    )
    slots = slots._replace(tokens=slots.tokens.at[rows.to_slot, 0].set(tokens[:, 0], mode="drop"))
    return whole_everywhere(Chosen(tokens, logprobs, slots))


def likeliest(logits: Float[Array, "W V"], vocab_size: Int[Array, ""]) -> Likeliest:
    """What could have been chosen, for requests that ask for it: of `MOST_LIKELIEST` tokens, or of all there are."""
    real = jnp.where(jnp.arange(logits.shape[1]) < vocab_size, logits, -jnp.inf)
    values, tokens = jax.lax.top_k(real, min(MOST_LIKELIEST, logits.shape[1]))
    return whole_everywhere(Likeliest(tokens, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)))


def draft(
    params: Params,
    config: ModelConfig,
    pages: Pages,
    hidden: Float[Array, "N D"],
    slots: Slots,
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
    found = jnp.stack(drafts, axis=1)
    last = jnp.take_along_axis(chosen, accepted[:, None], axis=1)
    slots = Slots(
        slots.tokens.at[reading.to_slot].set(jnp.concatenate([last, found], axis=1), mode="drop"),
        slots.accepted.at[reading.to_slot].set(accepted, mode="drop"),
    )
    accepted, found, slots = whole_everywhere((accepted, found, slots))
    return Drafted(accepted, found, slots, step.pages)


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
