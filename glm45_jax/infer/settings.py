"""What the choice of tokens needs of each row's request, as arrays: sampling, penalties, and masks of grammars."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from glm45_jax.infer.request import Request
from glm45_jax.infer.sampling import SamplingParams, TokenCounts, sampling_params
from glm45_jax.infer.schedule import Part
from glm45_jax.infer.steps import Special

MOST_BIASES = 1024  # logits of a request's that have one

Kind = Literal["plain", "masks", "all"]
KINDS: tuple[Kind, ...] = ("plain", "masks", "all")


class Settings:
    """Of one engine's steps. `kind` says which of three programs a step takes: most need neither masks nor counts."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._padding = sampling_params(1, vocab_size)
        self._last: tuple[Any, SamplingParams] | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), "glm45-masks")

    def close(self) -> None:
        self._pool.shutdown()

    @staticmethod
    def kind(requests: Sequence[Request]) -> Kind:
        """What the requests of a step ask for."""
        if any(r.adjusts_logits for r in requests):
            return "all"
        return "masks" if any(r.constraint is not None for r in requests) else "plain"

    def sampling(self, requests: Sequence[Request], rows: int, kind: Kind) -> SamplingParams:
        """The requests' settings, and neutral ones for the rows behind them.

        Mostly a step has the requests of the one before: then their settings are kept.
        """
        key = tuple(request.sequence.number for request in requests), rows, kind
        if self._last is None or self._last[0] != key:
            self._last = key, self._together(requests, rows, MOST_BIASES if kind == "all" else 0)
        return self._last[1]

    def _together(self, requests: Sequence[Request], rows: int, width: int) -> SamplingParams:
        each = [request.sampling for request in requests] + [self._padding] * (rows - len(requests))
        ids, values = np.full((rows, width), self._vocab_size, np.int32), np.zeros((rows, width), np.float32)
        for row, one in enumerate(each if width else ()):
            ids[row, : one.bias_ids.shape[1]], values[row, : one.bias_values.shape[1]] = one.bias_ids, one.bias_values
        names = [field.name for field in dataclasses.fields(SamplingParams) if not field.name.startswith("bias_")]
        fields = {name: np.concatenate([getattr(one, name) for one in each]) for name in names}
        return SamplingParams(**fields, bias_ids=ids, bias_values=values)

    def special(
        self, parts: Sequence[Part], requests: Sequence[Request], rows: int, choices: int, kind: Kind
    ) -> Special | None:
        """Counts and masks, computed while the device reads what the step has to read."""
        if kind == "plain":
            return None
        counts = self._counts(requests, rows) if kind == "all" else None
        return Special(counts, self._masks(parts, requests, rows, choices))

    def _counts(self, requests: Sequence[Request], rows: int) -> TokenCounts:
        shape = rows, self._vocab_size
        in_prompt, in_answer = np.zeros(shape, bool), np.zeros(shape, np.int32)
        for row, request in enumerate(requests):
            if request.sampling.uses_penalties:  # all tokens are known: such a sequence is alone
                sequence = request.sequence
                in_prompt[row, sequence.tokens[: sequence.prompt_length]] = True
                np.add.at(in_answer[row], sequence.tokens[sequence.prompt_length :], 1)
        return TokenCounts(in_prompt, in_answer)

    def _masks(
        self, parts: Sequence[Part], requests: Sequence[Request], rows: int, choices: int
    ) -> np.ndarray:  # [rows * choices, V/32]
        masks = np.full((rows, choices, -(-self._vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        work = [
            (request.constraint, masks[row], part.drafts)
            for row, (part, request) in enumerate(zip(parts, requests))
            if part.chooses and request.constraint is not None
        ]
        if len(work) == 1:
            work[0][0].fill(*work[0][1:])
        else:  # llguidance computes without Python's lock
            list(self._pool.map(lambda one: one[0].fill(*one[1:]), work))
        return masks.reshape(rows * choices, -1)


def without_biases(sampling: SamplingParams) -> SamplingParams:
    """For drafts."""
    rows = sampling.seed.shape[0]
    empty = {"bias_ids": np.zeros((rows, 0), np.int32), "bias_values": np.zeros((rows, 0), np.float32)}
    return dataclasses.replace(sampling, **empty)
