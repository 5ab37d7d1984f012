"""Random access to the records of files: documents of text files, lines of JSONL, rows of Parquet, ArrayRecord.

A source has a length, gives record `i` as a dict (`text`, `messages` or `tokens`), and says in which place of which
file it stands. What is wrong with one record is a `RecordError`, which the pipeline turns into an error that names
the place, or into a count of skipped records.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import xxhash
from array_record.python.array_record_data_source import ArrayRecordDataSource

from glm45_jax.data.config import SourceConfig
from glm45_jax.data.files import ABOUT, File, find_files, some
from glm45_jax.errors import UserError

Record = dict[str, Any]
_SCAN_BYTES = 1 << 24
_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".array_record": "array_record",
    ".arrayrecord": "array_record",
}  # fmt: skip
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}


class RecordError(Exception):
    """One record cannot be used; the message says why, without the place, and `reason` in a word, for counting."""

    def __init__(self, message: str, reason: str = "malformed"):
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[0]


class Source(Protocol):
    """Records by number, those of one file after those of another."""

    files: list[File]
    ends: list[int]  # of each file, the number of the first record behind it

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...

    def place(self, index: int) -> str:
        """Where record `index` stands, for a person: file and line, byte or record number."""
        ...


def open_source(config: SourceConfig) -> Source:
    """The records of one source.

    Raises:
      UserError: nothing at a path, files of several kinds, a file that is not what its suffix says, or no records.
    """
    return open_files(config, find_files(config.path))


def open_files(config: SourceConfig, files: list[File]) -> Source:
    """The records of some of a source's files."""
    kind = _kind(config, files)
    if kind == "jsonl":
        source: Source = JsonLines(files)
    elif kind == "parquet":
        from glm45_jax.data.parquet import ParquetFiles

        source = ParquetFiles(files)
    elif kind == "array_record":
        source = ArrayRecords(files, config.record)
    else:
        source = TextFiles(files, config.chunk_bytes)
    if not len(source):
        raise UserError(f"no records in {some(files)}: {'they are' if len(files) > 1 else 'it is'} empty")
    return source


def fingerprint(config: SourceConfig) -> str:
    """A digest of the files' names and sizes and of how they become rows: equal for equal data."""
    digest = xxhash.xxh3_64()
    for file in find_files(config.path):
        digest.update(f"{file.name}\0{file.size}\0".encode())
    how = (
        config.kind, config.record, config.packing, config.overlong, config.chunk_bytes, config.weight,
        config.fim_rate, config.fim_spm_rate,
    )  # fmt: skip
    digest.update(repr(how).encode())
    return digest.hexdigest()


class TextFiles:
    """Plain text, UTF-8. A file of up to about `chunk_bytes` is one document, a longer one several, cut at line ends.

    Nothing is read to find the borders: document k of a file runs from the first line that begins at or after byte
    k * chunk_bytes to where document k + 1 begins. One of them may so be empty.
    """

    def __init__(self, files: Sequence[File], chunk_bytes: int):
        self.files = [file for file in files if file.size]
        self._chunk = chunk_bytes
        self.ends = list(itertools.accumulate(-(-file.size // chunk_bytes) for file in self.files))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Record:
        file, part = locate(self, index)
        start, end = self._border(file, part * self._chunk), self._border(file, (part + 1) * self._chunk)
        raw = file.read(start, end)
        try:
            return {"text": raw.decode("utf-8"), "complete": end == file.size}
        except UnicodeDecodeError as error:
            message = f"not UTF-8 text: byte {start + error.start} is {raw[error.start]:#04x}"
            raise RecordError(message, "unreadable") from None

    def place(self, index: int) -> str:
        file, part = locate(self, index)
        return f"{file}" + (f", near byte {part * self._chunk}" if part else "")

    def _border(self, file: File, at: int) -> int:
        """Where the first line at or after byte `at` begins; without one nearby, the next whole character."""
        if at <= 0 or at >= file.size:
            return min(max(at, 0), file.size)
        # holds a whole character in any case
        block = file.read(at - 1, min(at - 1 + max(self._chunk, 8), file.size))
        newline = block.find(b"\n")
        if newline >= 0:
            return at + newline
        after = next((i for i, byte in enumerate(block[1:]) if byte & 0xC0 != 0x80), 0)
        return at + after


class JsonLines:
    """One JSON object per line. Opening scans the files once for the line ends; blank lines are no records."""

    def __init__(self, files: Sequence[File]):
        self.files = list(files)
        tables = [_line_table(file) for file in files]
        self._starts = np.concatenate([table[0] for table in tables])
        self._ends = np.concatenate([table[1] for table in tables])
        self._lines = np.concatenate([table[2] for table in tables])
        self.ends = list(itertools.accumulate(len(table[0]) for table in tables))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        file, _ = locate(self, index)
        return parse_json(file.read(int(self._starts[index]), int(self._ends[index])))

    def place(self, index: int) -> str:
        return f"{locate(self, index)[0]}:{self._lines[index]}"


class ArrayRecords:
    """ArrayRecord files of JSON objects or of tokens.

    `tokens` are little-endian int32, one that is no target as its bitwise complement; `int32` and `uint16` bare.
    The library opens `gs://` paths by itself, with the machine's credentials, and no other remote ones.
    """

    def __init__(self, files: Sequence[File], record: str):
        self.files = list(files)
        foreign = next((file for file in files if file.remote is not None and not file.path.startswith("gs://")), None)
        if foreign is not None:
            raise UserError(f"{foreign}: ArrayRecord files are read locally or at gs://; copy them there first")
        self.about = _about(files)
        self._record = self.about.get("record", "json") if record == "auto" else record
        try:
            self._readers = [ArrayRecordDataSource(file.path) for file in files]
            self.ends = list(itertools.accumulate(len(reader) for reader in self._readers))
        except Exception as error:  # the library raises several bare kinds
            raise UserError(f"{some(files)}: not readable as ArrayRecord: {error}") from error

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        file = int(np.searchsorted(self.ends, index, side="right"))
        try:
            raw: bytes = self._readers[file][locate(self, index)[1]]
        except Exception as error:
            raise RecordError(f"cannot be read: {error}", "unreadable") from error
        if self._record == "json":
            return parse_json(raw)
        dtype = np.dtype("<u2" if self._record == "uint16" else "<i4")
        if len(raw) % dtype.itemsize:
            raise RecordError(f"{len(raw)} bytes are no whole number of {dtype.name} tokens")
        tokens = np.frombuffer(raw, dtype).astype(np.int32)
        if self._record != "tokens":
            return {"tokens": tokens}
        return {"tokens": np.where(tokens < 0, ~tokens, tokens), "loss_mask": tokens >= 0}

    def place(self, index: int) -> str:
        file, number = locate(self, index)
        return f"{file}, record {number}"


def locate(source: Source, index: int) -> tuple[File, int]:
    """The file of record `index`, and its number there."""
    file = int(np.searchsorted(source.ends, index, side="right"))
    return source.files[file], index - (source.ends[file - 1] if file else 0)


def parse_json(raw: bytes) -> Record:
    """A record from the bytes of a JSON object."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}", "unreadable") from None
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, found {type(record).__name__}")
    return record


def _line_table(file: File) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and end byte and number (from 1) of every line that is not empty."""
    newlines = [np.zeros(0, np.int64)]
    with file.open() as f:
        for at in itertools.count(0, _SCAN_BYTES):
            block = f.read(_SCAN_BYTES)
            newlines.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at)
            if len(block) < _SCAN_BYTES:
                break
        ends = np.concatenate([*newlines, [f.tell()]])
        starts = np.concatenate([[0], ends[:-1] + 1])
        filled = ends > starts
        for line in np.flatnonzero(ends - starts == 1):  # a lone carriage return is an empty line too
            f.seek(starts[line])
            filled[line] = f.read(1) != b"\r"
    return starts[filled], ends[filled], np.flatnonzero(filled) + 1


def _about(files: Sequence[File]) -> dict[str, Any]:
    """What `glm45 tokenize` wrote beside the files; of several folders, what they agree in."""
    found = {}
    for file in {file.path.rpartition("/")[0]: file for file in files}.values():
        raw = file.beside(ABOUT)
        about = {} if raw is None else parse_json(raw)
        found[file.path.rpartition("/")[0]] = {key: about.get(key) for key in ("record", "tokenizer") if key in about}
    different = {json.dumps(about, sort_keys=True) for about in found.values()}
    if len(different) > 1:
        raise UserError(
            f"the folders {', '.join(found)} hold records of several forms or of several tokenizers ({ABOUT} there "
            "says so): make a source of each"
        )
    return next(iter(found.values()))


def _kind(config: SourceConfig, files: Sequence[File]) -> str:
    packed = next((file for file in files if file.suffix in _COMPRESSED), None)
    if packed is not None:
        raise UserError(
            f"data source {packed}: compressed files have no random access; decompress them, or use Parquet or "
            "ArrayRecord, which are compressed inside"
        )
    if config.kind != "auto":
        return config.kind
    kinds = {_SUFFIXES.get(file.suffix, "text"): file for file in files}
    if len(kinds) > 1:
        example = "; ".join(f"{file.name} is {kind}" for kind, file in kinds.items())
        raise UserError(
            f"data source {config.path[0]} holds files of several kinds ({example}): "
            "make a source of each, with a glob such as 'dir/**/*.jsonl'"
        )
    return next(iter(kinds))
