"""Choosing the next token from logits: a pure function with settings per sequence.

Settings are arrays, so that one compiled step serves every mix of them. In this order:

1. Rows of the vocabulary that pad it are left out.
2. The repetition penalty divides positive and multiplies negative logits of tokens that the prompt or the answer holds
   (arXiv 1909.05858, section 4.1); the presence and frequency penalties are subtracted for tokens of the answer
   (OpenAI API). `logit_bias` is added last, so that -inf bans and 100 forces whatever the penalties say.
3. Temperature 0 takes the largest. Otherwise the logits are divided by it, then `top_k`, `top_p` (of what top_k left)
   and `min_p` (arXiv 2407.01082) leave tokens out, and one is drawn. Tokens equal to the last one kept are kept too.

The draw depends on the sequence's seed and the token's position alone: not on the batch, nor on where decoding began.
Log-probabilities are those of the model's own distribution: before penalties, bias, temperature and filters.

Axes: B batch, V vocabulary, N biased tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from glm45_jax.errors import UserError


class SamplingOptions(TypedDict, total=False):
    """What `sampling_params` and everything that generates take; each one value, or a sequence of one per prompt."""

    temperature: float | Sequence[float]
    """0 (the default): greedy."""
    top_k: int | Sequence[int]
    """Draw from the k likeliest tokens. 0: all."""
    top_p: float | Sequence[float]
    """Draw from the fewest likeliest tokens that hold this much probability. 1: all."""
    min_p: float | Sequence[float]
    """Draw from tokens at least this many times as likely as the likeliest. 0: all."""
    repetition_penalty: float | Sequence[float]
    """1: none. Above, tokens of prompt and answer become less likely."""
    presence_penalty: float | Sequence[float]
    """Subtracted from the logits of tokens that the answer holds. 0: none."""
    frequency_penalty: float | Sequence[float]
    """Subtracted once per occurrence in the answer. 0: none."""
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float] | None] | None
    """Added to the logits of token ids; -inf bans one."""
    seed: int | Sequence[int]
    """Sequence i takes seed + i, or the i-th of a sequence of seeds; 0 <= seed < 2**32."""


HostArray = Any  # numpy's on the host, jax's where a function of them is traced


_PART = 128  # neighbouring logits of which the largest is taken first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """The settings of a batch as arrays; `sampling_params` makes them from plain values and checks them."""

    temperature: Float[HostArray, " B"]
    top_k: Int[HostArray, " B"]
    top_p: Float[HostArray, " B"]
    min_p: Float[HostArray, " B"]
    repetition_penalty: Float[HostArray, " B"]
    presence_penalty: Float[HostArray, " B"]
    frequency_penalty: Float[HostArray, " B"]
    seed: UInt32[HostArray, " B"]
    bias_ids: Int[HostArray, "B N"]  # ids outside the vocabulary fill up
    bias_values: Float[HostArray, "B N"]

    @property
    def uses_penalties(self) -> bool:
        """Whether any sequence needs `TokenCounts`. For settings that hold values, not traced ones."""
        neutral = ((self.repetition_penalty, 1), (self.presence_penalty, 0), (self.frequency_penalty, 0))
        return any(bool((np.asarray(values) != value).any()) for values, value in neutral)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """What penalties look at."""

    in_prompt: Bool[HostArray, "B V"]
    in_answer: Int[HostArray, "B V"]

    def add(self, tokens: Int[Array, " B"]) -> TokenCounts:
        """With one more token in each answer."""
        rows = jnp.arange(tokens.shape[0])
        return TokenCounts(self.in_prompt, self.in_answer.at[rows, tokens].add(1))


def count_prompt(tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], vocab_size: int) -> TokenCounts:
    """The counts before the first token of the answers."""
    batch = tokens.shape[0]
    outside = jnp.where(mask, tokens, vocab_size)
    in_prompt = jnp.zeros((batch, vocab_size), bool).at[jnp.arange(batch)[:, None], outside].set(True, mode="drop")
    return TokenCounts(in_prompt, jnp.zeros((batch, vocab_size), jnp.int32))


def sample(
    logits: Float[Array, "B V"],
    params: SamplingParams,
    positions: Int[Array, " B"],
    counts: TokenCounts | None = None,
    vocab_size: Int[Array, ""] | int | None = None,
    allowed: Bool[Array, "B V"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of each sequence.

    Args:
      logits: of the model, float32.
      positions: index in its sequence, prompt included, of the token to choose.
      counts: without them there are no penalties.
      vocab_size: ids from here on are never chosen.
      allowed: others are never chosen.

    Returns:
      tokens, and their log-probabilities in the model's own distribution.
    """
    adjusted = adjust_logits(logits, params, counts, vocab_size)
    if allowed is not None:
        adjusted = jnp.where(allowed, adjusted, -jnp.inf)
    greedy = likeliest_token(adjusted)

    def draw() -> Int[Array, " B"]:
        noise = jax.vmap(lambda seed, position: _gumbel(seed, position, logits.shape[-1]))(params.seed, positions)
        drawn = likeliest_token(filter_logits(adjusted, params) + noise)
        return jnp.where(params.temperature > 0, drawn, greedy)

    tokens = jax.lax.cond(jnp.any(params.temperature > 0), draw, lambda: greedy)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def likeliest_token(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first of the largest, as `argmax`, which XLA does not vectorise on CPU: a third of its time for 32 x 32768.

    So the place is looked for only in that part of a row that has the largest.
    """
    size = logits.shape[-1]
    if size % _PART or any(jax.typeof(logits).sharding.spec):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    parts = logits.reshape(-1, size // _PART, _PART)
    first = jnp.argmax(jnp.max(parts, axis=-1), axis=-1)
    inside = jnp.argmax(jnp.take_along_axis(parts, first[:, None, None], axis=1)[:, 0], axis=-1)
    return (first * _PART + inside).astype(jnp.int32)


def adjust_logits(
    logits: Float[Array, "B V"],
    params: SamplingParams,
    counts: TokenCounts | None = None,
    vocab_size: Int[Array, ""] | int | None = None,
) -> Float[Array, "B V"]:
    """Logits with padded rows at -inf, penalties and bias: what greedy decoding takes the largest of."""
    if counts is not None:
        repeated = counts.in_prompt | (counts.in_answer > 0)
        penalty = params.repetition_penalty[:, None]
        logits = jnp.where(repeated, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
        logits -= params.presence_penalty[:, None] * (counts.in_answer > 0)
        logits -= params.frequency_penalty[:, None] * counts.in_answer
    if params.bias_ids.shape[1]:
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = logits.at[rows, params.bias_ids].add(params.bias_values, mode="drop")
    if vocab_size is not None:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    return logits


def filter_logits(adjusted: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """Logits over temperature, at most 0, with everything that top_k, top_p and min_p leave out at -inf."""
    largest = jnp.max(adjusted, axis=-1, keepdims=True)
    temperature = jnp.maximum(params.temperature, 1e-20)[:, None]  # below that 1/temperature overflows
    logits = (adjusted - largest) / temperature
    logits = _filter_if(params.top_k > 0, logits, lambda x: _top_k_threshold(x, params.top_k))
    logits = _filter_if(params.top_p < 1, logits, lambda x: _top_p_threshold(x, params.top_p))
    return jnp.where(logits >= jnp.log(params.min_p)[:, None], logits, -jnp.inf)


def _filter_if(
    active: Bool[Array, " B"], logits: Float[Array, "B V"], threshold: Callable[[Array], Array]
) -> Float[Array, "B V"]:
    """Leaves out what lies below the threshold, in active rows; nothing is computed where none is."""

    def apply(x):
        return jnp.where(_ordered(x) >= jnp.where(active, threshold(x), 0)[:, None], x, -jnp.inf)

    return jax.lax.cond(jnp.any(active), apply, lambda x: x, logits)


def _top_k_threshold(logits: Float[Array, "B V"], top_k: Int[Array, " B"]) -> UInt32[Array, " B"]:
    return _largest_holding(_ordered(logits), jnp.ones_like(logits), top_k.astype(jnp.float32))


def _top_p_threshold(logits: Float[Array, "B V"], top_p: Float[Array, " B"]) -> UInt32[Array, " B"]:
    weights = jnp.exp(logits)
    return _largest_holding(_ordered(logits), weights, top_p * jnp.sum(weights, axis=-1))


def _ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0.0 + 0.0 is 0.0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_holding(
    values: UInt32[Array, "B V"], weights: Float[Array, "B V"], target: Float[Array, " B"]
) -> UInt32[Array, " B"]:
    """The largest t such that the weights of all values >= t add up to the target, found bit by bit.

    32 sums over the row in place of a sort, which is some 80 times slower on a CPU.
    """

    def set_bit(i, t):
        candidate = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        held = jnp.sum(jnp.where(values >= candidate[:, None], weights, 0), axis=-1)
        return jnp.where(held >= target, candidate, t)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(values.shape[0], jnp.uint32))


def _gumbel(seed: UInt32[Array, ""], position: Int[Array, ""], size: int) -> Float[Array, " V"]:
    """Noise whose sum with log-probabilities is largest at a token drawn from them.

    All 32 random bits serve the upper tail, where the unlikely tokens of a large vocabulary are decided and where
    `jax.random.gumbel` of float32 is coarse. The generator is the same whatever the user's default is.
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    uniform = (jax.random.bits(key, (size,), jnp.uint32).astype(jnp.float32) + 0.5) * 2.0**-32
    uniform = jnp.minimum(uniform, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


# --- from plain values -----------------------------------------------------------------------------------------------

# name -> (default, type, what must hold, in words)
_OPTIONS: dict[str, tuple[float, type, Callable[[float], bool], str]] = {
    "temperature": (0.0, float, lambda x: 0 <= x < math.inf, "0 or more"),
    "top_k": (0, int, lambda x: 0 <= x < 2**31, "0 (off) or more"),
    "top_p": (1.0, float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (0.0, float, lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (1.0, float, lambda x: 0 < x < math.inf, "above 0"),
    "presence_penalty": (0.0, float, math.isfinite, "finite"),
    "frequency_penalty": (0.0, float, math.isfinite, "finite"),
}


def sampling_params(
    batch_size: int, vocab_size: int, rows: int | None = None, options: SamplingOptions | None = None
) -> SamplingParams:
    """The settings of a batch, as NumPy arrays.

    Args:
      batch_size: how many sequences.
      vocab_size: of the model, to check `logit_bias` by.
      rows: at least `batch_size`; further rows, which pad the batch, are greedy.
      options: see `SamplingOptions`.

    Raises:
      UserError: a value outside its range, or a sequence of another length than the batch, by name.
    """
    left: dict[str, Any] = dict(options or {})
    rows = rows or batch_size
    values = {}
    for name, (default, kind, holds, words) in _OPTIONS.items():
        given = _per_sequence(name, left.pop(name, default), batch_size)
        for value in given:
            if not isinstance(value, numbers.Integral if kind is int else numbers.Real) or not holds(float(value)):
                raise UserError(f"{name} is {value!r}; it must be {words}" + (", a whole number" * (kind is int)))
        dtype = np.int32 if kind is int else np.float32
        values[name] = np.array([*given, *[default] * (rows - batch_size)], dtype)
    values["seed"] = _seeds(left.pop("seed", 0), batch_size, rows)
    values |= _biases(left.pop("logit_bias", None), batch_size, rows, vocab_size)
    if left:
        known = ", ".join([*_OPTIONS, "seed", "logit_bias"])
        raise UserError(f"unknown sampling option {next(iter(left))!r}; there are {known}")
    return SamplingParams(**values)


def _per_sequence(name: str, value: Any, batch_size: int) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
        return [value] * batch_size
    if len(value) != batch_size:
        raise UserError(f"{name} has {len(value)} values for {batch_size} prompts")
    return [x.item() if hasattr(x, "item") else x for x in value]


def _seeds(seed: Any, batch_size: int, rows: int) -> np.ndarray:
    seeds = _per_sequence("seed", seed, batch_size)
    for value in seeds:
        if not isinstance(value, numbers.Integral) or not 0 <= int(value) < 2**32:
            raise UserError(f"seed is {value!r}; it must be a whole number from 0 to 2**32 - 1")
    apart = 0 if hasattr(seed, "__len__") else 1
    seeds = [(int(value) + apart * i) % 2**32 for i, value in enumerate(seeds)]
    return np.array(seeds + [0] * (rows - batch_size), np.uint32)


def _biases(bias: Any, batch_size: int, rows: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Sparse, in a width that is a power of two: [rows, 0] without any bias."""
    biases = [bias] * batch_size if bias is None or isinstance(bias, Mapping) else bias
    biases = [dict(one or {}) for one in _per_sequence("logit_bias", biases, batch_size)]
    widest = max(map(len, biases), default=0)
    width = max(8, 1 << (widest - 1).bit_length()) if widest else 0
    ids, values = np.full((rows, width), vocab_size, np.int32), np.zeros((rows, width), np.float32)
    for row, one in enumerate(biases):
        for column, (token, value) in enumerate(one.items()):
            if not isinstance(token, numbers.Integral) or not 0 <= int(token) < vocab_size:
                raise UserError(f"logit_bias is for token {token!r}; ids go from 0 to {vocab_size - 1}")
            if math.isnan(value) or value == math.inf:
                raise UserError(f"logit_bias of token {token} is {value}; it must be a number, or -inf to ban it")
            ids[row, column], values[row, column] = token, value
    return {"bias_ids": ids, "bias_values": values}
