"""The native functions as implementations of the ops. Each raises NotImplementedError for what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic import varying_alike
from pallas_kernels.native import call

_READ = (jnp.float32, jnp.bfloat16)
_MOST_ROWS = 384  # of a mean group; XLA's products of more are as quick


def fused_moe(x, matrices, scales, indices, weights, offset, layer, *, transpose_rhs) -> jax.Array:
    """[T, D] -> [T, D]; see `fused_moe.api`."""
    _check(matrices, scales, transpose_rhs, x)
    places = jnp.stack([layer, jnp.int32(0) if offset is None else offset])
    args = varying_alike(_float32(x), *matrices, indices, weights, places)
    return call("glm45_fused_moe", jax.ShapeDtypeStruct(x.shape, jnp.float32), *args).astype(x.dtype)


def grouped_matmul(lhs, rhs, scale, group_sizes, first_row, layer, *, transpose_rhs, dtype) -> jax.Array:
    """[M, K] x [L, E, N, K] -> [M, N]; see `grouped_matmul.api`."""
    groups = group_sizes, first_row, layer
    return _grouped(lhs, [rhs], [scale], groups, transpose_rhs).astype(dtype)


def grouped_swiglu(lhs, weights, scales, groups, *, transpose_rhs, keep_products) -> tuple[jax.Array]:
    """[M, F]; see `grouped_swiglu.api`."""
    if keep_products:
        raise NotImplementedError("products kept for the backward pass")
    return (_grouped(lhs, weights, scales, groups, transpose_rhs).astype(lhs.dtype),)


def _grouped(lhs, matrices: Sequence[jax.Array], scales, groups, transpose_rhs: bool) -> jax.Array:
    """Rows of each group [M, K] times its matrix of [L, E, N, K], or the SwiGLU of two such products: [M, N]."""
    _check(matrices, scales, transpose_rhs, lhs)
    sizes, first_row, layer = groups
    if lhs.shape[0] > _MOST_ROWS * sizes.shape[0]:
        raise NotImplementedError("many rows in each group")
    second = matrices[1] if len(matrices) == 2 else jnp.zeros(0)
    args = varying_alike(_float32(lhs), matrices[0], second, sizes, jnp.stack([layer, first_row]))
    return call("glm45_grouped", jax.ShapeDtypeStruct((lhs.shape[0], matrices[0].shape[-2]), jnp.float32), *args)


def paged_attention(q, k, v, pages, page_table, lengths, starts, layer, kv_scale, *, scale) -> tuple[Any, Any]:
    """[N, H, D] and pages -> the same again, the pages in their place; see `paged_attention.api`."""
    if kv_scale is not None or pages.dtype not in _READ:
        raise NotImplementedError("quantised pages")
    args = varying_alike(*map(_float32, (q, k, v)), pages, page_table, lengths, starts, layer.reshape(1))
    results = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    out, pages = call("glm45_paged_attention", results, *args, aliases={3: 1}, scale=np.float32(scale))
    return out.astype(q.dtype), pages


def _check(matrices, scales, transpose_rhs: bool, rows: jax.Array) -> None:
    if not transpose_rhs or any(s is not None for s in scales) or any(m.dtype not in _READ for m in matrices):
        raise NotImplementedError("matrices of another kind than [out, in] in float32 or bfloat16")
    if rows.dtype not in _READ:
        raise NotImplementedError(f"rows in {rows.dtype}")


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
