"""The work list of the TPU's grouped kernels: which tile of rows meets which group, one after another.

Rows lie in regions: those before the groups, each group, those after. A tile that regions share is visited once for
each, visits side by side, so that it stays in VMEM meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Work(NamedTuple):
    """Visits in the order of their rows; only the first `count` of the arrays' entries are visits."""

    region: Int[Array, " W"]
    tile: Int[Array, " W"]
    matrix: Int[Array, " W"]  # the group whose matrix lies in VMEM at this visit
    bounds: Int[Array, " R1"]  # the rows of region r are bounds[r] to bounds[r + 1]
    count: Int[Array, " 1"]


def over_all_rows(sizes: Int[Array, " E"], first_row: Int[Array, ""], num_rows: int, tile: int) -> Work:
    """Every row is visited. Region e + 1 is group e; the first and the last region belong to no group."""
    ends = first_row + jnp.cumsum(sizes)
    bounds = jnp.concatenate([jnp.stack([0 * first_row, first_row]), ends, jnp.full(1, num_rows)]).astype(jnp.int32)
    region, tiles, count = _visits(bounds, num_rows, tile, empty_too=False)
    group = jnp.where((region > 0) & (region <= sizes.shape[0]), region - 1, -1)
    # rows of no group leave in VMEM what lies there, and rows before the groups what will be needed first
    matrix = jnp.maximum(jax.lax.cummax(group), jnp.argmax(sizes > 0).astype(jnp.int32))
    return Work(region, tiles, matrix, bounds, count)


def over_groups(sizes: Int[Array, " E"], first_row: Int[Array, ""], num_rows: int, tile: int) -> Work:
    """Only rows of groups are visited, a group without rows once. Region e is group e."""
    bounds = jnp.concatenate([first_row[None], first_row + jnp.cumsum(sizes)]).astype(jnp.int32)
    region, tiles, count = _visits(bounds, num_rows, tile, empty_too=True)
    return Work(region, tiles, region, bounds, count)


def _visits(bounds: Int[Array, " R1"], num_rows: int, tile: int, *, empty_too: bool):
    starts, ends = bounds[:-1], bounds[1:]
    num_tiles, num_regions = -(-num_rows // tile), starts.shape[0]
    first = starts // tile
    visits = jnp.where(ends > starts, (ends + tile - 1) // tile - first, int(empty_too))
    last = jnp.cumsum(visits)
    index = jnp.arange(num_tiles + num_regions)
    region = jnp.minimum(jnp.searchsorted(last, index, side="right"), num_regions - 1)
    tiles = jnp.clip(first[region] + index - (last - visits)[region], 0, num_tiles - 1)
    return region.astype(jnp.int32), tiles.astype(jnp.int32), last[-1:].astype(jnp.int32)
