"""The routed experts of a few tokens in one op: gate, up, SwiGLU, down and the weighted sum. For decoding.

Axes: T tokens, D model, F expert width, E experts whose matrices are given, k experts per token, L layers.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.fused_moe import cpu, gpu, reference, tpu
from pallas_kernels.fused_moe.tiling import Tiling
from pallas_kernels.grouped_matmul.api import bind
from pallas_kernels.grouped_matmul.quantised import check_alike, check_scale, frozen, is_quantised
from pallas_kernels.mosaic import tree_varying_alike
from pallas_kernels.native import ops as native

_IMPLEMENTATIONS = {
    "reference": reference.forward,
    "native": native.fused_moe,
    "cpu": cpu.forward,
    "tpu": tpu.forward,
    "gpu": gpu.forward,
}


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is static of a call."""

    transpose_rhs: bool
    implementation: Implementation
    chip: str | None
    tiling: Tiling | None


def fused_moe(
    x: Float[Array, "T D"],
    gate: Num[Array, "*L E D F"],
    up: Num[Array, "*L E D F"],
    down: Num[Array, "*L E F D"],
    top_k_indices: Int[Array, "T k"],
    top_k_weights: Float[Array, "T k"],
    *,
    gate_scale: Float[Array, "*L E d f"] | None = None,
    up_scale: Float[Array, "*L E d f"] | None = None,
    down_scale: Float[Array, "*L E f d"] | None = None,
    expert_offset: Int[Array, ""] | int | None = None,
    layer: Int[Array, ""] | int | None = None,
    transpose_rhs: bool = False,
    implementation: Implementation = None,
    chip: str | None = None,
    tiling: Tiling | None = None,
) -> Float[Array, "T D"]:
    """sum_i weight_i * down_i(silu(gate_i x) * up_i x) over each token's experts.

    Reads the weights of the experts chosen, once, and of no other. Differentiable in x, the matrices and the weights,
    by way of the grouped matmuls, but made for decoding: training sorts its many tokens once, for all three matrices.

    Args:
      gate, up, down: as [E, in, out], or the checkpoint's [E, out, in] with `transpose_rhs`; with `layer`, stacked
        over layers and never sliced outside the op. int8 and float8_e4m3fn need scales.
      top_k_indices: the experts of each token, each at most once per token.
      gate_scale, up_scale, down_scale: of quantised weights, as `rhs_scale` in `grouped_matmul`.
      expert_offset: the first expert whose matrices are given; experts outside contribute zero.
      implementation: None (by platform), "reference", "tpu", "gpu", "native" or "cpu", or several in order of
        preference.
      chip: the TPU to tile for, a name of `pallas_kernels.chip.CHIPS`; by default that of the mesh in force.
      tiling: of the TPU's kernel, instead of what its model of VMEM chooses.
    """
    model, width = gate.shape[-2:][::-1] if transpose_rhs else gate.shape[-2:]
    turned = (*gate.shape[:-2], gate.shape[-1], gate.shape[-2])
    if gate.ndim != 3 + (layer is not None) or up.shape != gate.shape or down.shape != turned or x.shape[-1] != model:
        raise ValueError(f"fused_moe: x {x.shape}, gate {gate.shape}, up {up.shape} and down {down.shape} don't fit")
    if top_k_indices.shape != top_k_weights.shape or top_k_indices.shape[0] != x.shape[0]:
        raise ValueError(f"fused_moe: {x.shape} tokens, indices {top_k_indices.shape}, weights {top_k_weights.shape}")
    matrices, scales = (gate, up, down), (gate_scale, up_scale, down_scale)
    sizes = {"gate": (model, width), "up": (model, width), "down": (width, model)}
    for (name, size), matrix, scale in zip(sizes.items(), matrices, scales):
        check_scale(f"fused_moe: {name}", matrix, scale, *size)
    check_alike("fused_moe: gate, up and down", matrices)
    if is_quantised(gate.dtype):
        matrices, scales = jax.tree.map(frozen, (matrices, scales))
    offset = None if expert_offset is None else jnp.int32(expert_offset)
    places = top_k_indices.astype(jnp.int32), offset, jnp.int32(0 if layer is None else layer)
    weights = top_k_weights.astype(jnp.float32)
    if x.shape[0] == 0:
        return x
    args = tree_varying_alike((x, matrices, scales, weights, places))
    return _fused_moe(_Options(transpose_rhs, implementation, chip, tiling), *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_moe(options, x, matrices, scales, weights, places):
    indices, offset, layer = places
    stack = lambda a: a.reshape(-1, *a.shape[-3:])  # noqa: E731
    tpu_options = {"chip": options.chip, "tiling": options.tiling}
    bound = bind(_IMPLEMENTATIONS, tpu_options, transpose_rhs=options.transpose_rhs)
    # the reference cuts a whole layer out of the stack; the loop over chosen experts does not, on any platform
    run = lambda *args: dispatch(bound, options.implementation, *args, default="cpu")  # noqa: E731
    args = (x, *jax.tree.map(stack, (matrices, scales)), indices, weights, offset, layer)
    return jax.custom_batching.sequential_vmap(run)(*args)


def _fwd(options, *args):
    return _fused_moe(options, *args), args


def _bwd(options, residuals, dout):
    x, matrices, scales, weights, places = residuals
    indices, offset, layer = places

    def sorted_form(x, matrices, weights):
        stack = lambda a: a.reshape(-1, *a.shape[-3:])  # noqa: E731
        args = (x, *jax.tree.map(stack, (matrices, scales)), indices, weights, offset, layer)
        how = {name: getattr(options, name) for name in ("transpose_rhs", "implementation", "chip")}
        return reference.forward(*args, **how)

    no_gradient = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), places)
    if is_quantised(matrices[0].dtype):
        _, pull = jax.vjp(lambda x, weights: sorted_form(x, matrices, weights), x, weights)
        dx, dweights = pull(dout)
        return dx, None, None, dweights, no_gradient
    _, pull = jax.vjp(sorted_form, x, matrices, weights)
    dx, dmatrices, dweights = pull(dout)
    return dx, dmatrices, None, dweights, no_gradient


_fused_moe.defvjp(_fwd, _bwd)
