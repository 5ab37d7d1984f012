"""How likely a given text is to the model, token by token.

Outside of the engine's steps: compiled once for each power of two that a text is filled up to, when it first comes.

Axes: S tokens, k likeliest tokens, V vocabulary, D model.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.infer.request import Top
from glm45_jax.infer.steps import MOST_LIKELIEST, whole_everywhere
from glm45_jax.model import Params, forward
from glm45_jax.model.decoder import head_logits, head_weight

_LEAST = 64  # tokens of a program
_AT_ONCE = 256  # tokens whose logits are in memory together


@dataclasses.dataclass(frozen=True)
class Scores:
    """Attributes:
    logprobs: of each token but the first, given all before it.
    top: in the same places the likeliest tokens with theirs, as many as were asked for.
    """

    logprobs: list[float]
    top: list[Top]


class Scored(NamedTuple):
    """What is said of tokens 1 to S - 1, in the model's own distribution."""

    logprobs: Float[Array, " S-1"]
    top_tokens: Int[Array, "S-1 k"]
    top_logprobs: Float[Array, "S-1 k"]


@functools.partial(jax.jit, static_argnames="config")
def score(params: Params, config: ModelConfig, tokens: Int[Array, " S"], vocab_size: Int[Array, ""]) -> Scored:
    """Of one text, whatever fills it up behind its end; ids from `vocab_size` on are never among the likeliest."""
    weight, most = head_weight(params, config), min(MOST_LIKELIEST, config.vocab_size)

    def of(place: tuple[Float[Array, " D"], Int[Array, ""]]) -> Scored:
        hidden, target = place
        logits = head_logits(hidden[None], weight)[0]
        total = jax.nn.logsumexp(logits)
        real = jnp.where(jnp.arange(logits.shape[0]) < vocab_size, logits, -jnp.inf)
        values, likely = jax.lax.top_k(real, most)
        return Scored(logits[target] - total, likely, values - total)

    hidden = forward(params, config, tokens[None]).hidden[0, :-1]
    return whole_everywhere(jax.lax.map(of, (hidden, tokens[1:]), batch_size=_AT_ONCE))


def padded(tokens: list[int], longest: int) -> np.ndarray:
    """[S]: filled up to a power of two, or to `longest`."""
    size = max(_LEAST, 1 << (len(tokens) - 1).bit_length())
    out = np.zeros(max(min(size, longest), len(tokens)), np.int32)
    out[: len(tokens)] = tokens
    return out


def scores_of(scored: Scored, count: int, top: int) -> Scores:
    """For `count` tokens. Waits for the device."""
    logprobs, tokens, values = (np.asarray(x)[: count - 1] for x in scored)
    places = zip(tokens[:, :top].tolist(), values[:, :top].tolist())
    return Scores(logprobs.tolist(), [tuple(zip(*place)) for place in places])
