"""Tiles of the TPU kernels, by a model of their VMEM.

A step of the grid takes a block of queries of all the heads that share a kv head, so that keys and values are fetched
once for all of them. A long piece of keys and values lies in VMEM while the queries pass by it: for as many keys as fit
they are read once per kv head, and the kernel loops over them without a step of the grid for each block.

Axes: G query heads per kv head, D head dim.
"""

from __future__ import annotations

import dataclasses
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
    """What the forward kernel asks of VMEM: q, k, v and out twice (one block on its way), float32 state, temporaries."""
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


def choose(chip: Chip, shape: Shape, bytes_asked: Any) -> Tiling:
    """The tiling with the most keys in VMEM, and then the longest blocks of keys, that `bytes_asked` lets fit.

    Raises NotImplementedError where none fits.
    """
    rows = min(_ROWS, _up(shape.queries, _SUBLANES))
    pieces = 1 << max(0, (_UNITS // shape.groups).bit_length() - 1)
    while True:
        block_q = rows * min(pieces, -(-shape.queries // rows))
        for resident in _RESIDENT:
            for block_kv in _BLOCK_KV:
                tiling = _balanced(block_q, block_kv, resident, rows, shape.keys)
                enough = resident >= block_kv and (resident >= 2048 or block_q <= rows)
                if enough and bytes_asked(tiling, shape) <= VMEM_SHARE * chip.on_chip_bytes:
                    return tiling
        if pieces == 1 and rows <= LANES:
            raise NotImplementedError(f"flash_attention: a block of {shape} does not fit the VMEM of {chip.name}")
        pieces, rows = (pieces // 2, rows) if pieces > 1 else (1, LANES)


def _balanced(block_q: int, block_kv: int, resident: int, rows: int, keys: int) -> Tiling:
    """With pieces of keys alike, none of them mostly padding."""
    block_kv = min(block_kv, _up(keys, LANES))
    count = -(-keys // resident)
    return Tiling(block_q, block_kv, _up(-(-keys // count), block_kv), rows)


def check(tiling: Tiling) -> None:
    """Raises ValueError for what the kernels can't do."""
    good = (
        tiling.block_kv % LANES == 0 and tiling.block_kv > 0
        and tiling.resident % tiling.block_kv == 0 and tiling.resident > 0
        and tiling.rows % _SUBLANES == 0 and tiling.rows > 0 and tiling.block_q % tiling.rows == 0 and tiling.block_q > 0
    )  # fmt: skip
    if not good:
        raise ValueError(
            f"flash_attention: {tiling}; block_kv must be a multiple of {LANES}, resident of block_kv, block_q of "
            f"rows, rows of {_SUBLANES}"
        )


def _sizes(tiling: Tiling, shape: Shape) -> tuple[int, int, int, int]:
    return jnp.dtype(shape.dtype).itemsize, _up(shape.head_dim, LANES), shape.groups * tiling.block_q, tiling.resident


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
