"""Rows of Parquet files by number: row groups are decoded whole, and the last ones used stay in memory, up to a bound.

Reading at random decodes a row group for nearly every row where the files are larger than that bound: `glm45 tokenize`
reads them once, in order.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm45_jax.data.files import File
from glm45_jax.data.sources import Record, RecordError, locate
from glm45_jax.errors import UserError

_COLUMNS = ("text", "complete", "messages", "tools", "enable_thinking", "tokens", "loss_mask")
_NESTED = ("messages", "tools")  # lists of structs, or JSON texts of them
_CACHE_BYTES = 1 << 28


class ParquetFiles:
    """Parquet files with a column `text`, `messages` or `tokens`; other columns are not read."""

    def __init__(self, files: Sequence[File]):
        self.files = list(files)
        self._groups: list[list[int]] = []  # of each file, the number of the first row behind each row group
        self.decoded_bytes = 0
        for file in files:
            rows, decoded = _layout(file)
            self._groups.append(list(itertools.accumulate(rows)))
            self.decoded_bytes += decoded
        self.ends = list(itertools.accumulate(groups[-1] if groups else 0 for groups in self._groups))
        self._cache: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def fits_memory(self) -> bool:
        """Whether all row groups can stay decoded."""
        return self.decoded_bytes <= _CACHE_BYTES

    def __getitem__(self, index: int) -> Record:
        file, row, group, groups = self._find(index)
        with self._lock:  # Arrow decodes a group's columns with several threads itself
            table = self._table(file, group)
        if isinstance(table, str):
            raise RecordError(f"row group {group} cannot be read: {table}", "unreadable")
        return _record(table, row - (groups[group - 1] if group else 0))

    def place(self, index: int) -> str:
        file, row, group, _ = self._find(index)
        return f"{file}, row {row} (row group {group})"

    def _find(self, index: int) -> tuple[File, int, int, list[int]]:
        file, row = locate(self, index)
        groups = self._groups[int(np.searchsorted(self.ends, index, side="right"))]
        return file, row, int(np.searchsorted(groups, row, side="right")), groups

    def _table(self, file: File, group: int) -> Any:
        """A decoded row group, or why it cannot be read."""
        key = (file.path, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        self._cache[key] = _decode(file, group)
        while len(self._cache) > 1 and sum(getattr(t, "nbytes", 0) for t in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return self._cache[key]


def _layout(file: File) -> tuple[list[int], int]:
    """Rows of each row group, and bytes of all when decoded.

    Raises:
      UserError: pyarrow is missing, the file is not Parquet, or none of its columns is ours.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"{file}: reading Parquet needs the data extra: pip install 'glm45-jax[data]' ({error})"
        ) from error
    try:
        with file.open() as f:
            opened = pq.ParquetFile(f)
            names, about = opened.schema_arrow.names, opened.metadata
            groups = [about.row_group(i) for i in range(about.num_row_groups)]
            if not {"text", "messages", "tokens"} & set(names):
                raise UserError(f"{file}: no column 'text', 'messages' or 'tokens'; it has {', '.join(names)}")
            return [group.num_rows for group in groups], sum(group.total_byte_size for group in groups)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not readable as Parquet: {error}") from error


def _decode(file: File, group: int) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open() as f:
            opened = pq.ParquetFile(f)
            columns = [name for name in opened.schema_arrow.names if name in _COLUMNS]
            return opened.read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:  # both: damaged pages raise either
        return str(error)


def _record(table: Any, row: int) -> Record:
    record: Record = {}
    for name in table.column_names:
        value = table[name][row]
        if not value.is_valid:
            continue
        if name in ("tokens", "loss_mask"):
            record[name] = value.values.to_numpy(zero_copy_only=False)
        elif name in _NESTED:
            record[name] = _nested(value.as_py(), name)
        else:
            record[name] = value.as_py()
    return record


def _nested(value: Any, name: str) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            raise RecordError(f"{name!r} is a text that is not JSON: {error}") from None
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """A column's structs have every field that any of them has: those without a value are no part of the message."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
