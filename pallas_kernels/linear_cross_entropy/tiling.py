"""Tiles of the TPU kernel, by a model of its VMEM.

The head is read once for every tile of tokens, so the tile of tokens is as large as VMEM allows: by it grows the
arithmetic per byte (one operation for each byte of a bfloat16 head and each row of the tile; chips want 240 to 560).
The tile of the vocabulary makes up for it: a block of logits of one size, long enough to make little of the start of a
grid step, short enough to compile quickly.

Axes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chip import Chip
from pallas_kernels.linear_cross_entropy.problem import Tiling
from pallas_kernels.mosaic import VMEM_SHARE

_LANES = 128
_TOKENS = (2048, 1536, 1024, 768, 512, 384, 256, 128)
_COLUMNS = (1024, 768, 512, 384, 256, 128)
_LOGITS = 1 << 19  # of a block; larger ones compile slowly
# Blocks of float32 that the compiler keeps beside the product: the logits, their exponentials, what is summed.
_LOGITS_COPIES = 3


def vmem_bytes(tiling: Tiling, width: int, hidden_dtype: Any, head_dtype: Any) -> int:
    """What the kernel asks of VMEM: hidden once, the head twice (one block on its way), its cast copy, the logits."""
    hidden_size, head_size = jnp.dtype(hidden_dtype).itemsize, jnp.dtype(head_dtype).itemsize
    hidden = tiling.tokens * width * hidden_size
    cast = hidden_size if hidden_dtype != head_dtype else 0
    head = tiling.vocabulary * width * (2 * head_size + cast)
    logits = _LOGITS_COPIES * tiling.vocabulary * tiling.tokens * 4
    rows = 8 * tiling.tokens * 4 * (2 * 4 + 4)  # a row takes eight
    return hidden + head + logits + rows


def choose(chip: Chip, tokens: int, width: int, vocabulary: int, hidden_dtype: Any, head_dtype: Any) -> Tiling:
    """The largest tile of tokens, then of the vocabulary, that fits `chip`.

    Raises NotImplementedError when the model is so wide that the smallest tile does not.
    """
    most = VMEM_SHARE * chip.on_chip_bytes
    # an exact product of float32 takes six of bfloat16, and as long to compile
    logits = _LOGITS if jnp.dtype(hidden_dtype).itemsize == 2 else _LOGITS // 4
    for rows in _TOKENS:
        rows = _even(tokens, rows, chip.cores)
        for columns in _COLUMNS:
            tiling = Tiling(rows, min(columns, _lanes(vocabulary)))
            fits = vmem_bytes(tiling, width, hidden_dtype, head_dtype) <= most
            if fits and tiling.tokens * tiling.vocabulary <= logits:
                return tiling
    raise NotImplementedError(f"rows of {width} are too wide for the VMEM of {chip.name}")


def _even(tokens: int, most: int, cores: int) -> int:
    """Tokens of a tile when they are shared out evenly: no more than `most`, a tile for each core."""
    tiles = max(math.ceil(tokens / most), min(cores, math.ceil(tokens / _LANES)))
    return _lanes(math.ceil(tokens / tiles))


def _lanes(x: int) -> int:
    return math.ceil(x / _LANES) * _LANES
