"""Arrays that lie in files, read by the byte range: what a checkpoint is before anything is loaded.

A `Leaf` is one array of the params tree, tiled by equal boxes; each box is a piece (a tensor of a safetensors shard, an
expert's rows of a fused one, a chunk file of our own directory). Reading any part of a leaf reads only the bytes of
that part, into a buffer that the caller may give. Files are read, never mapped: mapped pages would count as this
process's memory.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Protocol

import numpy as np

from glm45_jax.convert import dtypes
from glm45_jax.errors import UserError

Index = tuple[slice, ...]


class Piece(Protocol):
    """A part of an array, held somewhere."""

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: Index, out: np.ndarray) -> None:
        """Fills `out` with `piece[index]`; `out` has the piece's dtype."""
        ...


def read_exactly(file: io.FileIO, buffer: np.ndarray, offset: int, path: str) -> None:
    """Fills `buffer`, bytes, from `offset` on."""
    done = 0
    file.seek(offset)
    while done < buffer.size:
        count = file.readinto(buffer[done:].data)
        if not count:
            raise UserError(f"{path}: the file ends at byte {offset + done:,}, {buffer.size - done:,} bytes too early")
        done += count


@dataclasses.dataclass(frozen=True, slots=True)
class FilePiece:
    """`shape` values in C order from byte `offset` of a file."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index, out: np.ndarray) -> None:
        strides = np.cumprod((self.dtype.itemsize, *self.shape[:0:-1]))[::-1]
        first = self.offset + sum(part.start * int(stride) for part, stride in zip(index, strides))
        lead = _dims_before_run(out, self.shape)
        try:
            with open(self.path, "rb", buffering=0) as file:
                for at in itertools.product(*map(range, out.shape[:lead])):
                    start = first + sum(i * int(stride) for i, stride in zip(at, strides))
                    read_exactly(file, out[at].reshape(-1).view(np.uint8), start, self.path)
        except OSError as e:
            raise UserError(f"{self.path}: cannot be read ({e.strerror})") from e

    def view(self, shape: tuple[int, ...], skip: int = 0) -> FilePiece:
        """The values from the `skip`-th on, as an array of `shape`."""
        return dataclasses.replace(self, shape=shape, offset=self.offset + skip * self.dtype.itemsize)


def _dims_before_run(out: np.ndarray, shape: tuple[int, ...]) -> int:
    """How many leading dimensions to loop over, such that what remains is one run in the file and in memory."""
    lead = len(shape)
    while lead > 0:
        lead -= 1
        if out.shape[lead] != shape[lead]:
            break
    while not out[(0,) * lead].flags.c_contiguous:
        lead += 1
    return lead


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """The same value everywhere: the scale of a matrix that is not quantised in a stack where others are."""

    value: float
    dtype: np.dtype

    def read(self, index: Index, out: np.ndarray) -> None:
        out[...] = self.value


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the params tree, tiled by boxes of shape `block`; `piece(grid)` is the box at that grid position."""

    shape: tuple[int, ...]
    dtype: np.dtype
    block: tuple[int, ...]
    piece: Callable[[tuple[int, ...]], Piece]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Index | None = None, out: np.ndarray | None = None, pool: Executor | None = None):
        """`leaf[index]` as a new array, or into `out` (of any float dtype: values are cast), on `pool`'s threads."""
        index = whole(self.shape) if index is None else index
        if out is None:
            out = np.empty([part.stop - part.start for part in index], self.dtype)
        run = pool.map if pool else map
        for _ in run(lambda box: self._read_box(box[0], box[1], box[2], out), self._boxes(index)):
            pass
        return out

    def _boxes(self, index: Index) -> Iterator[tuple[Piece, Index, Index]]:
        """(piece, part of the piece, part of the result) for every box that `index` meets."""
        grids = [range(part.start // b, -(-part.stop // b)) for part, b in zip(index, self.block)]
        for grid in itertools.product(*grids):
            inner, outer = [], []
            for part, g, b in zip(index, grid, self.block):
                start, stop = max(part.start, g * b), min(part.stop, (g + 1) * b)
                inner.append(slice(start - g * b, stop - g * b))
                outer.append(slice(start - part.start, stop - part.start))
            yield self.piece(grid), tuple(inner), tuple(outer)

    def _read_box(self, piece: Piece, inner: Index, outer: Index, out: np.ndarray) -> None:
        target = out[outer]
        if piece.dtype == out.dtype:
            piece.read(inner, target)
        else:
            values = np.empty(target.shape, piece.dtype)
            piece.read(inner, values)
            target[...] = dtypes.cast(values, out.dtype)


@dataclasses.dataclass(frozen=True)
class Dequantised:
    """FP8 codes times their scales, as the bfloat16 array that they stand for; reads like a `Leaf`."""

    codes: Leaf
    scales: Leaf
    block: tuple[int, int]  # rows and columns that share a scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        # A stack of which some layers are not quantised keeps the precision of those.
        return dtypes.BF16 if self.codes.dtype == dtypes.F8 else self.codes.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Index | None = None, out: np.ndarray | None = None, pool: Executor | None = None):
        index = whole(self.shape) if index is None else index
        if out is None:
            out = np.empty([part.stop - part.start for part in index], self.dtype)
        lead = itertools.product(*(range(part.start, part.stop) for part in index[:-2]))
        run = pool.map if pool else map
        for _ in run(lambda at: self._read_matrix(at, index, out), lead):
            pass
        return out

    def _read_matrix(self, at: tuple[int, ...], index: Index, out: np.ndarray) -> None:
        lead = tuple(slice(i, i + 1) for i in at)
        rows, columns = index[-2:]
        touched = tuple(slice(part.start // b, -(-part.stop // b)) for part, b in zip((rows, columns), self.block))
        codes = self.codes.read((*lead, rows, columns))
        scales = self.scales.read((*lead, *touched))
        target = out[tuple(i - part.start for i, part in zip(at, index))]
        origin = (rows.start, columns.start)
        dtypes.dequantise(
            codes.reshape(codes.shape[-2:]), scales.reshape(scales.shape[-2:]), self.block, origin, target
        )


AnyLeaf = Leaf | Dequantised


def whole(shape: Sequence[int]) -> Index:
    return tuple(slice(0, size) for size in shape)


def boxes(shape: Sequence[int], block: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Index]]:
    """(grid position, slices) of every box of `block` that tiles `shape`; those at the far edges are clipped."""
    counts = [-(-size // b) for size, b in zip(shape, block)]
    for grid in itertools.product(*map(range, counts)):
        yield grid, tuple(slice(g * b, min((g + 1) * b, size)) for g, b, size in zip(grid, block, shape))
