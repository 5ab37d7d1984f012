"""How the TPU kernel cuts its work, from a model of the VMEM that it takes.

Axes: H query heads, K KV heads, G query heads of a KV head, W lanes of a query (D, or 2 D where D does not fill them),
B new tokens of a piece, T positions of a block of pages, M = B * G rows of a product.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.chip import Chip
from pallas_kernels.mosaic import VMEM_SHARE

LANES = 128
_LARGEST_BLOCK = 512
_TOKEN_TILES = (1, 8, 16, 32, 64, 128)
FEW_ROWS = 128  # products with so few rows are made for all heads together, so that one's latency hides another's
_MOST_ROWS = 512
_OWN = 1 << 20  # VMEM for the compiler's own scratch


@dataclasses.dataclass(frozen=True)
class Tiling:
    """
    Attributes:
      kv_block: positions that are fetched and attended to at a time; whole pages.
      token_tiles: how many new tokens a piece of work can have, rising; a piece takes the least that holds it. Each
        is compiled separately. The last one's products are the largest.
    """

    kv_block: int
    token_tiles: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the tiling depends on."""

    num_tokens: int
    num_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages_per_row: int
    dtype: jnp.dtype
    page_dtype: jnp.dtype

    @property
    def group(self) -> int:
        return self.num_heads // self.kv_heads

    @property
    def width(self) -> int:
        """Lanes of a query: a head too narrow to be cut from its row is multiplied with the row, value and all."""
        return self.head_dim if self.head_dim % LANES == 0 else 2 * self.head_dim

    @property
    def rows_of_a_tile(self) -> int:
        """Tokens that share a tile of a page: what is written at once."""
        return 32 // self.page_dtype.itemsize

    @property
    def quantised(self) -> bool:
        return self.page_dtype.itemsize == 1

    @property
    def compute_dtype(self) -> jnp.dtype:
        exact = jnp.dtype(jnp.float32) in (self.dtype, self.page_dtype)
        return jnp.dtype(jnp.float32 if exact else jnp.bfloat16)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def padded_rows(tokens: int, group: int) -> int:
    return round_up(tokens * group, 16)


def rows_at_once(tokens: int, group: int) -> int:
    """Rows of one product: those of a power of two of tokens, up to some hundred, and whole tiles."""
    while tokens > 1 and tokens % 2 == 0 and tokens * group > _MOST_ROWS and tokens // 2 * group % 16 == 0:
        tokens //= 2
    return padded_rows(tokens, group)


def vmem_bytes(problem: Problem, tiling: Tiling) -> int:
    """What the kernel asks of VMEM: both halves of each double buffer, its scratch, and a product's temporaries."""
    p, tokens, keys = problem, tiling.token_tiles[-1], tiling.kv_block
    rows, at_once = padded_rows(tokens, p.group), rows_at_once(tokens, p.group)
    lanes = round_up(p.width, LANES)
    sublanes = 32 // p.dtype.itemsize
    kv = 2 * p.kv_heads * keys * 2 * p.head_dim * p.page_dtype.itemsize
    q_and_out = 4 * tokens * round_up(p.num_heads, sublanes) * lanes * p.dtype.itemsize
    head_lanes = round_up(p.head_dim, LANES)
    new = 4 * tokens * round_up(p.kv_heads, sublanes) * head_lanes * p.dtype.itemsize
    staged = (tokens + 2 * p.rows_of_a_tile) * round_up(p.kv_heads, 8) * 2 * p.head_dim * 4
    queries = p.kv_heads * rows * lanes * p.compute_dtype.itemsize
    state = p.kv_heads * rows * (lanes + 2 * LANES) * 4
    few = max((padded_rows(n, p.group) for n in tiling.token_tiles if padded_rows(n, p.group) <= FEW_ROWS), default=0)
    scored = max(at_once, few * p.kv_heads)
    scores = scored * keys * (3 * 4 + p.compute_dtype.itemsize) + 3 * scored * lanes * 4
    operands = (p.kv_heads if few else 1) * keys * 2 * p.head_dim * p.compute_dtype.itemsize
    return kv + q_and_out + new + staged + queries + state + scores + operands + _OWN


def choose(problem: Problem, chip: Chip) -> Tiling:
    """The largest pieces and blocks that fit the chip.

    Raises:
      NotImplementedError: nothing does, or the kernel cannot take such pages or heads.
    """
    check(problem)
    budget = VMEM_SHARE * chip.on_chip_bytes
    page_size, most = problem.page_size, problem.page_size * problem.pages_per_row
    blocks = sorted({min(most, round_up(n, page_size)) for n in (_LARGEST_BLOCK, 256, 128, page_size)}, reverse=True)
    tiles = [n for n in _TOKEN_TILES if n < problem.num_tokens * 2 and n * problem.group**2 < 1 << 20]
    for last in range(len(tiles), 0, -1):
        # a block of pages must not be shorter than a piece's tokens by much: each block is a step of the pipeline
        for block in blocks:
            chosen = tuple(n for n in tiles[:last] if n in (1, 8, tiles[last - 1]))
            if block >= min(_LARGEST_BLOCK // 2, blocks[0]) or last == 1:
                tiling = Tiling(block, chosen)
                if vmem_bytes(problem, tiling) <= budget:
                    return tiling
    raise NotImplementedError(f"no tiling of {problem} fits {budget / 2**20:.1f} MiB")


def check(problem: Problem) -> None:
    if (2 * problem.head_dim) % LANES:
        raise NotImplementedError(f"head size {problem.head_dim} is not a multiple of {LANES // 2}")
    if problem.page_size % problem.rows_of_a_tile:
        raise NotImplementedError(
            f"pages of {problem.page_size} tokens of {problem.page_dtype}, not a multiple of {problem.rows_of_a_tile}"
        )
