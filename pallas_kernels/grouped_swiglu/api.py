"""The first half of the experts' MLPs: gate and up in one pass over the rows, silu(gate) * up.

Axes: M rows, K model, F expert width, E groups (experts) whose matrices are given, G all groups, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.grouped_matmul import cpu, tpu_rows
from pallas_kernels.grouped_matmul.quantised import check_alike, check_scale, frozen, is_quantised
from pallas_kernels.grouped_matmul.tiling import Tiling
from pallas_kernels.grouped_swiglu import fused, gpu, reference
from pallas_kernels.mosaic import tree_varying_alike
from pallas_kernels.native import ops as native
from pallas_kernels.residuals import keep

_IMPLEMENTATIONS = {
    "reference": reference.with_matmul(reference.reference.forward),
    "native": {"forward": native.grouped_swiglu},
    "cpu": fused.with_frame(cpu.run),
    "tpu": fused.with_frame(tpu_rows.run),
    "gpu": {
        "forward": gpu.forward,
        "product_gradients": gpu.product_gradients,
        "lhs_gradient": gpu.lhs_gradient,
    },
}


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is static of a call."""

    transpose_rhs: bool
    keep_products: bool
    implementation: Implementation
    chip: str | None
    tiling: Tiling | None


def grouped_swiglu(
    lhs: Float[Array, "M K"],
    gate: Num[Array, "*L E K F"],
    up: Num[Array, "*L E K F"],
    group_sizes: Int[Array, " G"],
    *,
    group_offset: Int[Array, ""] | int | None = None,
    transpose_rhs: bool = False,
    gate_scale: Float[Array, "*L E k f"] | None = None,
    up_scale: Float[Array, "*L E k f"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    keep_products: bool = False,
    implementation: Implementation = None,
    chip: str | None = None,
    tiling: Tiling | None = None,
) -> Float[Array, "M F"]:
    """silu(lhs @ gate[e]) * (lhs @ up[e]) for each group e of rows; groups, options and zeros as in `grouped_matmul`.

    Products and activation are float32, the result has the dtype of `lhs`. The products are never written; the backward
    pass computes them anew. Differentiable in `lhs`, `gate` and `up`.

    Args:
      lhs: rows sorted by group.
      gate, up: one matrix per group, [E, K, F], or [E, F, K] with `transpose_rhs`; with `layer`, stacked over layers.
      group_sizes, group_offset, layer, implementation, chip, tiling: as in `grouped_matmul`.
      gate_scale, up_scale: of quantised weights, as `rhs_scale` in `grouped_matmul`.
      keep_products: when differentiated, keep both products for the backward pass, in the dtype of `lhs` and by the
        name `residuals.RESIDUAL`: a quarter less work in this op, 2 M F to store.
    """
    contracted, columns = gate.shape[-2:][::-1] if transpose_rhs else gate.shape[-2:]
    if lhs.ndim != 2 or gate.ndim != 3 + (layer is not None) or up.shape != gate.shape or lhs.shape[1] != contracted:
        raise ValueError(
            f"grouped_swiglu: lhs {lhs.shape}, gate {gate.shape} and up {up.shape} don't fit (transpose_rhs="
            f"{transpose_rhs}, layer {'given' if layer is not None else 'not given'}); expected lhs [M, K], gate "
            f"and up {'[L, ' if layer is not None else '['}{'E, F, K]' if transpose_rhs else 'E, K, F]'}"
        )
    weights, scales = (gate, up), (gate_scale, up_scale)
    for name, weight, scale in zip(("gate", "up"), weights, scales):
        check_scale(f"grouped_swiglu: {name}", weight, scale, contracted, columns)
    check_alike("grouped_swiglu: gate and up", weights)
    sizes, first_row = grouped_matmul.local_groups(group_sizes, group_offset, gate.shape[-3])
    if is_quantised(gate.dtype):
        weights, scales = jax.tree.map(frozen, (weights, scales))
    options = _Options(transpose_rhs, keep_products, implementation, chip, tiling)
    if lhs.shape[0] == 0:
        return jnp.zeros((0, columns), lhs.dtype)
    args = lhs, weights, scales, (sizes, first_row, jnp.int32(0 if layer is None else layer))
    return _grouped_swiglu(options, *tree_varying_alike(args))


def _run(function: str, options: _Options, *args: Any, **static: Any) -> Any:
    """One of an implementation's functions; under `vmap` one example after another, as each has its own groups."""
    functions = {name: functions[function] for name, functions in _IMPLEMENTATIONS.items() if function in functions}
    tpu_options = {"chip": options.chip, "tiling": options.tiling if function == "forward" else None}
    bound = grouped_matmul.bind(functions, tpu_options, transpose_rhs=options.transpose_rhs, **static)
    run = jax.custom_batching.sequential_vmap(lambda *args: dispatch(bound, options.implementation, *args))
    return run(*args)


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[-3:]), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_swiglu(options, lhs, weights, scales, groups):
    return _run("forward", options, lhs, *_stacked((weights, scales)), groups, keep_products=False)[0]


def _fwd(options, lhs, weights, scales, groups):
    stacks = _stacked((weights, scales))
    if not options.keep_products:
        return _grouped_swiglu(options, lhs, weights, scales, groups), (lhs, weights, scales, groups, ())
    *_, gate, up = _run("forward", options, lhs, *stacks, groups, keep_products=True)
    kept = keep(gate), keep(up)
    # from what is kept, so that whoever computes the result anew needs no product for it
    return reference.swiglu(*kept).astype(lhs.dtype), (lhs, weights, scales, groups, kept)


def _bwd(options, residuals, dout):
    lhs, weights, scales, groups, kept = residuals
    stacks = _stacked((weights, scales))
    if kept:
        gradients = tuple(x.astype(lhs.dtype) for x in reference.swiglu_gradients(*kept, dout))
    else:
        gradients = _run("product_gradients", options, lhs, *stacks, groups, dout)
    dlhs = _run("lhs_gradient", options, gradients, *stacks, groups, dtype=lhs.dtype)
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), groups)
    if is_quantised(weights[0].dtype):
        return dlhs, None, None, no_gradient
    how = {name: getattr(options, name) for name in ("transpose_rhs", "implementation", "chip")}
    dweights = tuple(grouped_matmul.rhs_gradient(lhs, g, w, *groups, **how) for g, w in zip(gradients, weights))
    return dlhs, dweights, None, no_gradient


_grouped_swiglu.defvjp(_fwd, _bwd)
