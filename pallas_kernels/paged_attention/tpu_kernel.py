"""The loop of the TPU kernel over pieces of work and their blocks of pages, and every copy that it makes.

A step is one block of one piece. When it begins, the copies of the next step's pages are started, whichever piece and
row that is; then it waits for its own. A piece's tokens are fetched a piece ahead, its page numbers two.

Axes: N new tokens, H query heads, K KV heads, D head size, W lanes of a query, R rows, P pages of a row, L layers,
I pieces, B new tokens of a piece, T positions of a block, M = B * G rows of a product, C tokens of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic import divide, divide_up, remainder
from pallas_kernels.paged_attention import tpu_attend
from pallas_kernels.paged_attention.tiling import Problem, Tiling


class Scratch(NamedTuple):
    kv: Any  # [2, K, T, 2 D]: of this step and the next
    q_in: Any  # [2, B, H, W]: of this piece and the next, as are k_in and v_in
    k_in: Any  # [2, B, K, D]
    v_in: Any
    o_out: Any  # [2, B, H, W]: of this piece and the last
    new: Any  # [C + B + C, K, 2 D]: what is stored of the piece's tokens, the first at C
    queries: Any  # [K, M, W]
    highest: Any  # [K, M, 128]: the softmax's highest score so far, in every lane
    total: Any  # [K, M, 128]: its denominator
    weighted: Any  # [K, M, W]: its numerator
    page_ids: Any  # SMEM [3, 1, P]: of this piece, the next, and the one after
    tiles_written: Any  # SMEM [2]: copies still under way out of each half of `kv`
    tokens_in: Any  # semaphores
    ids_in: Any
    pages_in: Any
    tiles_out: Any
    tokens_out: Any


@dataclasses.dataclass(frozen=True)
class Refs:
    """What the kernel works on. `row`, `start`, `tokens` and `position` are of pieces, in SMEM; see `rows.Items`."""

    bounds: Any  # SMEM [cores + 1]: where each core's pieces begin
    tokens_in_use: Any  # SMEM [1]
    row: Any
    start: Any
    tokens: Any
    position: Any
    layer: Any
    factors: Any  # SMEM [2, K]: of the scores, and of the result
    inverse: Any  # VMEM [2, K, D]: 1 / kv_scale
    q: Any  # HBM, as are the rest
    k: Any
    v: Any
    page_table: Any  # [R, 1, P]
    pages_in: Any  # the same memory as `pages`
    out: Any
    pages: Any
    scratch: Scratch


def kernel(*refs: Any, problem: Problem, tiling: Tiling) -> None:
    r = Refs(*refs)
    core = pl.program_id(0)
    first, last = r.bounds[core], r.bounds[core + 1]
    loop = _Loop(r, problem, tiling, first, last)

    @pl.when(first < last)
    def _():
        loop.begin()
        jax.lax.fori_loop(first, last, loop.piece, jnp.int32(0))
        loop.end()

    pl.when(core == 0)(lambda: _clear(r))


def _clear(r: Refs) -> None:
    """Zeros for the tokens past the last row."""
    zero, into = r.scratch.o_out.at[0, 0], lambda j: r.out.at[j]
    zero[...] = jnp.zeros(zero.shape, zero.dtype)
    for action in ("start", "wait"):
        copies = lambda j, _: _do(pltpu.make_async_copy(zero, into(j), r.scratch.tokens_out.at[0]), action)  # noqa: B023, E731
        jax.lax.fori_loop(r.tokens_in_use[0], r.out.shape[0], copies, None)


@dataclasses.dataclass(frozen=True)
class _Loop:
    r: Refs
    p: Problem
    t: Tiling
    first: Any
    last: Any

    def begin(self) -> None:
        first, r = self.first, self.r
        r.scratch.tiles_written[0] = r.scratch.tiles_written[1] = 0
        self.page_ids(first).start()
        pl.when(first + 1 < self.last)(lambda: self.page_ids(first + 1).start())
        self.tokens_in(first, "start")
        self.page_ids(first).wait()
        self.fetch(first, self.blocks(first) - 1, 0, "start")

    def end(self) -> None:
        self.drain(0)
        self.drain(1)
        self.tokens_out(self.last - 1, "wait")
        pl.when(self.last - self.first > 1)(lambda: self.tokens_out(self.last - 2, "wait"))

    def piece(self, i: Any, steps_before: Any) -> Any:
        pl.when(i + 1 < self.last)(lambda: self.page_ids(i + 1).wait())
        pl.when(i + 2 < self.last)(lambda: self.page_ids(i + 2).start())
        pl.when(i + 1 < self.last)(lambda: self.tokens_in(i + 1, "start"))
        self.tokens_in(i, "wait")
        self.by_size(i, functools.partial(tpu_attend.prepare, self.r, self.p, remainder(i, 2)))
        blocks = self.blocks(i)
        jax.lax.fori_loop(0, blocks, lambda s, _: self.step(i, s, steps_before + s), None)
        pl.when(i - self.first >= 2)(lambda: self.tokens_out(i - 2, "wait"))
        self.by_size(i, functools.partial(tpu_attend.finish, self.r, self.p, remainder(i, 2)))
        self.tokens_out(i, "start")
        return steps_before + blocks

    def step(self, i: Any, s: Any, steps_before: Any) -> None:
        half, other = remainder(steps_before, 2), remainder(steps_before + 1, 2)
        block = self.blocks(i) - 1 - s
        ends_piece = block == 0
        after = jnp.where(ends_piece, i + 1, i)
        exists = after < self.last
        after = jnp.where(exists, after, i)
        block_after = jnp.where(ends_piece, self.blocks(after) - 1, block - 1)
        low, high = self.tiles(i, block)
        # what this step writes may be what the next piece of the same row reads
        awaits_tiles = ends_piece & (high > low) & (self.r.row[after] == self.r.row[i])

        self.drain(other)
        pl.when(exists & ~awaits_tiles)(lambda: self.fetch(after, block_after, other, "start"))
        self.fetch(i, block, half, "wait")
        span = (self.r.position[i], self.end_of(i), block * self.t.kv_block)
        tpu_attend.take_in(self.r, self.p, self.t, half, span, low, high)
        self.write(i, block, half, low, high)

        @pl.when(exists & awaits_tiles)
        def _():
            self.drain(half)
            self.fetch(after, block_after, other, "start")

        self.by_size(i, functools.partial(tpu_attend.attend, self.r, self.p, self.t, half, span))

    def by_size(self, i: Any, function: Any) -> None:
        """`function(B)` of the least of the pieces' sizes that holds piece i."""
        sizes, tokens = self.t.token_tiles, self.r.tokens[i]
        for below, size in zip((0, *sizes), sizes):
            pl.when((tokens > below) & (tokens <= size))(functools.partial(function, size))

    def end_of(self, i: Any) -> Any:
        return self.r.position[i] + self.r.tokens[i]

    def blocks(self, i: Any) -> Any:
        """How many blocks of pages piece i sees; one at least, so that every piece has an end."""
        return jnp.maximum(divide_up(self.end_of(i), self.t.kv_block), 1)

    def tiles(self, i: Any, block: Any) -> tuple[Any, Any]:
        """The range of tiles of tokens in the row in which the block holds new tokens of piece i."""
        start, size = block * self.t.kv_block, self.p.rows_of_a_tile
        low = jnp.maximum(self.r.position[i], start)
        high = jnp.minimum(self.end_of(i), start + self.t.kv_block)
        low_tile = divide(low, size)
        return low_tile, jnp.where(low < high, divide_up(high, size), low_tile)

    # copies: "start" and "wait" go through the same ones

    def page_ids(self, i: Any) -> Any:
        slot = remainder(i, 3)
        s = self.r.scratch
        return pltpu.make_async_copy(self.r.page_table.at[self.r.row[i]], s.page_ids.at[slot], s.ids_in.at[slot])

    def tokens_in(self, i: Any, action: str) -> None:
        half, start, s = remainder(i, 2), self.r.start[i], self.r.scratch

        def token(j, _):
            for source, into in ((self.r.q, s.q_in), (self.r.k, s.k_in), (self.r.v, s.v_in)):
                _do(pltpu.make_async_copy(source.at[start + j], into.at[half, j], s.tokens_in.at[half]), action)

        jax.lax.fori_loop(0, self.r.tokens[i], token, None)

    def tokens_out(self, i: Any, action: str) -> None:
        half, start, s = remainder(i, 2), self.r.start[i], self.r.scratch

        def token(j, _):
            _do(pltpu.make_async_copy(s.o_out.at[half, j], self.r.out.at[start + j], s.tokens_out.at[half]), action)

        jax.lax.fori_loop(0, self.r.tokens[i], token, None)

    def fetch(self, i: Any, block: Any, half: Any, action: str) -> None:
        """The pages of the block that hold anything from before piece i."""
        size, per_block, s = self.p.page_size, self.t.kv_block // self.p.page_size, self.r.scratch
        before = jnp.maximum(self.r.position[i] - block * self.t.kv_block, 0)
        pages = jnp.minimum(divide_up(before, size), per_block)

        def page(j, _):
            source = self.r.pages.at[self.r.layer[0], s.page_ids[remainder(i, 3), 0, block * per_block + j]]
            into = s.kv.at[half, :, pl.ds(pl.multiple_of(j * size, size), size), :]
            _do(pltpu.make_async_copy(source, into, s.pages_in.at[half]), action)

        jax.lax.fori_loop(0, pages, page, None)

    def write(self, i: Any, block: Any, half: Any, low: Any, high: Any) -> None:
        """Starts the copies of the tiles `low` to `high` into their pages."""
        size, page_size, s = self.p.rows_of_a_tile, self.p.page_size, self.r.scratch

        def tile(j, _):
            page = s.page_ids[remainder(i, 3), 0, divide(j * size, page_size)]
            source = s.kv.at[half, :, pl.ds(pl.multiple_of(j * size - block * self.t.kv_block, size), size), :]
            place = pl.ds(pl.multiple_of(remainder(j * size, page_size), size), size)
            into = self.r.pages.at[self.r.layer[0], page, :, place, :]
            pltpu.make_async_copy(source, into, s.tiles_out.at[half]).start()

        jax.lax.fori_loop(low, high, tile, None)
        s.tiles_written[half] = high - low

    def drain(self, half: Any) -> None:
        """Waits until every tile that was being written out of a half of `kv` has arrived."""
        size, s = self.p.rows_of_a_tile, self.r.scratch

        def tile(j, _):
            like = s.kv.at[half, :, pl.ds(0, size), :]
            pltpu.make_async_copy(like, self.r.pages.at[0, 0, :, pl.ds(0, size), :], s.tiles_out.at[half]).wait()

        jax.lax.fori_loop(0, s.tiles_written[half], tile, None)
        s.tiles_written[half] = 0


def _do(copy: Any, action: str) -> None:
    copy.start() if action == "start" else copy.wait()
