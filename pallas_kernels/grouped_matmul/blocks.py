"""Cutting rows sorted by group into blocks of one group each: the work list of the portable implementations."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Blocks(NamedTuple):
    """Blocks in the order of their rows. Only the first `count` of the arrays' entries are blocks."""

    group: Int[Array, " n"]
    start: Int[Array, " n"]  # first row
    rows: Int[Array, " n"]
    count: Int[Array, ""]


def cut(group_sizes: Int[Array, " E"], num_rows: int, block: int, singles: int = 0) -> Blocks:
    """Blocks of at most `block` rows, none across a border between groups; groups without rows have none.

    A group of at most `singles` rows becomes blocks of one row each.
    """
    num_groups = group_sizes.shape[0]
    size = jnp.where(group_sizes <= singles, 1, block)  # of each group's blocks
    per_group = (group_sizes + size - 1) // size
    last = jnp.cumsum(per_group)
    index = jnp.arange(min(num_rows, num_rows // block + num_groups * max(1, singles)))
    group = jnp.minimum(jnp.searchsorted(last, index, side="right"), num_groups - 1)
    passed = (index - (last - per_group)[group]) * size[group]
    start = (jnp.cumsum(group_sizes) - group_sizes)[group] + passed
    rows = jnp.clip(group_sizes[group] - passed, 0, size[group])
    return Blocks(group, start, rows, last[-1])
