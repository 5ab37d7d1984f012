"""Random access to the records of files: documents of text files, lines of JSONL, ArrayRecord.

A source has a length, gives record `i` as a dict (`text`, `messages` or `tokens`), and says in which place of which
file it stands. What is wrong with one record is a `RecordError`, which the pipeline turns into an error that names
the place, or into a count of skipped records.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from array_record.python.array_record_data_source import ArrayRecordDataSource

from glm45_jax.data.config import SourceConfig
from glm45_jax.errors import UserError

Record = dict[str, Any]
_SCAN_BYTES = 1 << 24
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".array_record": "array_record", ".arrayrecord": "array_record"}


class RecordError(Exception):
    """One record cannot be used; the message says why, without the place."""


class Source(Protocol):
    """Records by number."""

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
    files = find_files(config.path)
    kind = _kind(config, files)
    if kind == "jsonl":
        source: Source = JsonLines(files)
    elif kind == "array_record":
        source = ArrayRecords(files, config.record)
    else:
        source = TextFiles(files, config.chunk_bytes)
    if not len(source):
        raise UserError(f"no records in {_some(files)}: {'they are' if len(files) > 1 else 'it is'} empty")
    return source


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` (files, directories, globs) stand for, sorted within each, none twice."""
    found: dict[Path, None] = {}
    for path in paths:
        expanded = os.path.expanduser(path)
        if os.path.isdir(expanded):
            matches = _walk(Path(expanded))
        elif os.path.isfile(expanded):
            matches = [Path(expanded)]
        else:
            matches = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if os.path.isfile(p))
        if not matches:
            kind = "directory has no files" if os.path.isdir(expanded) else "no such file, directory or match of a glob"
            raise UserError(f"data source {path}: {kind} (looked from {os.getcwd()})")
        found |= dict.fromkeys(matches)
    return list(found)


def fingerprint(config: SourceConfig) -> str:
    """A digest of the files' names and sizes and of how they are cut into records: equal for equal data."""
    digest = xxhash.xxh3_64()
    for file in find_files(config.path):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
    how = (config.kind, config.record, config.packing, config.overlong, config.chunk_bytes, config.weight)
    digest.update(repr(how).encode())
    return digest.hexdigest()


class TextFiles:
    """Plain text, UTF-8. A file of up to about `chunk_bytes` is one document, a longer one several, cut at line ends.

    Nothing is read to find the borders: document k of a file runs from the first line that begins at or after byte
    k * chunk_bytes to where document k + 1 begins. One of them may so be empty.
    """

    def __init__(self, files: Sequence[Path], chunk_bytes: int):
        self._files = [file for file in files if file.stat().st_size]
        self._sizes = [file.stat().st_size for file in self._files]
        self._chunk = chunk_bytes
        counts = [-(-size // chunk_bytes) for size in self._sizes]
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        file, part = self._locate(index)
        size = self._sizes[file]
        with open(self._files[file], "rb") as f:
            start, end = self._border(f, part * self._chunk, size), self._border(f, (part + 1) * self._chunk, size)
            f.seek(start)
            raw = f.read(end - start)
        try:
            return {"text": raw.decode("utf-8"), "complete": end == size}
        except UnicodeDecodeError as error:
            raise RecordError(f"not UTF-8 text: byte {start + error.start} is {raw[error.start]:#04x}") from None

    def place(self, index: int) -> str:
        file, part = self._locate(index)
        return f"{self._files[file]}" + (f", near byte {part * self._chunk}" if part else "")

    def _locate(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (self._ends[file - 1] if file else 0)

    def _border(self, f: Any, at: int, size: int) -> int:
        """Where the first line at or after byte `at` begins; without one nearby, the next whole character."""
        if at <= 0 or at >= size:
            return min(max(at, 0), size)
        f.seek(at - 1)
        block = f.read(max(self._chunk, 8))  # holds a whole character in any case
        newline = block.find(b"\n")
        if newline >= 0:
            return at + newline
        after = next((i for i, byte in enumerate(block[1:]) if byte & 0xC0 != 0x80), 0)
        return at + after


class JsonLines:
    """One JSON object per line. Opening scans the files once for the line ends; blank lines are no records."""

    def __init__(self, files: Sequence[Path]):
        self._files = list(files)
        tables = [_line_table(file) for file in files]
        self._starts = np.concatenate([table[0] for table in tables])
        self._ends = np.concatenate([table[1] for table in tables])
        self._lines = np.concatenate([table[2] for table in tables])
        self._file_ends = np.cumsum([len(table[0]) for table in tables])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        with open(self._file(index), "rb") as f:
            f.seek(self._starts[index])
            return parse_json(f.read(int(self._ends[index] - self._starts[index])))

    def place(self, index: int) -> str:
        return f"{self._file(index)}:{self._lines[index]}"

    def _file(self, index: int) -> Path:
        return self._files[int(np.searchsorted(self._file_ends, index, side="right"))]


class ArrayRecords:
    """ArrayRecord files of JSON objects, or of bare tokens (little-endian int32 or uint16)."""

    def __init__(self, files: Sequence[Path], record: str):
        self._files, self._record = list(files), record
        try:
            self._readers = [ArrayRecordDataSource(str(file)) for file in files]
            self._ends = list(itertools.accumulate(len(reader) for reader in self._readers))
        except Exception as error:  # the library raises several bare kinds
            raise UserError(f"{_some(files)}: not readable as ArrayRecord: {error}") from error

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        file, number = self._locate(index)
        try:
            raw: bytes = self._readers[file][number]
        except Exception as error:
            raise RecordError(f"cannot be read: {error}") from error
        if self._record == "json":
            return parse_json(raw)
        dtype = np.dtype(self._record).newbyteorder("<")
        if len(raw) % dtype.itemsize:
            raise RecordError(f"{len(raw)} bytes are no whole number of {self._record} tokens")
        return {"tokens": np.frombuffer(raw, dtype).astype(np.int32)}

    def place(self, index: int) -> str:
        file, number = self._locate(index)
        return f"{self._files[file]}, record {number}"

    def _locate(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (self._ends[file - 1] if file else 0)


def parse_json(raw: bytes) -> Record:
    """A record from the bytes of a JSON object."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, found {type(record).__name__}")
    return record


def _line_table(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and end byte and number (from 1) of every line that is not empty."""
    newlines = [np.zeros(0, np.int64)]
    with open(file, "rb") as f:
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


def _kind(config: SourceConfig, files: Sequence[Path]) -> str:
    if config.kind != "auto":
        return config.kind
    kinds = {_SUFFIXES.get(file.suffix.lower(), "text"): file for file in files}
    if len(kinds) > 1:
        example = "; ".join(f"{file.name} is {kind}" for kind, file in kinds.items())
        raise UserError(
            f"data source {config.path[0]} holds files of several kinds ({example}): "
            "make a source of each, with a glob such as 'dir/**/*.jsonl'"
        )
    return next(iter(kinds))


def _walk(folder: Path) -> list[Path]:
    def files() -> Iterator[Path]:
        for parent, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (Path(parent, name) for name in names if not name.startswith("."))

    return sorted(file for file in files() if file.is_file())


def _some(files: Sequence[Path]) -> str:
    return f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
