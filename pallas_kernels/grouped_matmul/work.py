"""The work list of the TPU's grouped kernels: which tile of rows meets which group, one after another.

Rows lie in regions: those before the groups, each group, those after. A tile that regions share is visited once for
each, visits side by side, so that it stays in VMEM meanwhile. Cores that share a device each have a list of their own.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Work(NamedTuple):
    """For each of C cores its visits in the order of their rows; after the last one it is repeated, not to be done."""

    region: Int[Array, "C W"]
    tile: Int[Array, "C W"]
    fetched: Int[Array, "C W"]  # the tile of the operands in VMEM at this visit: rows of no group fetch none
    matrix: Int[Array, "C W"]  # the group whose matrix is
    bounds: Int[Array, "C R1"]  # the rows of region r that are this core's are bounds[r] to bounds[r + 1]
    count: Int[Array, " C"]


def over_all_rows(sizes: Int[Array, " E"], first_row: Int[Array, ""], num_rows: int, tile: int, cores: int = 1) -> Work:
    """Every row is visited. Region e + 1 is group e; the first and the last region belong to no group.

    Cores share the tiles of the groups evenly; there must be a tile for each core at least.
    """
    ends = first_row + jnp.cumsum(sizes)
    bounds = jnp.concatenate([jnp.stack([0 * first_row, first_row]), ends, jnp.full(1, num_rows)]).astype(jnp.int32)
    num_tiles = -(-num_rows // tile)
    first_tile, end_tile = first_row // tile, (ends[-1] + tile - 1) // tile
    inner = [first_tile + (end_tile - first_tile) * core // cores for core in range(1, cores)]
    inner = [jnp.clip(edge, core, num_tiles - cores + core) * tile for core, edge in enumerate(inner, 1)]
    edges = [0, *inner, num_rows]
    lists = [
        _visits(jnp.clip(bounds, low, high), num_rows, tile, empty_too=False) for low, high in itertools.pairwise(edges)
    ]
    own, region, tiles, count = (jnp.stack(x) for x in zip(*lists))
    group = jnp.where((region > 0) & (region <= sizes.shape[0]), region - 1, -1)
    needed = [_kept_in_vmem(jnp.where(group >= 0, x, -1)) for x in (tiles, group)]
    return Work(region, tiles, *needed, own, count)


def _kept_in_vmem(needed: Int[Array, "C W"]) -> Int[Array, "C W"]:
    """-1, for nothing, leaves in VMEM what lies there; before the first thing needed, that."""
    first = jnp.take_along_axis(needed, jnp.argmax(needed >= 0, axis=1)[:, None], axis=1)
    return jnp.maximum(jax.lax.cummax(needed, axis=1), jnp.maximum(first, 0))


def over_groups(sizes: Int[Array, " E"], first_row: Int[Array, ""], num_rows: int, tile: int) -> Work:
    """Only rows of groups are visited, a group without rows once. Region e is group e."""
    bounds = jnp.concatenate([first_row[None], first_row + jnp.cumsum(sizes)]).astype(jnp.int32)
    own, region, tiles, count = (x[None] for x in _visits(bounds, num_rows, tile, empty_too=True))
    return Work(region, tiles, tiles, region, own, count)


def _visits(bounds: Int[Array, " R1"], num_rows: int, tile: int, *, empty_too: bool) -> tuple[Array, ...]:
    """The bounds, and region and tile of each visit and how many there are."""
    starts, ends = bounds[:-1], bounds[1:]
    num_tiles, num_regions = -(-num_rows // tile), starts.shape[0]
    first = starts // tile
    visits = jnp.where(ends > starts, (ends + tile - 1) // tile - first, int(empty_too))
    last = jnp.cumsum(visits)
    index = jnp.minimum(jnp.arange(num_tiles + num_regions), last[-1] - 1)
    region = jnp.minimum(jnp.searchsorted(last, index, side="right"), num_regions - 1)
    tiles = jnp.clip(first[region] + index - (last - visits)[region], 0, num_tiles - 1)
    return bounds, region.astype(jnp.int32), tiles.astype(jnp.int32), last[-1].astype(jnp.int32)
