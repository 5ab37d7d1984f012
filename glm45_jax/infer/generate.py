"""Prompts in, answers out: `generate`, `generate_detailed`, and `stream` for text as it comes.

Prompts of different lengths are padded on the right; numbers of rows, prompt lengths and cache capacities are rounded
up, so that a few compiled programs serve all (`loop.py`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack

import jax
import numpy as np

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.infer.loop import Controls, State, advance, start
from glm45_jax.infer.sampling import SamplingOptions, sampling_params
from glm45_jax.infer.text_stop import StoppableText, check_stop_strings
from glm45_jax.model import Params
from glm45_jax.parallel import device_in_force
from glm45_jax.text import Tokenizer

_CHECK_EVERY = 16  # tokens between looks for stop strings
_PIECE_SECONDS = 0.1  # a stream decodes about as long between two looks at what has come


@dataclasses.dataclass(frozen=True)
class Generation:
    """One prompt's answer."""

    prompt: list[int]
    answer: list[int]
    """New tokens: with the stop id that ended them, or all tokens of the stop string."""
    logprobs: list[float]
    """Of each new token in the model's own distribution: before penalties, bias, temperature and filters."""
    finish_reason: Literal["stop", "length"]
    text: str | None
    """The answer without the stop id and cut before the stop string; None without a tokenizer."""

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.answer


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 24,
    *,
    stop_ids: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Unpack[SamplingOptions],
) -> list[list[int]]:
    """Continues prompts, greedily unless told otherwise. The result of one does not depend on the others beside it.

    Args:
      prompts: token ids, of any lengths.
      max_new_tokens: fewer where the context of the model, `max_position_embeddings`, ends before.
      stop_ids: tokens that end an answer; None: the config's `eos_token_id`; empty: none.
      stop_strings: texts that end an answer; they need the tokenizer.
      tokenizer: ids that it does not have (padded rows) are never chosen, like those from `config.real_vocab_size` on.
      **options: `SamplingOptions`: temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
        frequency_penalty, logit_bias, seed; one value, or a list with one for each prompt.

    Returns:
      For each prompt its tokens and the new ones, the stop id (or the tokens of the stop string) included.

    Raises:
      UserError: a prompt that is empty, too long or outside the vocabulary; an option outside its range.
    """
    generations = generate_detailed(
        params, config, prompts, max_new_tokens,
        stop_ids=stop_ids, stop_strings=stop_strings, tokenizer=tokenizer, **options,
    )  # fmt: skip
    return [generation.tokens for generation in generations]


def generate_detailed(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 24,
    *,
    stop_ids: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Generation]:
    """As `generate`, with log-probabilities, the reason why each answer ended, and its text."""
    stops = check_stop_strings(stop_strings)
    if stops and tokenizer is None:
        raise UserError("stop_strings are looked for in text: pass the tokenizer too")
    batch = _prepare(config, prompts, max_new_tokens, stop_ids, tokenizer, options)
    texts = [StoppableText(tokenizer, stops) for _ in batch.prompts] if tokenizer else []
    read = [0] * len(batch.prompts)
    run = _Run(params, config, batch)
    for answers, done in run.chunks(_CHECK_EVERY if stops else max_new_tokens):
        for row, text in enumerate(texts):
            read[row] = _read_text(text, answers[row], read[row], batch, done[row])
            if text.stopped:
                run.halt(row, read[row])
    return run.results([text.text for text in texts] if tokenizer else None)


class TextStream(Iterator[str]):
    """Pieces of an answer's text, made as they are asked for.

    Attributes:
      result: the whole `Generation`, once the pieces have ended; None before.
    """

    def __init__(self, run: _Run, text: StoppableText):
        self.result: Generation | None = None
        self._pieces = self._generate(run, text)

    def __next__(self) -> str:
        return next(self._pieces)

    def _generate(self, run: _Run, text: StoppableText) -> Iterator[str]:
        read = 0
        for (answer,), (done,) in run.chunks(None):
            before = len(text.text)
            read = _read_text(text, answer, read, run.batch, done)
            if text.stopped:
                run.halt(0, read)
            if piece := text.text[before:]:
                yield piece
        (self.result,) = run.results([text.text])


def stream(
    params: Params,
    config: ModelConfig,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    max_new_tokens: int = 24,
    *,
    stop_ids: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    **options: Unpack[SamplingOptions],
) -> TextStream:
    """The answer to one prompt in pieces of text, never half a character nor any of a stop string.

    The arguments are those of `generate`. The pieces joined are the `text` of `generate_detailed`.
    """
    batch = _prepare(config, [prompt], max_new_tokens, stop_ids, tokenizer, options)
    return TextStream(_Run(params, config, batch), StoppableText(tokenizer, check_stop_strings(stop_strings)))


def _read_text(text: StoppableText, answer: list[int], read: int, batch: _Batch, done: bool) -> int:
    """Pushes the tokens from number `read` on; returns up to where the answer was read, a stop string's end at most."""
    for number in range(read, len(answer)):
        if answer[number] in batch.stop_ids:  # always the last
            break
        text.push(answer[number])
        if text.stopped:
            return number + 1
    if done:
        text.finish()
    return len(answer)


# --- a batch ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Checked and padded: what the compiled programs take."""

    prompts: list[list[int]]
    stop_ids: frozenset[int]
    tokens: np.ndarray  # [B, S]
    controls: Controls
    capacity: int

    @property
    def limit(self) -> int:
        return int(self.controls.limits.max())


def _prepare(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: int | Sequence[int] | None,
    tokenizer: Tokenizer | None,
    options: SamplingOptions,
) -> _Batch:
    rows = [check_prompt(prompt, i, config) for i, prompt in enumerate(_check_list(prompts))]
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, 0 or more")
    stops = config.eos_token_id if stop_ids is None else stop_ids
    stops = [int(stop) for stop in np.atleast_1d(np.asarray(stops, np.int64))]
    count, longest = _round_up_rows(len(rows)), max(map(len, rows), default=1)
    slots = round_up(longest)
    tokens = np.zeros((count, slots), np.int32)
    lengths, limits = np.ones(count, np.int32), np.zeros(count, np.int32)
    for i, prompt in enumerate(rows):
        tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
        limits[i] = min(max_new_tokens, config.max_position_embeddings - len(prompt))
    arrays: dict[str, Any] = {
        "lengths": lengths,
        "limits": limits,
        "stop_ids": np.array(stops + [-1] * (-len(stops) % 8), np.int32),
        "vocab_size": np.int32(real_vocab_size(config, tokenizer)),
    }
    controls = Controls(sampling=sampling_params(len(rows), config.vocab_size, count, options), **arrays)
    return _Batch(rows, frozenset(stops), tokens, controls, round_up(max(slots, int((lengths + limits).max()))))


def _check_list(prompts: Any) -> Sequence[Any]:
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise UserError("prompts is a list with a list of token ids per prompt; Tokenizer.encode makes them of text")
    return prompts


def check_prompt(prompt: Any, number: int, config: ModelConfig) -> list[int]:
    ids = None if isinstance(prompt, str) else np.asarray(prompt)
    if ids is None or ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(f"prompts[{number}] is not a list of token ids; Tokenizer.encode makes them of text")
    if not ids.size:
        raise UserError(f"prompts[{number}] is empty; at least one token is needed to go on from")
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise UserError(f"prompts[{number}] holds token {outside[0]}; ids go from 0 to {config.vocab_size - 1}")
    if ids.size >= config.max_position_embeddings:
        raise UserError(
            f"prompts[{number}] has {ids.size} tokens; the model's context of {config.max_position_embeddings} "
            "leaves no room for an answer"
        )
    return ids.tolist()


def real_vocab_size(config: ModelConfig, tokenizer: Tokenizer | None) -> int:
    sizes = (config.vocab_size, config.real_vocab_size, tokenizer.vocab_size if tokenizer else None)
    return min(size for size in sizes if size is not None)


def round_up(size: int) -> int:
    """The next of few sizes: powers of two from 16 to 256, then four an octave."""
    power = max(16, 1 << (size - 1).bit_length())
    step = power if power <= 256 else power // 8
    return -(-size // step) * step


def _round_up_rows(count: int) -> int:
    return 1 << (max(count, 1) - 1).bit_length() if count <= 8 else -(-count // 8) * 8


class _Run:
    """One batch on its way: steps the compiled programs and keeps what the host knows of the answers."""

    def __init__(self, params: Params, config: ModelConfig, batch: _Batch):
        self._params, self._config, self.batch = params, config, batch
        self._halted = np.zeros(len(batch.tokens), bool)
        self._halted_at: dict[int, int] = {}
        self._answers: list[list[int]] = [[] for _ in batch.prompts]
        self._logprobs = np.zeros((len(batch.prompts), 0))

    def halt(self, row: int, length: int) -> None:
        """Ends a row after `length` tokens."""
        self._halted[row] = True
        self._halted_at.setdefault(row, length)

    def chunks(self, size: int | None) -> Iterator[tuple[list[list[int]], list[bool]]]:
        """Yields all answers so far, and whether each has ended: after every `size` tokens, or about every 0.1 s."""
        batch = self.batch
        if batch.limit == 0:
            return
        penalties = batch.controls.sampling.uses_penalties
        with device_in_force(self._params):
            state = start(
                self._params, self._config, batch.tokens, batch.controls, capacity=batch.capacity, penalties=penalties
            )
        reached, pace = 1, 1
        while True:
            self._fetch(state)
            yield self._answers, [bool(done) for done in self._done[: len(batch.prompts)]]
            if (self._done | self._halted).all() or reached >= batch.limit:
                return
            begin = time.monotonic()
            steps = size or pace
            reached = min(reached + steps, batch.limit)
            with device_in_force(self._params):
                state = advance(self._params, self._config, state, batch.controls, np.int32(reached), self._halted)
            if size is None:
                jax.block_until_ready(state.step)
                pace = _new_pace(pace, time.monotonic() - begin)

    def _fetch(self, state: State) -> None:
        # np.array copies: a view would keep the buffer from being reused by the next step
        answer, count, self._done = np.array(state.answer), np.array(state.count), np.array(state.done)
        self._logprobs = np.array(state.logprobs)
        self._answers = [answer[row, : count[row]].tolist() for row in range(len(self.batch.prompts))]

    def results(self, texts: list[str] | None) -> list[Generation]:
        out = []
        for row, prompt in enumerate(self.batch.prompts):
            answer = self._answers[row][: self._halted_at.get(row)]
            logprobs = self._logprobs[row, : len(answer)].tolist()
            if any(map(math.isnan, logprobs)):
                raise UserError(
                    f"prompts[{row}]: the model's logits are not numbers from token {len(prompt)} on; "
                    "the checkpoint is damaged, or the dtype it is computed in too narrow"
                )
            stopped = row in self._halted_at or (bool(answer) and answer[-1] in self.batch.stop_ids)
            text = texts[row] if texts is not None else None
            out.append(Generation(prompt, answer, logprobs, "stop" if stopped else "length", text))
        return out


def _new_pace(pace: int, seconds: float) -> int:
    """Steps to take next, at most twice as many: about what fits `_PIECE_SECONDS`."""
    return max(1, min(2 * pace, 64, int(pace * _PIECE_SECONDS / max(seconds, 1e-6))))
