"""What a run reads: sources, how each is packed into rows, and in which shares they are mixed."""

from __future__ import annotations

import dataclasses
from typing import Literal

from glm45_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One kind of records from some files."""

    path: tuple[str, ...]  # files, directories (all files below, hidden ones apart) or globs with **
    kind: Literal["auto", "text", "jsonl", "array_record"] = "auto"  # auto: by the files' suffix
    record: Literal["json", "int32", "uint16"] = "json"  # of ArrayRecord: JSON objects, or bare little-endian tokens
    weight: float = 1.0  # share of this source's rows, and so of its tokens, in the mixture
    # concat: documents end to end, cut where a row ends, no padding (pre-training); best_fit: documents whole, rows
    # filled up with padding (mid-training, fine-tuning)
    packing: Literal["concat", "best_fit"] = "concat"
    # best_fit, documents longer than a row: keep the first row, cut into rows, or leave the document out
    overlong: Literal["truncate", "split", "drop"] = "truncate"
    on_error: Literal["fatal", "skip"] = "fatal"  # unreadable records; skipped ones are counted
    chunk_bytes: int = 65536  # text files are read in documents of about this size, cut at line ends

    def __post_init__(self) -> None:
        if isinstance(self.path, str):
            object.__setattr__(self, "path", (self.path,))
        if not self.path:
            raise UserError("a data source needs a path: a file, a directory or a glob")
        if not self.weight > 0:
            raise UserError(f"data source {self.path[0]}: weight is {self.weight}, it must be positive")
        if self.chunk_bytes < 1:
            raise UserError(f"data source {self.path[0]}: chunk_bytes must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A mixture of sources. Everything that decides what a batch holds, apart from its shape and the seed."""

    sources: tuple[SourceConfig, ...]
    shuffle: bool = True  # anew in every epoch
    epochs: int | None = None  # times through each source; the data end with the first that ends. None: no end
    append_eos: bool = True  # <|endoftext|> after each document of text
    loss_on: Literal["assistant", "all"] = "assistant"  # of conversations: which tokens are targets
    prefetch: int = 2  # batches made ahead by a thread; 0 for none

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data.sources is empty: name at least one source")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"data.epochs is {self.epochs}, it must be at least 1, or null for no end")
        if self.prefetch < 0:
            raise UserError("data.prefetch is negative")
