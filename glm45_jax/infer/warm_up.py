"""Steps that read nothing, of every size that an engine takes: to compile by, and to see how long drafts take."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from glm45_jax.infer.options import EngineOptions
from glm45_jax.infer.programs import Choice, Programs
from glm45_jax.infer.sampling import SamplingParams
from glm45_jax.infer.settings import KINDS
from glm45_jax.infer.steps import Reading

_TIMED_ROUNDS, _TIMED_STEPS = 5, 4  # of each kind and number of rows


@dataclasses.dataclass(frozen=True)
class Empty:
    """An engine's steps without requests; what they write goes to its spare page.

    Attributes:
      reading: of so many rows and tokens.
      choice: of so many rows with so many drafts, of one of `KINDS`; and whether with the likeliest tokens.
      vocab_size: of tokens that are read.
    """

    options: EngineOptions
    reading: Callable[[int, int], Reading]
    choice: Callable[..., Choice]
    vocab_size: int

    def steps(self) -> Iterator[tuple[Reading, int, Choice | SamplingParams]]:
        """Of all sizes, and for each number of rows of all kinds: they call every program that a step may call."""
        for most in sorted({0, self.options.drafts}):
            seen: set[int] = set()
            for rows, tokens in self.options.sizes(most):
                for kind in KINDS[: 1 if rows in seen else None]:
                    yield self.reading(rows, tokens), most, self.choice(rows, most, kind, kind == "plain")
                if self.options.decodes(tokens, rows, most):
                    yield self.reading(rows, tokens), most, self.choice(rows, most, "plain", False).sampling
                seen.add(rows)

    def run(self, programs: Programs) -> None:
        """Takes all `steps`, as an engine does."""
        for reading, most, choice in self.steps():
            if isinstance(choice, SamplingParams):
                programs.step(reading, most, choice)
            else:
                programs.read(reading, most)
                programs.choose(choice)

    def seconds(self, programs: Programs, rows: int) -> list[float]:
        """Of a step that decodes so many sequences, without drafts and with them: medians, taken in turns."""
        both = 0, self.options.drafts
        times: dict[int, list[float]] = {most: [] for most in both}
        for most in both * _TIMED_ROUNDS:
            reading, sampling = self._decoding(rows, most), self.choice(rows, most, "plain", False).sampling
            began, before = time.monotonic(), None
            for _ in range(_TIMED_STEPS):  # each is given before the one before is looked at, as in service
                outcome = programs.step(reading, most, sampling)
                if before is not None:
                    np.asarray(before.chosen.tokens if before.drafted is None else before.drafted.accepted)
                before = outcome
            programs.wait()
            times[most].append((time.monotonic() - began) / _TIMED_STEPS)
        return [statistics.median(times[most]) for most in both]

    def _decoding(self, rows: int, most: int) -> Reading:
        """Of tokens as they come: the same everywhere would ask for the same few experts."""
        width = 1 + most
        return self.reading(rows, rows * width)._replace(
            tokens=np.random.default_rng(0).integers(0, self.vocab_size, rows * width, dtype=np.int32),
            starts=np.arange(rows + 1, dtype=np.int32) * width, lengths=np.full(rows, width, np.int32),
            drafts=np.full(rows, most, np.int32), chooses=np.ones(rows, bool), num_rows=np.int32(rows),
        )  # fmt: skip
