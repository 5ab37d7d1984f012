"""What a run reads: sources, how each is packed into rows, and in which shares they are mixed."""

from __future__ import annotations

import dataclasses
from typing import Literal

from glm45_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One kind of records from some files."""

    # files, directories (all files below, hidden ones apart) or globs with **; local, or gs:// and others by fsspec
    path: tuple[str, ...]
    kind: Literal["auto", "text", "jsonl", "parquet", "array_record"] = "auto"  # auto: by the files' suffix
    # of ArrayRecord: JSON objects; `tokens`, what `glm45 tokenize` writes; or bare little-endian tokens. auto: what the
    # dataset.json beside the files says, else JSON
    record: Literal["auto", "json", "tokens", "int32", "uint16"] = "auto"
    weight: float = 1.0  # share of this source's rows, and so of its tokens, in the mixture
    # concat: documents end to end, cut where a row ends, no padding: random truncation, for pre-training; best_fit:
    # documents whole, rows filled up with padding, for mid-training and fine-tuning
    packing: Literal["concat", "best_fit"] = "concat"
    # best_fit, documents longer than a row: keep the first row, cut into rows, or leave the document out
    overlong: Literal["truncate", "split", "drop"] = "truncate"
    fim_rate: float = 0.0  # share of this source's documents that are turned round to fill in the middle, for code
    fim_spm_rate: float = 0.5  # share of those with the suffix first; the others begin with the prefix
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
        for name in ("fim_rate", "fim_spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data source {self.path[0]}: {name} is {getattr(self, name)}, it must lie in 0..1")

    @property
    def name(self) -> str:
        """For people: the first path, and how many more there are."""
        return self.path[0] + (f" and {len(self.path) - 1} more" if len(self.path) > 1 else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A mixture of sources. Everything that decides what a batch holds, apart from its shape and the seed."""

    sources: tuple[SourceConfig, ...]
    shuffle: bool = True  # anew in every epoch
    epochs: int | None = None  # times through each source; a shard ends with the first that ends. None: no end
    append_eos: bool = True  # <|endoftext|> after each document of text
    loss_on: Literal["assistant", "all"] = "assistant"  # of conversations: which tokens are targets
    # logical shards that the stream is cut into, whatever the number of processes; must divide every batch size of the
    # run. None: the largest divisor of the batch size up to 64
    shards: int | None = None
    prefetch: int = 2  # batches made ahead by threads; 0 for none

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data.sources is empty: name at least one source")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"data.epochs is {self.epochs}, it must be at least 1, or null for no end")
        if self.shards is not None and self.shards < 1:
            raise UserError(f"data.shards is {self.shards}, it must be at least 1, or null to choose by the batch size")
        if self.prefetch < 0:
            raise UserError("data.prefetch is negative")
