"""Tiles of the TPU's grouped kernels, by a model of the VMEM that they ask for.

Everything that the pipeline moves is there twice, one block at work and one on its way. A matrix stays in VMEM while
the rows of its group pass, so its bytes move once; rows pass once for every tile of columns. So the model takes as few
tiles of columns as fit, whole matrices where they do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chip import Chip
from pallas_kernels.mosaic import VMEM_SHARE

LANES = 128
_COMPILER_BYTES = 1 << 20  # what the compiler itself needs
_LARGEST_ROW_TILE = 512
_CHUNK = 256  # columns of lhs that are transposed while those before them are multiplied


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Of a kernel that multiplies rows: a block of `rows` x `contracted` with one of `contracted` x `columns`.

    Rows of a block are multiplied `step` at a time, and only those of the group at hand.
    """

    rows: int
    contracted: int
    columns: int
    step: int


@dataclasses.dataclass(frozen=True)
class GradientTiling:
    """Of the kernel for the matrices' gradient: blocks of `rows`, of `contracted` x `columns` of the gradient.

    `step` rows at a time are summed over, `chunk` columns of lhs transposed at a time.
    """

    rows: int
    contracted: int
    columns: int
    step: int
    chunk: int = _CHUNK


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel that multiplies rows works on.

    Attributes:
      operands: how many of lhs, matrices, tiles beside them ([M, N]) and results there are.
      dtypes: of lhs (and of the tiles beside), of the matrices, and of the results.
    """

    rows: int
    contracted: int
    columns: int
    groups: int
    operands: tuple[int, int, int, int]
    dtypes: tuple[Any, Any, Any]


def fits(num_bytes: int, chip: Chip) -> bool:
    return num_bytes <= VMEM_SHARE * chip.on_chip_bytes - _COMPILER_BYTES


def row_bytes(tiling: Tiling, shape: Shape) -> int:
    """What the kernel that multiplies rows asks of VMEM."""
    num_lhs, num_rhs, num_beside, num_out = shape.operands
    lhs, rhs, out = (jnp.dtype(d).itemsize for d in shape.dtypes)
    matrix, tile = tiling.contracted * _lanes(tiling.columns), tiling.rows * _lanes(tiling.columns)
    moved = num_lhs * tiling.rows * _lanes(tiling.contracted) * lhs + num_rhs * matrix * rhs
    moved += tile * (num_beside * lhs + num_out * out)
    dense = num_rhs * matrix * lhs if rhs == 1 else 0  # dequantised
    sums = 0 if tiling.contracted == shape.contracted else num_rhs * tile * 4
    temporaries = (num_rhs + num_beside + 2) * tiling.step * _lanes(tiling.columns) * 4
    if lhs == 4:  # multiplied in three parts of bfloat16 each
        temporaries += 6 * tiling.contracted * (num_lhs * tiling.step + num_rhs * LANES)
    return 2 * moved + dense + sums + temporaries


def tile_rows(shape: Shape, chip: Chip) -> Tiling:
    """Raises ValueError when not even the smallest tiles fit."""
    step = row_step(shape, chip)
    for contracted in _divisors(shape.contracted):
        for columns in _cuts(shape.columns, 1):
            for rows in _row_tiles(-(-shape.rows // chip.cores), step):
                tiling = Tiling(rows, contracted, columns, step)
                if fits(row_bytes(tiling, shape), chip):
                    return _shorten(tiling, shape, chip)
    raise ValueError(f"grouped matmul: no tiles of {shape} fit the {chip.on_chip_bytes} bytes of VMEM of {chip.name}")


def row_step(shape: Shape, chip: Chip) -> int:
    """Rows multiplied at a time: what keeps a matrix unit busy, fewer where groups are smaller."""
    pack = 8 * (4 // jnp.dtype(shape.dtypes[0]).itemsize)
    mean = -(-shape.rows // max(1, shape.groups))
    return min(chip.matrix_unit, max(pack, -(-mean // pack) * pack))


# Products are straight runs of instructions. A longer one wastes fewer slots where it begins and ends, and takes longer
# to compile; on a v5p the shortest that counts as long enough has some 6,000 instructions, of which 3 % begin and end.
# A float32 multiplication is six of bfloat16, of three parts of each operand: long runs spill more registers than a
# tpu7x has VMEM for.


def _long_enough(chip: Chip, dtype: Any) -> int:
    """Multiplications in a run."""
    return chip.matrix_unit**2 << (11 if jnp.dtype(dtype).itemsize == 4 else 15)


def _shorten(tiling: Tiling, shape: Shape, chip: Chip) -> Tiling:
    """Fewer rows at a time where runs are longer than they need be; fewer rows of other groups come along then, too."""
    dtype = shape.dtypes[0]
    run = shape.operands[1] * tiling.step * tiling.contracted * column_chunk(tiling, shape.operands[1], chip, dtype)
    halves = run >= 2 * _long_enough(chip, dtype) and tiling.step % 2 == 0 and tiling.step >= chip.matrix_unit
    return dataclasses.replace(tiling, step=tiling.step // 2) if halves else tiling


def column_chunk(tiling: Tiling, products: int, chip: Chip, dtype: Any) -> int:
    """Columns of a block that one run multiplies; over the rest of the block it is a loop."""
    for count in range(tiling.columns // LANES, 0, -1):
        chunk = tiling.columns // count
        is_whole = tiling.columns % count == 0 and chunk % LANES == 0
        if is_whole and products * tiling.step * tiling.contracted * chunk >= _long_enough(chip, dtype):
            return chunk
    return tiling.columns


def gradient_bytes(tiling: GradientTiling, dtypes: tuple[Any, Any]) -> int:
    """What the kernel for the matrices' gradient asks of VMEM; `dtypes` of the rows and of the result."""
    size, out = (jnp.dtype(d).itemsize for d in dtypes)
    block = tiling.contracted * _lanes(tiling.columns)
    moved = tiling.rows * (_lanes(tiling.contracted) + _lanes(tiling.columns)) * size + block * out
    sums = 0 if out == 4 else block * 4
    scratch = tiling.step * (2 * tiling.chunk + _lanes(tiling.columns)) * size
    temporaries = 2 * tiling.chunk * _lanes(tiling.columns) * 4
    return 2 * moved + sums + scratch + temporaries


def tile_gradient(rows: int, contracted: int, columns: int, dtypes: tuple[Any, Any], chip: Chip) -> GradientTiling:
    """The tiles that fit and move the fewest bytes: lhs passes once for every tile of columns, dout of contracted."""
    pack = 8 * (4 // jnp.dtype(dtypes[0]).itemsize)
    # every step loads and stores all sums: the faster the matrix units, the more rows it must take to be worth that
    step = min(chip.matrix_unit**2 // LANES, -(-rows // pack) * pack)
    longest = (2 if jnp.dtype(dtypes[0]).itemsize == 2 else 8) * _long_enough(chip, dtypes[0])
    best: tuple[int, GradientTiling] | None = None
    for block_rows in _row_tiles(rows, step):
        for k in _cuts(contracted, chip.cores):
            for n in _cuts(columns, 1):
                tiling = GradientTiling(block_rows, k, n, step)
                moved = contracted * -(-columns // n) + columns * -(-contracted // k)
                is_short = step * k * n <= longest or (k <= _CHUNK and n <= _CHUNK)
                fitting = is_short and fits(gradient_bytes(tiling, dtypes), chip)
                if fitting and (best is None or moved < best[0]):
                    best = moved, tiling
    if best is None:
        raise ValueError(
            f"grouped matmul: no tiles of the gradient [{contracted}, {columns}] fit the VMEM of {chip.name}"
        )
    return best[1]


def _cuts(size: int, cores: int) -> Iterator[int]:
    """Tiles of an axis, the largest first; an even share for each core where there are enough."""
    seen = set()
    for count in range(1, -(-size // LANES) + 1):
        tile = size if count == 1 else -(-size // count // LANES) * LANES
        tiles = -(-size // tile)
        if (tiles % cores == 0 or size < cores * LANES) and tile not in seen:
            seen.add(tile)
            yield tile


def _divisors(size: int) -> Iterator[int]:
    """Tiles of the contracted axis: it is never padded."""
    for count in range(1, max(1, size // LANES) + 1):
        if count == 1 or (size % count == 0 and (size // count) % LANES == 0):
            yield size // count


def _row_tiles(rows: int, step: int) -> Sequence[int]:
    most = max(1, min(_LARGEST_ROW_TILE, -(-rows // step) * step) // step)
    return sorted({most * step, max(1, most // 2) * step, max(1, most // 4) * step}, reverse=True)


def _lanes(size: int) -> int:
    return -(-size // LANES) * LANES
