"""Paged attention for TPUs: pages are fetched one block ahead, across rows too, and written back where they changed.

The work is cut into pieces of one row's new tokens (`rows.cut`), which one loop goes through; a piece goes through
its blocks of pages from the last to the first, so that what it writes has long arrived when the next piece, which may
read it, begins. Row r's page numbers are fetched two pieces ahead: the table may be larger than SMEM.

Axes: N new tokens, H query heads, K KV heads, D head size, W lanes of a query, R rows, P pages of a row, I pieces.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chip as chips
from pallas_kernels import mosaic
from pallas_kernels.paged_attention import rows
from pallas_kernels.paged_attention import tiling as tilings
from pallas_kernels.paged_attention.tpu_kernel import Scratch, kernel


def forward(q, k, v, pages, page_table, lengths, starts, layer, kv_scale, *, scale, chip=None, tiling=None):
    """[N, H, D] and pages [L, num_pages, K, page_size, 2 D] -> the same again; see `api.paged_attention`."""
    chip = chips.tpu_to_tile_for(chip)
    problem = _problem(q, k, pages, page_table)
    tilings.check(problem)
    if 0 in (q.shape[0], lengths.shape[0], page_table.shape[1], pages.shape[1]):
        return jnp.zeros_like(q), pages
    tiling = tiling or tilings.choose(problem, chip)
    items = rows.cut(starts, lengths, q.shape[0], tiling.token_tiles[-1])
    bounds = _bounds(items, tiling.kv_block, chip.cores)
    wide = jnp.pad(q, ((0, 0), (0, 0), (0, problem.width - q.shape[2])))
    scalars = (bounds, starts[-1:], items.row, items.start, items.tokens, items.position, layer.reshape(1))
    arrays = (*_scales(kv_scale, scale, problem), wide, k, v, page_table[:, None], pages)
    out, pages = _call(problem, tiling, chip, scalars, arrays)
    return out[:, :, problem.width - q.shape[2] :], pages  # a narrow head's result stands where the values stood


def _problem(q, k, pages, page_table) -> tilings.Problem:
    return tilings.Problem(
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        page_size=pages.shape[3],
        pages_per_row=page_table.shape[1],
        dtype=q.dtype,
        page_dtype=pages.dtype,
    )


def _bounds(items: rows.Items, kv_block: int, cores: int) -> jax.Array:
    """[cores + 1]: each core's pieces, shared out by blocks of pages; a row, which is written to, stays on one core."""
    if cores == 1:
        return jnp.stack([jnp.int32(0), items.count])
    index = jnp.arange(items.row.shape[0])
    blocks = jnp.where(index < items.count, -(-(items.position + items.tokens) // kv_block) + 1, 0)
    done = jnp.cumsum(blocks)
    first_of_row = jnp.concatenate([jnp.ones(1, bool), items.row[1:] != items.row[:-1]])
    share = done[-1] * jnp.arange(1, cores) // cores
    # the first piece of a row whose predecessors do a core's share
    may_begin = first_of_row & (done - blocks >= share[:, None])
    begins = jnp.minimum(jnp.where(may_begin, index, index.shape[0]).min(1), items.count)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), begins.astype(jnp.int32), items.count[None]])


def _scales(kv_scale, scale, p: tilings.Problem) -> tuple[jax.Array, jax.Array]:
    """[2, K]: factors of the scores and of the result. [2, K, D]: factors of the keys and values that are stored."""
    kv_scale = jnp.ones((2, p.kv_heads), jnp.float32) if kv_scale is None else kv_scale
    inverse = jnp.broadcast_to(1 / kv_scale[..., None], (2, p.kv_heads, p.head_dim))
    return kv_scale * jnp.array([[scale], [1.0]], jnp.float32), inverse


def _call(p: tilings.Problem, tiling: tilings.Tiling, chip: chips.Chip, scalars, inputs):
    operands = mosaic.varying_alike(*scalars, *inputs)
    q, *_, pages = operands[len(scalars) + 2 :]
    smem, vmem, hbm = (pl.BlockSpec(memory_space=m) for m in (pltpu.SMEM, pltpu.VMEM, pltpu.HBM))
    call = pl.pallas_call(
        functools.partial(kernel, problem=p, tiling=tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(scalars[0].shape[0] - 1,),
            in_specs=[smem, vmem, hbm, hbm, hbm, hbm, hbm],
            out_specs=[hbm, hbm],
            scratch_shapes=[_scratch(p, tiling)],
        ),
        out_shape=[mosaic.kernel_output(x.shape, x.dtype, q) for x in (q, pages)],
        input_output_aliases={len(operands) - 1: 1},
        compiler_params=mosaic.tpu_params(chip, "parallel"),
        cost_estimate=_most(p, q, pages),
        name="paged_attention",
    )
    return call(*operands)


def _most(p: tilings.Problem, q: jax.Array, pages: jax.Array) -> pl.CostEstimate:
    """An upper bound for XLA's scheduler, which cannot know the lengths: every page of the layer is in use."""
    tokens, kv = q.shape[0], pages.size // pages.shape[0]
    scores = tokens * p.num_heads * min(p.pages_per_row, pages.shape[1]) * p.page_size
    moved = 2 * q.size * q.dtype.itemsize + kv * pages.dtype.itemsize
    return pl.CostEstimate(flops=4 * scores * p.head_dim, transcendentals=scores, bytes_accessed=moved)


def _scratch(p: tilings.Problem, tiling: tilings.Tiling) -> Scratch:
    tokens = tiling.token_tiles[-1]
    product_rows = tilings.padded_rows(tokens, p.group)
    state = lambda lanes: pltpu.VMEM((p.kv_heads, product_rows, lanes), jnp.float32)  # noqa: E731
    return Scratch(
        kv=pltpu.VMEM((2, p.kv_heads, tiling.kv_block, 2 * p.head_dim), p.page_dtype),
        q_in=pltpu.VMEM((2, tokens, p.num_heads, p.width), p.dtype),
        k_in=pltpu.VMEM((2, tokens, p.kv_heads, p.head_dim), p.dtype),
        v_in=pltpu.VMEM((2, tokens, p.kv_heads, p.head_dim), p.dtype),
        o_out=pltpu.VMEM((2, tokens, p.num_heads, p.width), p.dtype),
        new=pltpu.VMEM((tokens + 2 * p.rows_of_a_tile, p.kv_heads, 2 * p.head_dim), jnp.float32),
        queries=pltpu.VMEM((p.kv_heads, product_rows, p.width), p.compute_dtype),
        highest=state(tilings.LANES),
        total=state(tilings.LANES),
        weighted=state(p.width),
        page_ids=pltpu.SMEM((3, 1, p.pages_per_row), jnp.int32),
        tiles_written=pltpu.SMEM((2,), jnp.int32),
        tokens_in=pltpu.SemaphoreType.DMA((2,)),
        ids_in=pltpu.SemaphoreType.DMA((3,)),
        pages_in=pltpu.SemaphoreType.DMA((2,)),
        tiles_out=pltpu.SemaphoreType.DMA((2,)),
        tokens_out=pltpu.SemaphoreType.DMA((2,)),
    )
