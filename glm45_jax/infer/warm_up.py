"""Steps that read nothing, of every size that an engine takes: to compile by, and to see how long drafts take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from glm45_jax.infer.options import EngineOptions
from glm45_jax.infer.programs import Choice, Programs
from glm45_jax.infer.settings import KINDS
from glm45_jax.infer.steps import Reading

_TIMED_STEPS = 8  # of each kind and number of rows


@dataclasses.dataclass(frozen=True)
class Empty:
    """An engine's steps without requests; what they write goes to its spare page.

    Attributes:
      reading: of so many rows and tokens.
      choice: of so many rows with so many drafts, of one of `KINDS`; and whether with the likeliest tokens.
    """

    options: EngineOptions
    reading: Callable[[int, int], Reading]
    choice: Callable[..., Choice]

    def steps(self) -> Iterator[tuple[Reading, int, Choice]]:
        """Of all sizes, and for each number of rows of all kinds: they call every program that a step may call."""
        for most in sorted({0, self.options.drafts}):
            seen: set[int] = set()
            for rows, tokens in self.options.sizes(most):
                for kind in KINDS[: 1 if rows in seen else None]:
                    yield self.reading(rows, tokens), most, self.choice(rows, most, kind, kind == "plain")
                seen.add(rows)

    def seconds(self, programs: Programs, rows: int) -> list[float]:
        """Of a step that decodes so many sequences, without drafts and with them."""
        found = []
        for most in (0, self.options.drafts):
            width = 1 + most
            reading = self.reading(rows, rows * width)._replace(
                starts=np.arange(rows + 1, dtype=np.int32) * width, lengths=np.full(rows, width, np.int32),
                drafts=np.full(rows, most, np.int32), chooses=np.ones(rows, bool), num_rows=np.int32(rows),
            )  # fmt: skip
            began = time.monotonic()
            for _ in range(_TIMED_STEPS):
                programs.read(reading, most)
                programs.choose(self.choice(rows, most, "plain", False))
            programs.wait()
            found.append((time.monotonic() - began) / _TIMED_STEPS)
        return found
