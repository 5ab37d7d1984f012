"""What the forward and the backward kernels of Mosaic GPU share: sizes, the order of tiles, which keys a tile meets.

Axes: B batch, H query heads, K kv heads, S queries, T keys, D head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels import mosaic_gpu
from pallas_kernels.flash_attention.problem import Problem, Segments
from pallas_kernels.flash_attention.ranges import key_ranges
from pallas_kernels.mosaic_gpu import COMPUTE_WARPGROUPS, WARPGROUP_ROWS

LOG2_E = 1.4426950408889634
QUERIES = COMPUTE_WARPGROUPS * WARPGROUP_ROWS  # of a tile


@dataclasses.dataclass(frozen=True)
class Loop:
    """The blocks of keys that a block of queries meets, or the other way round: first those of which all is seen.

    Attributes:
      full: how many of them are seen whole.
      steps: how many there are.
    """

    first: Any
    full_first: Any
    full_end: Any
    end: Any

    @property
    def full(self) -> Any:
        return self.full_end - self.full_first

    @property
    def steps(self) -> Any:
        return self.end - self.first

    def block(self, i: Any) -> Any:
        """The i-th: the whole ones, those before them, those after them."""
        before = i - self.full + self.first
        after = i + self.first
        return jnp.where(i < self.full, self.full_first + i, jnp.where(before < self.full_first, before, after))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a call; S and T as given, the arrays are padded to multiples of 8."""

    problem: Problem
    batch: int
    heads: int
    groups: int  # query heads that share a kv head
    queries: int
    keys: int
    head_dim: int
    segmented: bool
    block_kv: int = 128

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // QUERIES)

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.query_blocks

    def place(self, tile: Any) -> tuple[Any, Any, Any]:
        """Batch row, head and block of queries of a tile: late queries first, which meet more keys."""
        row, head = lax.div(tile, self.heads), lax.rem(tile, self.heads)
        return lax.rem(row, self.batch), head, self.query_blocks - 1 - lax.div(row, self.batch)

    @property
    def key_tiles(self) -> int:
        return self.batch * (self.heads // self.groups) * -(-self.keys // self.block_kv)

    def key_place(self, tile: Any) -> tuple[Any, Any, Any]:
        """Batch row, kv head and block of a tile of keys: early keys first, which meet more queries."""
        kv_heads = self.heads // self.groups
        row = lax.div(tile, kv_heads)
        return lax.rem(row, self.batch), lax.rem(tile, kv_heads), lax.div(row, self.batch)

    def padded(self, size: int) -> int:
        return size + -size % mosaic_gpu.ROW_ALIGNMENT

    @property
    def vector(self) -> int:
        """Elements of what has a number for each query: whole blocks of them."""
        return self.query_blocks * QUERIES

    def loop(self, ranges: Any, batch: Any, block: Any) -> Loop:
        row = batch if ranges.shape[0] > 1 else 0
        return Loop(*(ranges[row, block, i] for i in range(4)))


def plan(
    problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments
) -> tuple[Plan, list[jax.Array]]:
    """The plan, and the arrays with S and T padded. Raises NotImplementedError for what has no kernel."""
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % mosaic_gpu.ROW_ALIGNMENT), (0, 0))) for x in (q, k, v)]
    mosaic_gpu.check_loadable("flash_attention", *padded)
    if q.shape[3] > 128:
        raise NotImplementedError(f"flash_attention: the Mosaic GPU kernel has heads of 64 or 128, not {q.shape[3]}")
    batch, heads, queries, head_dim = q.shape
    groups, segmented = heads // k.shape[1], segments is not None
    return Plan(problem, batch, heads, groups, queries, k.shape[2], head_dim, segmented), padded


def key_blocks(work: Plan, segments: Segments, q_offset: Any) -> Int[Array, "B N 4"]:
    """`key_ranges` in which a block of keys that reaches past the last one is not seen whole."""
    causal = work.problem.causal
    sizes = (work.queries, work.keys, QUERIES, work.block_kv)
    return key_ranges(*sizes, causal=causal, q_offset=jnp.asarray(q_offset, jnp.int32), segments=segments)


def query_blocks(work: Plan, segments: Segments, q_offset: Any, block_q: int) -> Int[Array, "B M 4"]:
    """The same for each block of keys: the blocks of queries that meet it, and a run of them that see it whole."""
    sizes, offset = (work.queries, work.keys, block_q, work.block_kv), jnp.asarray(q_offset, jnp.int32)
    ranges = key_ranges(*sizes, causal=work.problem.causal, q_offset=offset, segments=segments)
    keys = jnp.arange(-(-work.keys // work.block_kv))[:, None]
    first, full_first, full_end, end = (ranges[:, None, :, i] for i in range(4))
    meets, full = (first <= keys) & (keys < end), (full_first <= keys) & (keys < full_end)
    place = jnp.arange(ranges.shape[1])
    one_past = lambda which: jnp.max(jnp.where(which, place + 1, 0), axis=-1)  # noqa: E731
    start = jnp.argmax(meets, axis=-1).astype(jnp.int32)
    run_end = one_past(full)
    run_first = one_past(~full & (place < run_end[..., None]))
    none = run_end == 0
    bounds = [start, jnp.where(none, start, run_first), jnp.where(none, start, run_end), one_past(meets)]
    return jnp.stack(bounds, axis=-1).astype(jnp.int32)


def segment_arrays(work: Plan, segments: Segments) -> tuple[jax.Array, ...]:
    """Ids of queries and of keys, padded to whole blocks: see `mosaic_gpu.check_whole`."""
    if segments is None:
        return ()
    blocks = zip(segments, (QUERIES, work.block_kv))
    return tuple(jnp.pad(x.astype(jnp.int32), ((0, 0), (0, -x.shape[1] % block))) for x, block in blocks)


def visible(
    work: Plan, shape: tuple[int, int], query: Any, key: Any, q_offset: Any, q_ids: Any, k_ids: Any, queries: int = 0
) -> jax.Array:
    """Which of the keys from `key` on the queries from `query` on see, of the shape given.

    Args:
      q_ids, k_ids: buffers of the segments' ids, or empty.
      queries: the axis of the queries.
    """
    keys = lax.broadcasted_iota(jnp.int32, shape, 1 - queries) + key
    if work.problem.causal:
        places = lax.broadcasted_iota(jnp.int32, shape, queries) + (query + q_offset)
        seen = keys <= jnp.minimum(places, work.keys - 1)
    else:
        seen = keys < work.keys
    if q_ids:
        ids = [lax.broadcast_in_dim(x[0][...], shape, [axis]) for x, axis in ((q_ids, queries), (k_ids, 1 - queries))]
        seen &= ids[0] == ids[1]
    return seen
