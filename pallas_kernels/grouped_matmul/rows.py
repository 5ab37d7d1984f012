"""What the kernels that multiply rows by their groups' matrices share, whichever chip runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

Products = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class RowKernel:
    """What is done with the products of some rows. `tpu_rows.run` and `cpu.run` run it.

    Attributes:
      name: of the kernel, in profiles.
      pairs: which lhs meets which matrix.
      combine: from the products and the tiles beside, all [rows, columns] in float32, to the results.
      out_dtypes: of the results.
    """

    name: str
    pairs: tuple[tuple[int, int], ...]
    combine: Callable[[Products, Products], Products]
    out_dtypes: tuple[Any, ...]
