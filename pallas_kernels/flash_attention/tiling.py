"""Tiles of the TPU kernels, by a model of their VMEM.

A step of the grid takes a block of queries of all the heads that share a kv head, so that keys and values are fetched
once for all of them. A long piece of keys and values lies in VMEM while the queries pass by it: for as many keys as fit
they are read once per kv head, and the kernel loops over them without a step of the grid for each block.

Axes: G query heads per kv head, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chip import Chip
from pallas_kernels.flash_attention.problem import Tiling
from pallas_kernels.mosaic import VMEM_SHARE

LANES = 128
_SUBLANES = 16  # of bfloat16
MOST_HEADS = 16  # query heads of one kv head: a step of the grid is unrolled over them
_UNITS = 12  # pieces of rows that a step is unrolled over, where heads are fewer
_ROWS = 256  # fills a matrix unit of 256, and halves how often one of 128 takes new factors
_BLOCK_KV = (512, 256, 128)
_ENOUGH_RESIDENT = 2048  # keys, so that blocks of queries come often enough to hide their fetching
_RESIDENT = (8192, 4096, 2048, 1024, 512, 256, 128)
# Blocks of float32 that the compiler keeps of the scores and what becomes of them, two pieces of rows at a time.
_FORWARD_TEMPORARIES, _BACKWARD_TEMPORARIES = 4, 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the choice depends on."""

    groups: int
    queries: int
    keys: int
    head_dim: int
    dtype: Any


def forward_bytes(tiling: Tiling, shape: Shape) -> int:
    """What the forward kernel asks of VMEM: q, k, v, out twice (one block on its way), float32 state, temporaries."""
    size, width, rows, resident = _sizes(tiling, shape)
    blocks = 2 * (2 * rows * width * size + 2 * resident * width * size)
    row_vectors = 2 * 2 * _up(shape.groups, 8) * tiling.block_q * 4 + 2 * 8 * resident * 4
    state = rows * (width + 2 * LANES) * 4
    return blocks + row_vectors + state + _FORWARD_TEMPORARIES * tiling.rows * tiling.block_kv * 4


def backward_bytes(tiling: Tiling, shape: Shape) -> int:
    """What the backward kernel asks of VMEM: as forward, with dout, dq in and out in float32, dk and dv."""
    size, width, rows, resident = _sizes(tiling, shape)
    blocks = 2 * (rows * width * (2 * size + 2 * 4) + 4 * resident * width * size)
    row_vectors = 2 * 3 * _up(shape.groups, 8) * tiling.block_q * 4 + 2 * 8 * resident * 4
    state = (rows + 2 * resident) * width * 4
    return blocks + row_vectors + state + _BACKWARD_TEMPORARIES * tiling.rows * tiling.block_kv * 4


def choose(chip: Chip, shape: Shape, bytes_asked: Callable[[Tiling, Shape], int]) -> Tiling:
    """The largest block of queries that leaves room for enough keys, with the most keys in VMEM that fit beside it.

    Raises NotImplementedError where nothing fits.
    """
    for rows, pieces, least_resident in _query_blocks(shape):
        block_q = rows * min(pieces, -(-shape.queries // rows))
        for resident in (size for size in _RESIDENT if size >= least_resident):
            for block_kv in (size for size in _BLOCK_KV if size <= resident):
                tiling = _balanced(block_q, block_kv, resident, rows, shape.keys)
                if bytes_asked(tiling, shape) <= VMEM_SHARE * chip.on_chip_bytes:
                    return tiling
    raise NotImplementedError(f"flash_attention: no block of {shape} fits the VMEM of {chip.name}")


def _query_blocks(shape: Shape) -> Iterator[tuple[int, int, int]]:
    """Rows of a piece, how many pieces of each head, and for how many keys there must be room to take so many."""
    pieces = 1 << max(0, (_UNITS // shape.groups).bit_length() - 1)
    for rows in (_ROWS, LANES):
        rows = min(rows, _up(shape.queries, _SUBLANES))
        for fewer in range(pieces.bit_length()):
            smallest = rows <= LANES and pieces >> fewer == 1
            yield rows, pieces >> fewer, LANES if smallest else _ENOUGH_RESIDENT


def _balanced(block_q: int, block_kv: int, resident: int, rows: int, keys: int) -> Tiling:
    """With pieces of keys alike, none of them mostly padding."""
    block_kv = min(block_kv, _up(keys, LANES))
    count = -(-keys // resident)
    return Tiling(block_q, block_kv, _up(-(-keys // count), block_kv), rows)


def check(tiling: Tiling) -> None:
    """Raises ValueError for what the kernels can't do."""
    t = tiling
    pairs = ((t.block_kv, LANES), (t.resident, t.block_kv), (t.rows, _SUBLANES), (t.block_q, t.rows))
    if not all(size > 0 and part > 0 and size % part == 0 for size, part in pairs):
        raise ValueError(
            f"flash_attention: {tiling}; block_kv must be a multiple of {LANES}, resident of block_kv, block_q of "
            f"rows, rows of {_SUBLANES}"
        )


def _sizes(tiling: Tiling, shape: Shape) -> tuple[int, int, int, int]:
    return jnp.dtype(shape.dtype).itemsize, _up(shape.head_dim, LANES), shape.groups * tiling.block_q, tiling.resident


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
