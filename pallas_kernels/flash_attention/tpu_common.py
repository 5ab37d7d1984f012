"""What the forward and backward TPU kernels share: the padded problem, pieces of rows, loops over keys, the mask.

Axes: B batch, K kv heads, G query heads per kv head, S queries, T keys, D head dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.chip import Chip, tpu_to_tile_for
from pallas_kernels.flash_attention import tiling as tiles
from pallas_kernels.flash_attention.problem import Problem, Segments, Tiling
from pallas_kernels.flash_attention.ranges import BOUNDS, key_ranges

LOG2_E = math.log2(math.e)  # the kernels' exponentials have base two
_MOST_RANGES = 1 << 16  # words of scalar memory


@dataclasses.dataclass(frozen=True)
class Work:
    """The static part of a call; queries and keys are padded to whole blocks."""

    problem: Problem
    chip: Chip
    tiling: Tiling
    batch: int
    kv_heads: int
    groups: int
    queries: int
    keys: int
    head_dim: int
    dtype: Any
    segmented: bool

    @property
    def padded_queries(self) -> int:
        return -(-self.queries // self.tiling.block_q) * self.tiling.block_q

    @property
    def padded_keys(self) -> int:
        return -(-self.keys // self.tiling.resident) * self.tiling.resident

    @property
    def query_blocks(self) -> int:
        return self.padded_queries // self.tiling.block_q

    @property
    def residents(self) -> int:
        """Pieces of keys and values, of which one is in VMEM at a time."""
        return self.padded_keys // self.tiling.resident

    @property
    def blocks_in_resident(self) -> int:
        return self.tiling.resident // self.tiling.block_kv

    @property
    def units(self) -> list[tuple[int, int]]:
        """Pieces of rows of a block of queries that are computed together: (head, first row)."""
        return [(head, row) for head in range(self.groups) for row in range(0, self.tiling.block_q, self.tiling.rows)]

    @property
    def log2_scale(self) -> float:
        return self.problem.scale * LOG2_E


def plan(q, k, segments: Segments, problem: Problem, bytes_asked: Callable[..., int]) -> Work:
    """Raises NotImplementedError for what the kernels can't do."""
    (batch, heads, queries, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    groups = heads // kv_heads
    if groups > tiles.MOST_HEADS:
        raise NotImplementedError(f"flash_attention: {groups} query heads per kv head, at most {tiles.MOST_HEADS}")
    chip = tpu_to_tile_for(problem.chip)
    shape = tiles.Shape(groups, queries, keys, head_dim, q.dtype)
    tiling = problem.tiling or tiles.choose(chip, shape, bytes_asked)
    work = Work(problem, chip, tiling, batch, kv_heads, groups, queries, keys, head_dim, q.dtype, segments is not None)
    if work.query_blocks * BOUNDS * (batch if work.segmented else 1) > _MOST_RANGES:
        raise NotImplementedError(f"flash_attention: {batch} rows of {queries} queries are too many blocks")
    return work


def pad(x, axis: int, size: int, mode: str = "constant"):
    """Up to `size` along an axis."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)], mode=mode)


def queries_of(x, work: Work):
    """[B, H, S, ...] -> [B, K, G, padded S, ...]."""
    return pad(x.reshape(work.batch, work.kv_heads, work.groups, *x.shape[2:]), 3, work.padded_queries)


def segment_rows(segments: Segments, work: Work) -> list[jax.Array]:
    """[B, 1, padded S] and [B, 1, padded T], or nothing."""
    if segments is None:
        return []
    sizes = (work.padded_queries, work.padded_keys)
    return [pad(ids, 1, size, mode="edge")[:, None] for ids, size in zip(segments, sizes)]


def ranges_of(segments: Segments, q_offset, work: Work) -> jax.Array:
    """The blocks of keys that each block of queries meets: [B or 1, N, 4]."""
    return key_ranges(
        work.queries, work.keys, work.tiling.block_q, work.tiling.block_kv,
        causal=work.problem.causal, q_offset=q_offset, segments=segments,
    )  # fmt: skip


def bounds(ranges_ref, batch, block, work: Work):
    """first, full_first, full_end and end of a block of queries."""
    row = (batch if work.segmented else 0) * work.query_blocks + block
    return [ranges_ref[row * BOUNDS + i] for i in range(BOUNDS)]


def over_keys(first, full_first, full_end, end, step: Callable[[Any, bool], None]) -> None:
    """`step(block, masked)` for each block of keys from first to end."""
    before = full_first - first

    def masked(i, _):
        step(jnp.where(i < before, first + i, full_end + i - before), True)

    jax.lax.fori_loop(full_first, full_end, lambda block, _: step(block, False), None)
    jax.lax.fori_loop(0, before + end - full_end, masked, None)


def each(count: int, do: Callable[[Any], None]) -> None:
    """`do(i)` for i below `count`: a loop of the kernel, so that what is not worth unrolling stays short."""
    jax.lax.fori_loop(0, count, lambda i, _: do(i), None)


def key_rows(block, work: Work) -> Any:
    """The rows of a block of keys among those in VMEM."""
    return pl.ds(pl.multiple_of(block * work.tiling.block_kv, work.tiling.block_kv), work.tiling.block_kv)


def in_turn(units: list[Any], *stages: Callable[..., tuple[Any, ...]]) -> None:
    """Runs the stages for every unit, the first of the next unit before the rest of the one before.

    So the matrix unit has work while the softmax of a unit is under way.
    """
    first, *rest = stages
    ahead = first(*units[0])
    for unit, following in zip(units, [*units[1:], None]):
        done, ahead = ahead, first(*following) if following else None
        for stage in rest:
            done = stage(*unit, *done)


def visible(q_start, k_start, q_offset, work: Work, q_ids, k_ids, shape: tuple[int, int], q_axis: int):
    """Which scores of a block count, for queries along `q_axis` and keys along the other.

    Args:
      q_ids, k_ids: segment ids, [1, rows] and [1, block_kv], or None.
    """
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - q_axis)
    last = work.keys - 1 - k_start
    if work.problem.causal:
        limit = jax.lax.broadcasted_iota(jnp.int32, shape, q_axis) + (q_start + q_offset - k_start)
        see = key <= (limit if work.padded_keys == work.keys else jnp.minimum(limit, last))
    else:
        see = key <= last
    if q_ids is not None:
        upright, lying = (q_ids, k_ids) if q_axis == 0 else (k_ids, q_ids)
        see &= _upright(upright, shape) == lying
    return see


def _upright(ids, shape: tuple[int, int]):
    """[1, n] -> [n, m], each id along its row."""
    turned = jnp.broadcast_to(ids, (tiles.LANES, shape[0])).T
    return widen(turned, shape[1])


def widen(x, columns: int):
    """[n, 128] whose columns are all alike -> [n, columns]."""
    if columns <= tiles.LANES:
        return x[:, :columns]
    if columns % tiles.LANES:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], columns))
    return jnp.tile(x, (1, columns // tiles.LANES))
