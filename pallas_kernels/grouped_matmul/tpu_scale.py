"""Quantised matrices in the TPU's grouped kernels.

A matrix is made dense in VMEM once for all rows of its group. A scale that is constant along the contracted axis is
applied to the products, one that is constant along the columns to the rows, both in float32; a scale per block of 128 x
128 to the matrix itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.grouped_matmul.quantised import SCALE_BLOCK

COLUMNS, ROWS, BLOCKS = "columns", "rows", "blocks"


def lay_out(
    scales: Sequence[jax.Array | None], rhs: Sequence[jax.Array], *, transpose_rhs: bool
) -> tuple[list[str | None], list[jax.Array | None]]:
    """Each scale's kind, and the scale [L, E, k, n] as the kernel wants it: constant axis first, blocks as weights."""
    kinds, laid = [], []
    for scale, weight in zip(scales, rhs):
        contracted, columns = weight.shape[-2:][::-1] if transpose_rhs else weight.shape[-2:]
        if scale is None:
            kind = None
        elif scale.shape[-2:] == (1, columns):
            kind = COLUMNS
        elif scale.shape[-2:] == (contracted, 1):
            kind, scale = ROWS, jnp.swapaxes(scale, -1, -2)
        else:
            kind, scale = BLOCKS, jnp.swapaxes(scale, -1, -2) if transpose_rhs else scale
            if any(size % SCALE_BLOCK for size in weight.shape[-2:]):
                raise NotImplementedError(f"scales per block need axes that are multiples of {SCALE_BLOCK}")
        kinds.append(kind)
        laid.append(None if scale is None else scale.astype(jnp.float32))
    return kinds, laid


def block_spec(kind: str, scale: jax.Array, tiling: Any) -> pl.BlockSpec:
    """The part of a scale that goes with a block of the matrix; of a scale per block all of the matrix's."""
    if kind == BLOCKS:
        return pl.BlockSpec((None, None, *scale.shape[2:]), lambda c, n, i, k, *s: (s[6][0], s[3][c, i], 0, 0))
    size = tiling.columns if kind == COLUMNS else tiling.contracted
    axis = (lambda n, k: n) if kind == COLUMNS else (lambda n, k: k)
    return pl.BlockSpec((None, None, 1, size), lambda c, n, i, k, *s: (s[6][0], s[3][c, i], 0, axis(n, k)))


def by_matrix(kinds: Sequence[str | None], refs: Sequence[Any]) -> list[Any]:
    """What only quantised matrices have, None for the others."""
    remaining = iter(refs)
    return [None if kind is None else next(remaining) for kind in kinds]


class Scaling(NamedTuple):
    """The scales that are applied beside the product, by which matrix it is of."""

    kinds: Sequence[str | None]
    factors: Sequence[Any]

    def _of(self, which: int, kind: str, columns: Any = slice(None)) -> jax.Array | None:
        return self.factors[which][:, columns] if self.kinds[which] == kind else None

    def of_rows(self, which: int, rows: jax.Array) -> jax.Array:
        factor = self._of(which, ROWS)
        return rows if factor is None else (rows.astype(jnp.float32) * factor).astype(rows.dtype)

    def of_columns(self, which: int, product: jax.Array, columns: Any = slice(None)) -> jax.Array:
        factor = self._of(which, COLUMNS, columns)
        return product if factor is None else product * factor


def fill(out: Any, quantised: Any, factor: Any, kind: str | None, first_row: Any, first_column: Any) -> None:
    """Writes a block of a matrix dense, 128 rows at a time; its place in the matrix says which scales are its own."""
    num_rows, num_columns = out.shape
    rows = SCALE_BLOCK if num_rows % SCALE_BLOCK == 0 else num_rows
    expanded = _expand_columns(factor[...], num_columns, first_column) if kind == BLOCKS else None

    def step(s, _):
        at = pl.ds(pl.multiple_of(s * rows, rows), rows)
        values = quantised[at, :].astype(jnp.float32)
        if expanded is not None:
            values = values * _row(expanded, jax.lax.div(jnp.int32(first_row), SCALE_BLOCK) + s)
        out[at, :] = values.astype(out.dtype)

    jax.lax.fori_loop(0, num_rows // rows, step, None)


def _expand_columns(scale: jax.Array, size: int, first: jax.Array) -> jax.Array:
    """[blocks, blocks] -> [blocks, size]: the factors of the columns from `first`, exactly, by a product with ones."""
    block = jax.lax.broadcasted_iota(jnp.int32, (scale.shape[1], size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (scale.shape[1], size), 1)
    ones = (jax.lax.div(column + first, SCALE_BLOCK) == block).astype(jnp.float32)
    return jnp.dot(scale, ones, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _row(matrix: jax.Array, index: jax.Array) -> jax.Array:
    """[1, size]: one row of a value, at a place known only when the kernel runs."""
    row = jax.lax.broadcasted_iota(jnp.int32, (matrix.shape[0], 1), 0)
    return jnp.sum(jnp.where(row == index, matrix, 0.0), axis=0, keepdims=True)
