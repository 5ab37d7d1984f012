"""The records of one source as tokens, by their number in its stream, with what leaves one out.

A document is one int32 array; a token that is no target stands as its bitwise complement, which is negative, so that
packing moves one array and not two.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Bool, Int

from glm45_jax.data.config import DataConfig, SourceConfig
from glm45_jax.data.encode import encode_record
from glm45_jax.data.fim import check_tokens, draw_cuts
from glm45_jax.data.sources import RecordError, open_source
from glm45_jax.errors import UserError
from glm45_jax.text import Tokenizer

Signed = Int[np.ndarray, " n"]
_SHUFFLED_AT_MOST = 2**32  # grain's permutations are of 32-bit numbers

logger = logging.getLogger(__name__)


def signed(tokens: Int[np.ndarray, "*shape"], targets: Bool[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    return np.where(targets, tokens, ~tokens).astype(np.int32)


def unsigned(row: Int[np.ndarray, "*shape"]) -> tuple[Int[np.ndarray, "*shape"], Bool[np.ndarray, "*shape"]]:
    """Tokens, and which of them are targets."""
    return np.where(row < 0, ~row, row), row >= 0


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers with equal ids."""
    digest = xxhash.xxh3_64()
    for token, id_ in sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items()):
        digest.update(f"{id_} {token}\0".encode())
    return f"xxh3:{digest.hexdigest()}"


class TokenRecords:
    """One source's records. Shared by all shards of the process, and by their threads."""

    def __init__(
        self, config: SourceConfig, number: int, tokenizer: Tokenizer | None, data: DataConfig,
        vocab_size: int | None, seq_len: int, seed: int,
    ) -> None:  # fmt: skip
        if config.fim_rate:
            check_tokens(tokenizer, f"data source {config.name}")
        self.source = open_source(config)
        self._config, self._tokenizer, self._data, self._vocab_size = config, tokenizer, data, vocab_size
        self.name = config.name
        self._key = (seed, number)
        self._longest = seq_len if config.packing == "best_fit" and config.overlong == "drop" else None
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._check()

    def __len__(self) -> int:
        return len(self.source)

    def at(self, position: Any, record: Any) -> Signed | str:
        """Record number `record` at a position of the endless stream; a reason in a word where it is left out.

        Raises:
          UserError: it cannot be used, and such records are fatal.
        """
        index = int(record)
        try:
            tokens, targets = encode_record(
                self.source[index],
                self._tokenizer,
                append_eos=self._data.append_eos,
                loss_on=self._data.loss_on,
                vocab_size=self._vocab_size,
                cuts=draw_cuts(
                    self._config.fim_rate, self._config.fim_spm_rate, (*self._key, int(position) // len(self), index)
                ),
            )
        except RecordError as error:
            if self._config.on_error == "fatal":
                raise UserError(
                    f"{self.source.place(index)}: {error}. Mend the record, or skip such records with on_error: skip"
                ) from error
            return self._leave_out(index, error.reason, str(error))
        if not len(tokens):
            return self._leave_out(index, "empty", "it is empty")
        if self._longest is not None and len(tokens) > self._longest:
            return self._leave_out(index, "too long", f"its {len(tokens)} tokens are more than a row")
        return signed(tokens, targets)

    def nothing_usable(self, tried: int, reasons: dict[str, int]) -> UserError:
        """The error where a shard has met unusable records alone for too long."""
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        return UserError(
            f"data source {self.name}: none of the last {tried} records read can be used ({why} so far); "
            "on_error: fatal names the first of them"
        )

    def _leave_out(self, index: int, reason: str, why: str) -> str:
        with self._lock:
            first = reason not in self._said
            self._said.add(reason)
        if first:
            logger.warning("%s is left out: %s (more of the kind are counted only)", self.source.place(index), why)
        return reason

    def _check(self) -> None:
        name = f"data source {self.name}"
        if self._data.shuffle and len(self) > _SHUFFLED_AT_MOST:
            raise UserError(f"{name}: {len(self)} records are too many to shuffle; make several sources of it")
        if self._data.shuffle and not getattr(self.source, "fits_memory", True):
            logger.warning("%s: Parquet of this size is slow to read at random; `glm45 tokenize` it first", name)
        made_with = getattr(self.source, "about", {}).get("tokenizer")
        if made_with and self._tokenizer is not None and made_with != tokenizer_digest(self._tokenizer):
            raise UserError(f"{name}: its tokens are of another tokenizer than this run's; tokenize it again with it")
