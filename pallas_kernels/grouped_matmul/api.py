"""Grouped matmul: rows sorted by group, each group multiplied by its own matrix.

Axes: M rows, K contracted, N output columns, E groups (experts) whose matrices are given, G all groups, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.grouped_matmul import cpu, gpu, reference, tpu
from pallas_kernels.grouped_matmul.quantised import check_scale, frozen, is_quantised
from pallas_kernels.grouped_matmul.tiling import Tiling
from pallas_kernels.mosaic import tree_varying_alike
from pallas_kernels.native import ops as native

_FORWARD = {
    "reference": reference.forward,
    "native": native.grouped_matmul,
    "cpu": cpu.forward,
    "tpu": tpu.forward,
    "gpu": gpu.forward,
}
_RHS_GRADIENT = {
    "reference": reference.rhs_gradient,
    "cpu": cpu.rhs_gradient,
    "tpu": tpu.rhs_gradient,
    "gpu": gpu.rhs_gradient,
}


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is static of a call."""

    transpose_rhs: bool
    dtype: Any
    implementation: Implementation
    chip: str | None
    tiling: Tiling | None


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Num[Array, "*L E K N"],
    group_sizes: Int[Array, " G"],
    *,
    group_offset: Int[Array, ""] | int | None = None,
    transpose_rhs: bool = False,
    rhs_scale: Float[Array, "*L E k n"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    preferred_element_type: Any = None,
    implementation: Implementation = None,
    chip: str | None = None,
    tiling: Tiling | None = None,
) -> Float[Array, "M N"]:
    """Multiplies the first `group_sizes[0]` rows by `rhs[0]`, the next `group_sizes[1]` by `rhs[1]`, and so on.

    Only the routed work is done. Accumulates in float32. Rows past the last group, and with `group_offset` rows of the
    groups whose matrices are not given, come out zero. Differentiable in `lhs` and `rhs`; a group without rows gets a
    zero gradient. Quantised weights are frozen: asking for their gradient is an error.

    Args:
      lhs: rows sorted by group.
      rhs: one matrix per group, [E, K, N], or [E, N, K] with `transpose_rhs`; with `layer`, stacked over layers. int8
        and float8_e4m3fn need `rhs_scale`.
      group_sizes: rows of each group; their sum may be below M.
      group_offset: the first group that `rhs` holds a matrix for: G groups then, of which rhs holds E.
      rhs_scale: of quantised weights, [E, 1, N] per channel or [E, ceil(K/128), ceil(N/128)] per block of 128, whatever
        the layout of `rhs`; with `layer`, stacked over layers.
      layer: which layer's matrices of `rhs` to use; the stack is never sliced outside the op.
      preferred_element_type: of the result; by default that of `lhs`.
      implementation: None (by platform), "reference", "tpu", "gpu", "native" or "cpu", or several in order of
        preference.
      chip: the TPU to tile for, a name of `pallas_kernels.chip.CHIPS`; by default that of the mesh in force.
      tiling: of the TPU's kernel, instead of what its model of VMEM chooses (the backward pass keeps to the model).
    """
    contracted, columns = rhs.shape[-2:][::-1] if transpose_rhs else rhs.shape[-2:]
    if lhs.ndim != 2 or rhs.ndim != 3 + (layer is not None) or lhs.shape[1] != contracted:
        raise ValueError(
            f"grouped_matmul: lhs {lhs.shape} and rhs {rhs.shape} don't fit (transpose_rhs={transpose_rhs}, "
            f"layer {'given' if layer is not None else 'not given'}); expected lhs [M, K] and rhs "
            f"{'[L, ' if layer is not None else '['}{'E, N, K]' if transpose_rhs else 'E, K, N]'}"
        )
    check_scale("grouped_matmul: rhs", rhs, rhs_scale, contracted, columns)
    sizes, first_row = local_groups(group_sizes, group_offset, rhs.shape[-3])
    if rhs_scale is not None:
        rhs, rhs_scale = frozen(rhs), frozen(rhs_scale)
    dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    options = _Options(transpose_rhs, dtype, implementation, chip, tiling)
    if lhs.shape[0] == 0:
        return jnp.zeros((0, columns), dtype)
    args = lhs, rhs, rhs_scale, sizes, first_row, jnp.int32(0 if layer is None else layer)
    return _grouped_matmul(options, *tree_varying_alike(args))


def local_groups(
    group_sizes: Int[Array, " G"], group_offset: Int[Array, ""] | int | None, num_groups: int
) -> tuple[Int[Array, " E"], Int[Array, ""]]:
    """Sizes of the groups whose matrices are given, and the first of their rows."""
    total = group_sizes.shape[0] if group_sizes.ndim == 1 else -1
    if total != num_groups if group_offset is None else total < num_groups:
        raise ValueError(f"group_sizes {group_sizes.shape} for {num_groups} groups (group_offset={group_offset})")
    sizes = group_sizes.astype(jnp.int32)
    if group_offset is None:
        return sizes, jnp.int32(0)
    if not isinstance(group_offset, jax.core.Tracer) and not 0 <= int(group_offset) <= total - num_groups:
        raise ValueError(
            f"group_offset {group_offset}: there are {total} groups, and matrices for {num_groups} of them"
        )
    before = jnp.arange(total) < group_offset
    return jax.lax.dynamic_slice_in_dim(sizes, group_offset, num_groups), jnp.sum(jnp.where(before, sizes, 0))


def _each(implementations: Mapping[str, Callable[..., Any]], implementation: Implementation, *args: Any) -> Any:
    """The op; under `vmap` one example after another: the groups of each are its own, and so is the work."""
    return jax.custom_batching.sequential_vmap(lambda *args: dispatch(implementations, implementation, *args))(*args)


def bind(
    implementations: Mapping[str, Callable[..., Any]], tpu_options: Mapping[str, Any], **static: Any
) -> dict[str, Callable[..., Any]]:
    """The implementations with what is static of a call; `tpu_options` for the TPU's alone."""
    own = {name: dict(tpu_options) if name == "tpu" else {} for name in implementations}
    return {name: functools.partial(function, **static, **own[name]) for name, function in implementations.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(options, lhs, rhs, scale, group_sizes, first_row, layer):
    # made a stack of layers here: the matrices that wait for the backward pass are those given, never a copy
    stack = lambda x: None if x is None else x.reshape(-1, *x.shape[-3:])  # noqa: E731
    tpu_options = {"chip": options.chip, "tiling": options.tiling}
    bound = bind(_FORWARD, tpu_options, transpose_rhs=options.transpose_rhs, dtype=options.dtype)
    return _each(bound, options.implementation, lhs, stack(rhs), stack(scale), group_sizes, first_row, layer)


def _fwd(options, *args):
    return _grouped_matmul(options, *args), args


def _bwd(options, residuals, dout):
    lhs, rhs, scale, group_sizes, first_row, layer = residuals
    backward = dataclasses.replace(options, transpose_rhs=not options.transpose_rhs, dtype=lhs.dtype, tiling=None)
    turned = None if scale is None else jnp.swapaxes(scale, -1, -2)
    dlhs = _grouped_matmul(backward, dout, rhs, turned, group_sizes, first_row, layer)
    no_gradient = lambda x: np.zeros(x.shape, jax.dtypes.float0)  # noqa: E731
    drhs = None
    if not is_quantised(rhs.dtype):
        how = {name: getattr(options, name) for name in ("transpose_rhs", "implementation", "chip")}
        drhs = rhs_gradient(lhs, dout, rhs, group_sizes, first_row, layer, **how)
    return dlhs, drhs, None, no_gradient(group_sizes), no_gradient(first_row), no_gradient(layer)


_grouped_matmul.defvjp(_fwd, _bwd)


def rhs_gradient(
    lhs: Float[Array, "M K"],
    dout: Float[Array, "M N"],
    rhs: Float[Array, "*L E K N"],
    group_sizes: Int[Array, " E"],
    first_row: Int[Array, ""],
    layer: Int[Array, ""],
    *,
    transpose_rhs: bool,
    implementation: Implementation,
    chip: str | None,
) -> Float[Array, "*L E K N"]:
    """The gradient of `rhs`, of its shape and dtype: zero for groups without rows and for other layers."""
    bound = bind(_RHS_GRADIENT, {"chip": chip}, transpose_rhs=transpose_rhs, dtype=rhs.dtype)
    drhs = _each(bound, implementation, lhs, dout, group_sizes, first_row)
    if rhs.ndim == 3:
        return drhs
    return drhs[None] if rhs.shape[0] == 1 else jnp.zeros_like(rhs).at[layer].set(drhs)
