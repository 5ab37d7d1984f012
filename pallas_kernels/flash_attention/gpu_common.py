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
class KeyLoop:
    """The blocks of keys that a block of queries meets: first those that all of its queries see whole.

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

    def key_loop(self, ranges: Any, batch: Any, block: Any) -> KeyLoop:
        row = batch if ranges.shape[0] > 1 else 0
        return KeyLoop(*(ranges[row, block, i] for i in range(4)))


def plan(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Plan, list[jax.Array]]:
    """The plan, and the arrays with S and T padded. Raises NotImplementedError for what has no kernel."""
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % mosaic_gpu.ROW_ALIGNMENT), (0, 0))) for x in (q, k, v)]
    mosaic_gpu.check_loadable("flash_attention", *padded)
    if q.shape[3] > 128:
        raise NotImplementedError(f"flash_attention: the Mosaic GPU kernel has heads of 64 or 128, not {q.shape[3]}")
    batch, heads, queries, head_dim = q.shape
    return Plan(problem, batch, heads, heads // k.shape[1], queries, k.shape[2], head_dim), padded


def key_blocks(work: Plan, segments: Segments, q_offset: Any) -> Int[Array, "B N 4"]:
    """`key_ranges` in which a block of keys that reaches past the last one is not seen whole."""
    causal = work.problem.causal
    sizes = (work.queries, work.keys, QUERIES, work.block_kv)
    return key_ranges(*sizes, causal=causal, q_offset=jnp.asarray(q_offset, jnp.int32), segments=segments)


def segment_arrays(work: Plan, segments: Segments) -> tuple[jax.Array, ...]:
    """Ids of queries and of keys, padded to whole blocks: TMA needs aligned rows."""
    if segments is None:
        return ()
    blocks = zip(segments, (QUERIES, work.block_kv))
    return tuple(jnp.pad(x.astype(jnp.int32), ((0, 0), (0, -x.shape[1] % block))) for x, block in blocks)


def visible(work: Plan, query: Any, key: Any, q_offset: Any, q_ids: Any, k_ids: Any) -> jax.Array:
    """Which of the keys from `key` on the queries from `query` on see, [64, block_kv]."""
    shape = (WARPGROUP_ROWS, work.block_kv)
    keys = lax.broadcasted_iota(jnp.int32, shape, 1) + key
    if work.problem.causal:
        queries = lax.broadcasted_iota(jnp.int32, shape, 0) + (query + q_offset)
        seen = keys <= jnp.minimum(queries, work.keys - 1)
    else:
        seen = keys < work.keys
    if q_ids:
        ids = [lax.broadcast_in_dim(x[0][...], shape, [axis]) for axis, x in enumerate((q_ids, k_ids))]
        seen &= ids[0] == ids[1]
    return seen
