"""Attention of a serving engine's ragged batch over a paged KV cache, which takes the new keys and values in.

Axes: N new tokens (padded), H query heads, K KV heads, D head size, R rows (sequences), P pages a row can have,
L layers.

A page is `[K, page_size, 2 * D]`: head by head, token by token, a token's key and then its value. It is contiguous, so
that one copy fetches it, and what one head needs of it is a matrix whose rows are tokens: no part of it is ever moved
to another place of a tile. Keys and values share a row so that a head size of 64 fills a TPU's 128 lanes, and so that
one row serves both. On a TPU, rows are packed into tiles by 8 (float32), 16 (bfloat16) or 32 (int8, float8), of which
`page_size` has to be a multiple.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.native import ops as native
from pallas_kernels.paged_attention import batched, cpu, reference, tpu
from pallas_kernels.paged_attention.tiling import Tiling

QUANTISED = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
_PLAIN = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def paged_attention(
    q: Float[Array, "N H D"],
    k: Float[Array, "N K D"],
    v: Float[Array, "N K D"],
    pages: Array,
    page_table: Int[Array, "R P"],
    kv_lengths: Int[Array, " R"],
    query_starts: Int[Array, " R+1"],
    num_rows: Int[Array, ""] | int,
    *,
    layer: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    kv_scale: Float[Array, "*L 2 K"] | None = None,
    implementation: Implementation = None,
    chip: str | None = None,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, "N H D"], Array]:
    """Writes the new tokens' keys and values into their pages and attends, causally, over each row's pages.

    Row r < `num_rows` owns the new tokens `query_starts[r] : query_starts[r + 1]`: one when it decodes, several when
    it verifies drafts, many when it takes in a prompt or a chunk of one, none when it waits. With m new tokens and a
    length of n, its token i sits at position n - m + i and sees the positions up to its own. Position p of a row lies
    in page `page_table[r, p // page_size]` at `p % page_size`. A page that gets new tokens must belong to one row
    alone; full pages may be shared. Donate `pages`: they are updated in place. Not differentiable.

    Args:
      q: heads of a group (H / K of them) follow each other.
      pages: [num_pages, K, page_size, 2 D], key then value, in bfloat16, float32, int8 or float8_e4m3fn; with
        `layer`, stacked over layers, [L, ...], and never sliced.
      page_table: entries past a row's length may hold anything.
      kv_lengths: of each row, the new tokens included; at most P * page_size, and never fewer than the new tokens.
      query_starts: from 0 on, not decreasing. Tokens past `query_starts[num_rows]` come out zero, write nothing.
      num_rows: how many of the R rows are live; what stands in the others does not matter.
      layer: which layer's pages to use.
      scale: of the scores; by default D ** -0.5.
      kv_scale: for int8 and float8 pages, what a stored one stands for: [0] of keys, [1] of values, of each head;
        with `layer` [L, 2, K]. Stored are x / kv_scale rounded to nearest even and saturated.
      implementation: None (by platform), "reference", "native", "cpu", "tpu" or "batched", or several in order of
        preference; GPUs have "batched".
      chip: the TPU to tile for; by default that of the mesh in force.
      tiling: of the TPU kernel, instead of what its model of VMEM gives.

    Returns:
      The attention's output, and the pages with the new tokens.

    Raises:
      ValueError: shapes or types don't fit. NotImplementedError: the TPU kernel alone is asked for, and a page or a
      head is of a size that it cannot take. TypeError: differentiated.
    """
    _check(q, k, v, pages, page_table, kv_lengths, query_starts, layer, kv_scale)
    stack = pages if layer is not None else pages[None]
    if kv_scale is not None:
        kv_scale = kv_scale[layer].astype(jnp.float32) if layer is not None else kv_scale.astype(jnp.float32)
    starts, lengths = _live(query_starts, kv_lengths, num_rows)
    layer = jnp.int32(0 if layer is None else layer)
    static = (scale if scale is not None else q.shape[-1] ** -0.5, implementation, chip, tiling)
    arrays = (
        q,
        k,
        v,
        stack,
        page_table.astype(jnp.int32),
        lengths,
        starts,
        jnp.int32(0 if layer is None else layer),
        kv_scale,
    )
    out, stack = _paged_attention(static, *arrays)
    return out, stack.reshape(pages.shape)


def _live(query_starts, kv_lengths, num_rows):
    """Starts and lengths in which rows that are not live have no tokens."""
    starts, total = query_starts.astype(jnp.int32), query_starts.astype(jnp.int32)[num_rows]
    starts = jnp.where(jnp.arange(starts.shape[0]) <= num_rows, starts, total)
    return starts, jnp.where(jnp.arange(kv_lengths.shape[0]) < num_rows, kv_lengths, 0).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _paged_attention(static, *arrays):
    scale, implementation, chip, tiling = static
    implementations = {
        "reference": functools.partial(reference.forward, scale=scale),
        "native": functools.partial(native.paged_attention, scale=scale),
        "cpu": functools.partial(cpu.forward, scale=scale),
        "batched": functools.partial(batched.forward, scale=scale),
        "tpu": functools.partial(tpu.forward, scale=scale, chip=chip, tiling=tiling),
    }
    # the reference copies every page that a row could have; this does not, on any platform
    return dispatch(implementations, implementation, *arrays, default="batched")


def _fwd(static: Any, *arrays: Any) -> Any:
    raise TypeError("paged_attention is for serving and has no gradient: training attends with flash_attention")


def _bwd(static: Any, residuals: Any, cotangents: Any) -> Any:
    raise AssertionError("unreachable: the forward pass raises")


_paged_attention.defvjp(_fwd, _bwd)


def _check(q, k, v, pages, page_table, kv_lengths, query_starts, layer, kv_scale) -> None:
    def expect(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"paged_attention: {message}")

    expect(q.ndim == 3 and k.ndim == 3, f"q {q.shape} and k {k.shape} must be [tokens, heads, head size]")
    fits = k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2]
    expect(fits and q.shape[1] % max(1, k.shape[1]) == 0, f"q {q.shape}, k {k.shape} and v {v.shape} don't fit")
    stacked = "L, " if layer is not None else ""
    expected = (k.shape[1], 2 * k.shape[2])
    expect(
        pages.ndim == 4 + (layer is not None) and (pages.shape[-3], pages.shape[-1]) == expected,
        f"pages {pages.shape}, expected [{stacked}num_pages, {expected[0]}, page_size, {expected[1]}] "
        f"(layer {'given' if layer is not None else 'not given'})",
    )
    rows = kv_lengths.shape[0] if kv_lengths.ndim == 1 else None
    expect(
        rows is not None and page_table.ndim == 2 and page_table.shape[0] == rows and query_starts.shape == (rows + 1,),
        f"page_table {page_table.shape}, kv_lengths {kv_lengths.shape} and query_starts {query_starts.shape}, "
        "expected [R, P], [R] and [R + 1]",
    )
    expect(pages.dtype in _PLAIN + QUANTISED, f"pages of {pages.dtype}; bfloat16, float32, int8 or float8_e4m3fn")
    expect(
        (kv_scale is not None) == (pages.dtype in QUANTISED), f"kv_scale is for int8 and float8; pages: {pages.dtype}"
    )
    scales = (*pages.shape[: pages.ndim - 4], 2, k.shape[1])
    expect(kv_scale is None or kv_scale.shape == scales, f"kv_scale {getattr(kv_scale, 'shape', None)} is not {scales}")
