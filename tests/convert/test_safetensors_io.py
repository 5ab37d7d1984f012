"""Headers: ours and the safetensors library's agree, and nothing malformed passes."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.convert.safetensors_io import make_header, parse_header, read_header
from tests.convert.support import write_safetensors


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, ml_dtypes.bfloat16)})
    return path


def with_header(header: object, data: bytes) -> bytes:
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(raw)) + raw + data


def test_reads_what_the_library_writes(file) -> None:
    tensors, problems = read_header(file)
    assert not problems
    content = file.read_bytes()
    a = tensors["a"]
    assert (a.dtype, a.shape) == ("F32", (2, 3))
    assert content[a.offset : a.offset + a.nbytes] == np.arange(6, dtype=np.float32).tobytes()
    assert tensors["b"].dtype == "BF16"


def test_the_library_reads_what_we_write() -> None:
    header, places = make_header([("x", "F8_E4M3", (3, 5)), ("y", "F32", (2,))])
    content = header + bytes(range(15)) + np.float32([1, 2]).tobytes()
    found = dict(safetensors.deserialize(content))
    assert found["x"]["shape"] == [3, 5] and bytes(found["x"]["data"]) == bytes(range(15))
    assert content[places["y"].offset :] == np.float32([1, 2]).tobytes()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "truncated data": with_header({"a": ENTRY}, b"1234"),
    "more data": with_header({"a": ENTRY}, b"123456789"),
    "gap": with_header({"a": ENTRY | {"data_offsets": [4, 12]}}, b"x" * 12),
    "overlap": with_header({"a": ENTRY, "b": ENTRY}, b"x" * 8),
    "wrong length": with_header({"a": ENTRY | {"shape": [3]}}, b"x" * 8),
    "negative": with_header({"a": ENTRY | {"data_offsets": [-8, 0]}}, b"x" * 8),
    "no dtype": with_header({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
    "unknown dtype": with_header({"a": ENTRY | {"dtype": "F31"}}, b"x" * 8),
    "huge shape": with_header({"a": ENTRY | {"shape": [2**62, 2**62, 0, 2]}}, b"x" * 8),
    "bool shape": with_header({"a": ENTRY | {"shape": [True, 2]}}, b"x" * 8),
    "not an object": with_header([1, 2], b""),
    "entry not an object": with_header({"a": 3}, b""),
    "twice": with_header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],'
                         b'"data_offsets":[0,8]}}', b"x" * 8),
    "not json": with_header(b"{", b""),
    "not utf-8": with_header(b'{"\xff": 1}', b""),
    "deep": with_header(b"[" * 100_000, b""),
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "huge header": struct.pack("<Q", 2**40) + b"{}",
    "empty": b"",
    "short": b"abc",
}  # fmt: skip


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_malformed_files_are_told(content: bytes, tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    _, problems = read_header(path)
    assert problems and all(len(p) < 500 for p in problems)


VALID = with_header(
    {"__metadata__": {"format": "pt"}, "a": ENTRY, "b": {"dtype": "BF16", "shape": [1, 3], "data_offsets": [8, 14]}},
    b"x" * 14,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_passes_is_what_the_library_accepts(data) -> None:
    """Bytes of a valid header changed at random: never an exception, and never more lenient than the library."""
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 15))
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789[]{},:"')))
    size = int.from_bytes(content[:8], "little")
    if 8 + size > len(content):
        return
    tensors, problems = parse_header(bytes(content[8 : 8 + size]), len(content))
    if not problems:
        accepted = {name: tuple(t["shape"]) for name, t in safetensors.deserialize(bytes(content))}
        assert accepted == {name: info.shape for name, info in tensors.items()}
