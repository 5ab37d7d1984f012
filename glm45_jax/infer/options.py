"""The sizes of an engine, and of the programs that its steps take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError

_LEAST_TOKENS = 16  # of a step that reads prompts
_FEW_ROWS = 4


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How much is served at once."""

    slots: int = 32
    """Sequences at work at the same time."""
    cache_tokens: int = 32768
    """Tokens for which there is room in the cache, of all sequences together."""
    page_size: int = 16
    """Tokens of a page; beginnings are shared by whole pages."""
    step_tokens: int = 256
    """Tokens that a step reads at most: prompts are cut into chunks of so many."""
    drafts: int = 0
    """Tokens that the MTP layer drafts ahead of each sequence, where it pays; answers stay the same."""
    prefix_cache: bool = True
    """Whether sequences share the pages of a common beginning."""
    cache_dtype: str | None = None
    """Of keys and values; None: as the model computes; "int8" and "fp8" by `calibrate.py`, in pages of 32 or more."""
    warm_up: bool = True
    """Compile all sizes of steps at the start."""

    def check(self, config: ModelConfig) -> None:
        """Raises `UserError` for sizes that do not go together."""
        for name in ("slots", "cache_tokens", "page_size", "step_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.drafts and not config.has_mtp:
            raise UserError("this model has no MTP layer to draft with: set drafts to 0")
        if self.drafts < 0 or self.slots * (1 + self.drafts) > self.step_tokens:
            raise UserError(
                f"step_tokens ({self.step_tokens}) must be at least slots ({self.slots}) times (1 + drafts), and "
                f"drafts ({self.drafts}) 0 or more: all decode in one step"
            )

    # --- sizes of programs ---------------------------------------------------------------------------------------

    def size(self, rows: int, tokens: int, most: int) -> tuple[int, int]:
        """Rows and tokens of the program that a step takes."""
        n, r = min((n, r) for r, n in self.sizes(most) if r >= rows and n >= tokens)
        return r, n

    @staticmethod
    def decodes(tokens: int, rows: int, most: int) -> bool:
        """Whether programs of a size are those that only decode."""
        return tokens == rows * (1 + most)

    def all_rows(self) -> Iterator[int]:
        """Of the programs that only decode."""
        return _doubling(1, self.slots)

    def rows(self, rows: int) -> int:
        """Of the program that decodes so many sequences."""
        return next(r for r in self.all_rows() if r >= min(rows, self.slots))

    def sizes(self, most: int) -> Iterator[tuple[int, int]]:
        """For decoding as many tokens as rows and their drafts; for prompts few rows or all."""
        slots, last = self.slots, self.step_tokens
        for rows in self.all_rows():
            yield rows, rows * (1 + most)
        for tokens in _doubling(_LEAST_TOKENS, last) if last > _LEAST_TOKENS else (last,):
            for rows in sorted({min(_FEW_ROWS, slots), slots}):
                if tokens > rows * (1 + most) or tokens == last:
                    yield rows, tokens


def _doubling(first: int, last: int) -> Iterator[int]:
    """Powers of two times `first` below `last`, and `last`."""
    while first < last:
        yield first
        first *= 2
    yield last
