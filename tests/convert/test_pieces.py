"""Any part of an array in files is read right, and only its bytes are read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.convert import pieces
from glm45_jax.convert.pieces import FilePiece, Leaf
from glm45_jax.errors import UserError

SHAPE, BLOCK = (3, 4, 6, 5), (1, 2, 4, 5)  # boxes at the edges are clipped


@pytest.fixture(scope="module")
def leaf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    values = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    for grid, index in pieces.boxes(SHAPE, BLOCK):
        box = np.zeros(BLOCK, np.float32)
        part = values[index]
        box[tuple(slice(0, n) for n in part.shape)] = part
        (folder / "-".join(map(str, grid))).write_bytes(b"\xaa" * 12 + box.tobytes())
    name = lambda grid: str(folder / "-".join(map(str, grid)))  # noqa: E731
    return values, Leaf(SHAPE, np.dtype(np.float32), BLOCK, lambda g: FilePiece(name(g), 12, BLOCK, values.dtype))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part(leaf, data) -> None:
    values, array = leaf
    index = []
    for size in SHAPE:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    count, original = [0], pieces.read_exactly

    def counting(file, buffer, offset, path):
        count[0] += buffer.size
        original(file, buffer, offset, path)

    pieces.read_exactly = counting
    try:
        part = array.read(tuple(index))
    finally:
        pieces.read_exactly = original
    assert (part == values[tuple(index)]).all()
    assert count[0] == part.nbytes


def test_into_another_dtype_and_a_part_of_a_buffer(leaf) -> None:
    values, array = leaf
    out = np.zeros((3, 4, 6, 9), np.float64)
    array.read(out=out[..., 2:7])
    assert (out[..., 2:7] == values).all() and not out[..., :2].any() and not out[..., 7:].any()


def test_a_file_that_ends_early_is_told(tmp_path) -> None:
    (tmp_path / "short").write_bytes(b"123")
    piece = FilePiece(str(tmp_path / "short"), 0, (4,), np.dtype(np.uint8))
    with pytest.raises(UserError, match=r"short: the file ends at byte 3, 1 bytes too early"):
        piece.read((slice(0, 4),), np.empty(4, np.uint8))
    with pytest.raises(UserError, match="cannot be read"):
        FilePiece(str(tmp_path / "none"), 0, (4,), np.dtype(np.uint8)).read((slice(0, 4),), np.empty(4, np.uint8))
