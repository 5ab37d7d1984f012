"""Tiles of the TPU's fused MoE kernel, by a model of the VMEM that it asks for.

Every step of the kernel brings one block of weights while it works on the one before, so blocks want to be large, and
the steps of gate and up (two blocks) about as long as those of down (one).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chip import Chip
from pallas_kernels.grouped_matmul.tiling import LANES, fits

_ROWS = 32  # of an expert's tokens that are multiplied at a time: no more than keep up with the copies


@dataclasses.dataclass(frozen=True)
class Tiling:
    """`rows` of an expert's tokens at a time; blocks of `width` of gate's and up's F columns, `model` of down's D."""

    rows: int
    width: int
    model: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens, model width, expert width; dtypes of the tokens and of the weights."""

    tokens: int
    model: int
    width: int
    dtypes: tuple[Any, Any]

    @property
    def padded(self) -> int:
        """Tokens in VMEM: whole registers of rows, whole steps."""
        pack = 8 * (4 // jnp.dtype(self.dtypes[0]).itemsize)
        rows = min(_ROWS, -(-self.tokens // pack) * pack)
        return -(-self.tokens // rows) * rows


def kernel_bytes(tiling: Tiling, shape: Shape) -> int:
    """What the kernel asks of VMEM."""
    size, weight = (jnp.dtype(d).itemsize for d in shape.dtypes)
    lanes = lambda n: -(-n // LANES) * LANES  # noqa: E731
    model, width = lanes(shape.model), lanes(shape.width)
    blocks = 2 * tiling.width * model + tiling.model * width
    dense = blocks * size if weight == 1 else 0
    tokens = shape.padded * (2 * model * size + 2 * model * 4)  # x and the sums, twice
    gathered = shape.padded * (model + -(-shape.width // tiling.width) * tiling.width) * size
    temporaries = 4 * tiling.rows * max(tiling.width, tiling.model) * 4 + 2 * shape.padded * tiling.model * 4
    return 2 * blocks * weight + dense + tokens + gathered + temporaries


def tile(shape: Shape, chip: Chip) -> Tiling:
    """The largest blocks that fit. Raises NotImplementedError for more tokens than VMEM has room for."""
    rows = min(_ROWS, shape.padded)
    for count in range(1, -(-shape.width // LANES) + 1):
        share = -(-shape.width // count)
        width = shape.width if count == 1 else -(-share // LANES) * LANES
        alike = [m for m in _divisors(shape.model) if m * shape.width <= 2 * width * shape.model]
        tiling = Tiling(rows, width, max(alike, default=_divisors(shape.model)[-1]))
        if fits(kernel_bytes(tiling, shape), chip):
            return tiling
    raise NotImplementedError(f"{shape.tokens} tokens are too many for the VMEM of {chip.name}")


def _divisors(size: int) -> list[int]:
    """Whole registers that divide an axis evenly, the largest first."""
    return [size // n for n in range(1, size // LANES + 1) if size % n == 0 and size // n % LANES == 0] or [size]
