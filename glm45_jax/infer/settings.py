"""What the choice of tokens needs of each row's request, as arrays: sampling, penalties, and masks of grammars."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

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
        self._pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), "glm45-masks")

    def close(self) -> None:
        self._pool.shutdown()

    @staticmethod
    def kind(requests: Sequence[Request]) -> Kind:
        """What the requests of a step ask for."""
        if any(r.sampling.uses_penalties or r.sampling.bias_ids.shape[1] for r in requests):
            return "all"
        return "masks" if any(r.constraint is not None for r in requests) else "plain"

    def sampling(self, requests: Sequence[Request], rows: int, kind: Kind) -> SamplingParams:
        """The requests' settings, and neutral ones for the rows behind them."""
        each = [request.sampling for request in requests] + [self._padding] * (rows - len(requests))
        width = MOST_BIASES if kind == "all" else 0
        wide = lambda x, fill: np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill)  # noqa: E731
        fields = {}
        for field in dataclasses.fields(SamplingParams):
            values = [getattr(s, field.name) for s in each]
            if field.name in ("bias_ids", "bias_values"):
                fill = self._vocab_size if field.name == "bias_ids" else 0
                values = [wide(x, fill) for x in values]
            fields[field.name] = np.concatenate(values)
        return SamplingParams(**fields)

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
