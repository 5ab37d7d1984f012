"""The routed experts of a few tokens in one op: gate, up, SwiGLU, down and the weighted sum. For decoding.

Axes: T tokens, D model, F expert width, E experts, k experts per token, L layers.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.fused_moe import cpu, reference

_IMPLEMENTATIONS = {"reference": reference.forward, "cpu": cpu.forward}


def fused_moe(
    x: Float[Array, "T D"],
    gate: Float[Array, "*L E D F"],
    up: Float[Array, "*L E D F"],
    down: Float[Array, "*L E F D"],
    top_k_indices: Int[Array, "T k"],
    top_k_weights: Float[Array, "T k"],
    *,
    layer: Int[Array, ""] | int | None = None,
    transpose_rhs: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "T D"]:
    """sum_i weight_i * down_i(silu(gate_i x) * up_i x) over each token's experts.

    Reads the weights of the experts chosen and of no other. Not differentiable: training uses `grouped_matmul`.

    Args:
      gate, up, down: as [E, in, out], or the checkpoint's [E, out, in] with `transpose_rhs`; with `layer`, stacked
        over layers and never sliced outside the op.
      top_k_indices: the experts of each token, each at most once per token.
      implementation: None (by platform), "reference" or "cpu", or several in order of preference.
    """
    if layer is None:
        gate, up, down, layer = gate[None], up[None], down[None], 0
    if gate.ndim != 4 or gate.shape != up.shape or down.shape != (*gate.shape[:2], gate.shape[3], gate.shape[2]):
        raise ValueError(f"fused_moe: gate {gate.shape}, up {up.shape} and down {down.shape} don't fit")
    if top_k_indices.shape != top_k_weights.shape or top_k_indices.shape[0] != x.shape[0]:
        raise ValueError(f"fused_moe: {x.shape} tokens, indices {top_k_indices.shape}, weights {top_k_weights.shape}")
    implementations = {k: functools.partial(f, transpose_rhs=transpose_rhs) for k, f in _IMPLEMENTATIONS.items()}
    args = (x, gate, up, down, top_k_indices, top_k_weights, jnp.int32(layer))
    # the reference cuts a whole layer out of the stack; the loop over chosen experts does not, on any platform
    return dispatch(implementations, implementation, *args, default="cpu")
