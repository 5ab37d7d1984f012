"""Grouped matmul: rows sorted by group, each group multiplied by its own matrix.

Axes: M rows, K contracted, N output columns, E groups (experts), L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.grouped_matmul import cpu, reference

_FORWARD = {"reference": reference.forward, "cpu": cpu.forward}
_RHS_GRADIENT = {"reference": reference.rhs_gradient, "cpu": cpu.rhs_gradient}


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "*L E K N"],
    group_sizes: Int[Array, " E"],
    *,
    transpose_rhs: bool = False,
    layer: Int[Array, ""] | int | None = None,
    preferred_element_type: Any = None,
    implementation: Implementation = None,
) -> Float[Array, "M N"]:
    """Multiplies the first `group_sizes[0]` rows by `rhs[0]`, the next `group_sizes[1]` by `rhs[1]`, and so on.

    Only the routed work is done. Accumulates in float32. Rows past the last group come out zero. Differentiable in
    `lhs` and `rhs`; a group without rows gets a zero gradient.

    Args:
      lhs: rows sorted by group.
      rhs: one matrix per group, [E, K, N], or [E, N, K] with `transpose_rhs`; with `layer`, stacked over layers.
      group_sizes: rows of each group; their sum may be below M.
      layer: which layer's matrices of `rhs` to use; the stack is never sliced outside the op.
      preferred_element_type: of the result; by default that of `lhs`.
      implementation: None (by platform), "reference" or "cpu", or several in order of preference.
    """
    contracted = rhs.shape[-1 if transpose_rhs else -2]
    if lhs.ndim != 2 or rhs.ndim != 3 + (layer is not None) or lhs.shape[1] != contracted:
        raise ValueError(
            f"grouped_matmul: lhs {lhs.shape} and rhs {rhs.shape} don't fit (transpose_rhs={transpose_rhs}, "
            f"layer {'given' if layer is not None else 'not given'}); expected lhs [M, K] and rhs "
            f"{'[L, ' if layer is not None else '['}{'E, N, K]' if transpose_rhs else 'E, K, N]'}"
        )
    if group_sizes.shape != rhs.shape[-3:-2]:
        raise ValueError(f"grouped_matmul: group_sizes {group_sizes.shape} for {rhs.shape[-3]} groups")
    dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    layer = jnp.int32(0 if layer is None else layer)
    return _grouped_matmul(lhs, rhs, group_sizes, layer, transpose_rhs, dtype, implementation)


def _each(implementations: Mapping[str, Callable[..., Any]], implementation: Implementation) -> Callable[..., Any]:
    """The op, one example after another under `vmap`: the groups of each are its own, and so is the work."""
    return jax.custom_batching.sequential_vmap(lambda *args: dispatch(implementations, implementation, *args))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _grouped_matmul(lhs, rhs, group_sizes, layer, transpose_rhs, dtype, implementation):
    forward = {k: functools.partial(f, transpose_rhs=transpose_rhs, dtype=dtype) for k, f in _FORWARD.items()}
    # made a stack of layers here: the matrices that wait for the backward pass are those given, never a copy
    return _each(forward, implementation)(lhs, rhs.reshape(-1, *rhs.shape[-3:]), group_sizes, layer)


def _fwd(lhs, rhs, group_sizes, layer, transpose_rhs, dtype, implementation):
    out = _grouped_matmul(lhs, rhs, group_sizes, layer, transpose_rhs, dtype, implementation)
    return out, (lhs, rhs, group_sizes, layer)


def _bwd(transpose_rhs, dtype, implementation, residuals, dout):
    lhs, rhs, group_sizes, layer = residuals
    dlhs = _grouped_matmul(dout, rhs, group_sizes, layer, not transpose_rhs, lhs.dtype, implementation)
    gradient = {k: functools.partial(f, transpose_rhs=transpose_rhs, dtype=rhs.dtype) for k, f in _RHS_GRADIENT.items()}
    drhs = _each(gradient, implementation)(lhs, dout, group_sizes)
    if rhs.ndim == 4:
        drhs = drhs[None] if rhs.shape[0] == 1 else jnp.zeros_like(rhs).at[layer].set(drhs)
    no_gradient = lambda x: np.zeros(x.shape, jax.dtypes.float0)  # noqa: E731
    return dlhs, drhs, no_gradient(group_sizes), no_gradient(layer)


_grouped_matmul.defvjp(_fwd, _bwd)
