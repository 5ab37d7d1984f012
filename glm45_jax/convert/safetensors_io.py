"""Headers of safetensors files: read, checked against the file, and made.

A file is 8 bytes of header length, little-endian, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors'
bytes. Format: https://github.com/huggingface/safetensors. Nothing of a file is believed before it is checked: offsets
must tile the rest of the file exactly, as the format says.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from typing import Any, TypeGuard

from glm45_jax.convert.dtypes import BITS

MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


def read_header(path: str | os.PathLike) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of a file, and everything that is wrong with it. What is wrong is left out of the tensors."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > MAX_HEADER or 8 + length > size:
                return {}, [f"truncated or not safetensors: {size:,} bytes, a header of {length:,} announced"]
            raw = f.read(length)
    except OSError as e:
        return {}, [f"cannot be read ({e.strerror})"]
    if len(raw) < length:
        return {}, ["truncated in its header"]
    return parse_header(raw, size)


def parse_header(raw: bytes, file_size: int) -> tuple[dict[str, TensorInfo], list[str]]:
    """Checks the JSON header `raw` of a file of `file_size` bytes."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) < len(items):
            names = [name for name, _ in items]
            repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return out

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as e:
        return {}, [f"corrupt header: {e}"]
    if not isinstance(header, dict):
        return {}, ["corrupt header: not a JSON object"]
    header.pop("__metadata__", None)
    problems = [f"corrupt header: {name!r} stands there more than once" for name in repeated]
    tensors = {}
    start = 8 + len(raw)
    for name, entry in header.items():
        info = _entry(entry, start)
        if isinstance(info, str):
            problems.append(f"corrupt header: {name}: {info}")
        else:
            tensors[name] = info
    if not problems:
        problems = _tiling(tensors, start, file_size)
    return tensors, problems


def _entry(entry: Any, start: int) -> TensorInfo | str:
    """One tensor's entry, or what is wrong with it."""
    if not isinstance(entry, dict):
        return "its entry is not a JSON object"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"unknown dtype {dtype!r}"
    if not _naturals(shape):
        return f"shape {shape!r} is not a list of sizes"
    if not _naturals(offsets) or len(offsets) != 2:
        return f"data_offsets {offsets!r} are not two positions"
    begin, end = offsets
    nbytes, odd = divmod(math.prod(shape) * BITS[dtype], 8)
    if odd or end - begin != nbytes:
        return f"data_offsets {offsets} hold {end - begin:,} bytes, {dtype} {shape} takes {nbytes:,}"
    return TensorInfo(dtype, tuple(shape), start + begin, nbytes)


def _naturals(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _tiling(tensors: dict[str, TensorInfo], start: int, file_size: int) -> list[str]:
    """The tensors must follow each other without gap or overlap, up to the end of the file."""
    problems, at, before = [], start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != at:
            kind = "overlaps" if info.offset < at else "leaves a gap after"
            problems.append(f"corrupt header: {name} {kind} {before}")
        at, before = max(at, info.offset + info.nbytes), name
    if at > file_size:
        problems.append(f"truncated: {file_size:,} bytes, its header speaks of {at:,}")
    elif at < file_size:
        problems.append(f"corrupt: {file_size - at:,} bytes more than its header speaks of")
    return problems


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file, length and header, for tensors (name, dtype, shape) in this order; their places."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    at = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    places, problems = parse_header(raw, 8 + len(raw) + at)
    assert not problems, problems
    return len(raw).to_bytes(8, "little") + raw, places
