"""How well a model predicts given tokens: `perplexity`, and `compare` of two sets of weights.

Texts of any length are read in windows. Each but a text's first begins with `context` tokens that the one before has
scored already and that are read again only to be seen. Windows of a batch are rows of one compiled program.

Axes: B windows of a batch, S tokens of a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model import Params, forward
from glm45_jax.model.decoder import head_logits, head_weight
from glm45_jax.parallel import device_in_force

_ROWS_AT_ONCE = 1024  # tokens whose logits are in memory together


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Attributes:
    nll: mean negative log-likelihood of a token, in nats.
    tokens: how many were scored: all but each text's first.
    """

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Attributes:
    nll, other_nll: mean negative log-likelihood of a token by each, in nats.
    kl: mean over the places of KL(p || other), in nats.
    agreement: share of the places where both have the same likeliest token.
    tokens: places.
    """

    nll: float
    other_nll: float
    kl: float
    agreement: float
    tokens: int


def perplexity(
    params: Params,
    config: ModelConfig,
    tokens: Sequence[int] | Sequence[Sequence[int]],
    *,
    window: int = 2048,
    context: int | None = None,
    batch_size: int = 4,
) -> Perplexity:
    """Mean negative log-likelihood of every token but each text's first, given those before it.

    Args:
      params: full or quantised; under `jax.set_mesh` spread over a mesh.
      tokens: one text's ids, or a list of several texts'.
      window: tokens that are read at once, at most the model's context.
      context: a token sees at least so many of those before it, if there are as many; by default an eighth of a window.
      batch_size: windows of one step.

    Raises:
      UserError: no text has two tokens; an id outside the vocabulary; sizes that do not go together.
    """
    total, count = 0.0, 0
    for batch in _batches(tokens, config, window, context, batch_size):
        with device_in_force(params):
            nll, scored = _nll(params, config, *batch)
        total, count = total + float(nll), count + int(scored)
    return Perplexity(total / count, count)


def compare(
    params: Params,
    other: Params,
    config: ModelConfig,
    tokens: Sequence[int] | Sequence[Sequence[int]],
    *,
    window: int = 2048,
    context: int | None = None,
    batch_size: int = 4,
) -> Comparison:
    """What `other`, as quantised weights, loses against `params` on the same tokens; arguments as of `perplexity`."""
    sums, count = np.zeros(4), 0
    for batch in _batches(tokens, config, window, context, batch_size):
        with device_in_force(params):
            found, scored = _differences(params, other, config, *batch)
        sums, count = sums + np.asarray(found, np.float64), count + int(scored)
    nll, other_nll, kl, agreement = (sums / count).tolist()
    return Comparison(nll, other_nll, kl, agreement, count)


# --- windows ---------------------------------------------------------------------------------------------------------

Batch = tuple[np.ndarray, np.ndarray]  # tokens [B, S], and which of the targets [B, S - 1] are scored


def _batches(tokens: Any, config: ModelConfig, window: int, context: int | None, batch_size: int) -> Iterator[Batch]:
    """Tokens [B, S] and which of the targets, [B, S - 1], are scored; rows and ends that only fill up are not."""
    window = min(window, config.max_position_embeddings)
    context = max(1, window // 8) if context is None else context
    if window < 2 or not 0 < context < window or batch_size < 1:
        raise UserError(
            f"window {window} (2 or more), context {context} (1 to below window) and batch_size {batch_size} (1 or "
            "more) do not go together"
        )
    texts = _texts(tokens, config)
    longest = max(map(len, texts), default=0)
    if longest < 2:
        raise UserError("a text of at least two tokens is needed: the first of each is not predicted")
    window = min(window, longest)
    context = min(context, window - 1)
    rows = [row for text in texts for row in _windows(text, window, context)]
    size = min(batch_size, len(rows))
    for start in range(0, len(rows), size):
        ids, scored = np.zeros((size, window), np.int32), np.zeros((size, window - 1), bool)
        for i, (row, seen) in enumerate(rows[start : start + size]):
            ids[i, : len(row)] = row
            scored[i, seen - 1 : len(row) - 1] = True
        yield ids, scored


def _windows(text: np.ndarray, window: int, context: int) -> Iterator[tuple[np.ndarray, int]]:
    """A text in windows, and how many tokens of each are not scored in it."""
    start, done = 0, 1
    while done < len(text):
        stop = min(start + window, len(text))
        yield text[start:stop], done - start
        start, done = stop - context, stop


def _texts(tokens: Any, config: ModelConfig) -> list[np.ndarray]:
    one = len(tokens) > 0 and not hasattr(tokens[0], "__len__")
    texts = [np.asarray(text, np.int64) for text in ([tokens] if one else tokens)]
    for i, text in enumerate(texts):
        outside = text[(text < 0) | (text >= config.vocab_size)]
        if outside.size:
            raise UserError(f"text {i} holds token {outside[0]}; ids go from 0 to {config.vocab_size - 1}")
    return texts


# --- the compiled parts ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def _nll(params: Params, config: ModelConfig, tokens: Int[Array, "B S"], scored: Any) -> tuple[Array, Array]:
    def of(chunk):
        (hidden,), targets, scored = chunk
        return jnp.where(scored, -_of_targets(_log_probabilities(params, config, hidden), targets), 0).sum()

    sums = jax.lax.map(of, _chunks((_hidden(params, config, tokens),), tokens, scored))
    return sums.sum(), scored.sum()


@functools.partial(jax.jit, static_argnames="config")
def _differences(params: Params, other: Params, config: ModelConfig, tokens: Any, scored: Any) -> tuple[Array, Array]:
    def of(chunk):
        (mine, its), targets, scored = chunk
        p, q = (_log_probabilities(w, config, h) for w, h in ((params, mine), (other, its)))
        same = p.argmax(-1) == q.argmax(-1)
        each = jnp.stack([-_of_targets(p, targets), -_of_targets(q, targets), (jnp.exp(p) * (p - q)).sum(-1), same])
        return jnp.where(scored, each, 0).sum(1)

    hidden = tuple(_hidden(w, config, tokens) for w in (params, other))
    return jax.lax.map(of, _chunks(hidden, tokens, scored)).sum(0), scored.sum()


def _hidden(params: Params, config: ModelConfig, tokens: Int[Array, "B S"]) -> Float[Array, "B S-1 D"]:
    return forward(params, config, tokens).hidden[:, :-1]


def _chunks(hidden: tuple[Array, ...], tokens: Int[Array, "B S"], scored: Any) -> Any:
    """Flat, in chunks of a leading axis."""
    count = scored.size
    chunks = -(-count // _ROWS_AT_ONCE)
    size = -(-count // chunks)

    def cut(x):
        flat = x.reshape(count, *x.shape[2:])
        return jnp.pad(flat, [(0, chunks * size - count)] + [(0, 0)] * (flat.ndim - 1)).reshape(
            chunks, size, *flat.shape[1:]
        )

    return tuple(cut(h) for h in hidden), cut(tokens[:, 1:]), cut(scored)


def _log_probabilities(params: Params, config: ModelConfig, hidden: Float[Array, "n D"]) -> Float[Array, "n V"]:
    return jax.nn.log_softmax(head_logits(hidden, head_weight(params, config)), axis=-1)


def _of_targets(logp: Float[Array, "n V"], targets: Int[Array, " n"]) -> Float[Array, " n"]:
    return jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
