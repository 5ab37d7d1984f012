"""The routed experts of a few tokens on TPU, in one kernel bound by the speed of memory.

The grid runs over the experts that some token chose, and for each over blocks of gate and up, then of down. Every step
works on one block while the next one is on its way, over the border between experts too; no other expert's weights
move. Tokens and sums stay in VMEM. An expert's tokens are gathered by a product with ones, and its answers weighted and
added by another. On chips with two cores, each takes every other expert and the two sums are added at the end.

Axes: T tokens, D model, F expert width, E experts, A experts that can be active, L layers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.chip import Chip, tpu_to_tile_for
from pallas_kernels.fused_moe import reference
from pallas_kernels.fused_moe.tiling import Shape, Tiling, tile
from pallas_kernels.fused_moe.tpu_kernel import Frame, kernel, specs
from pallas_kernels.grouped_matmul import tpu_scale
from pallas_kernels.mosaic import kernel_output, tpu_params, varying_alike


class Active(NamedTuple):
    """The experts that some token chose, in order; only the first `count` entries are such."""

    expert: Int[Array, " A"]
    tokens: Int[Array, " A"]  # how many chose it
    count: Int[Array, " 1"]
    rank: Int[Array, "A 1 T"]  # the place of each token among them, -1 for those that did not choose it
    weight: Float[Array, "A 1 T"]


def forward(x, matrices, scales, indices, weights, offset, layer, *, transpose_rhs, chip=None, tiling=None):
    """[T, D] -> [T, D]; see `api.fused_moe`. Many tokens go by way of the grouped matmuls."""
    chip = tpu_to_tile_for(chip)
    width = matrices[0].shape[2 if transpose_rhs else 3]
    shape = Shape(*x.shape, width, (x.dtype, matrices[0].dtype))
    try:
        tiling = tiling or tile(shape, chip)
    except NotImplementedError:
        how = {"transpose_rhs": transpose_rhs, "implementation": "tpu", "chip": chip.name}
        return reference.forward(x, matrices, scales, indices, weights, offset, layer, **how)
    num_experts = matrices[0].shape[1]
    local = reference.local_experts(indices, offset, num_experts)
    active = find_active(local, weights, num_experts, shape.padded)
    # tokens are gathered by products, in which one that is not finite would spoil all others
    spoilt = ~jnp.isfinite(x).all(axis=1, keepdims=True)
    padded = jnp.pad(jnp.where(spoilt, 0, x), ((0, shape.padded - x.shape[0]), (0, 0)))
    sums = _run(padded, matrices, scales, active, layer, transpose_rhs, shape, chip, tiling)
    out = sums.sum(0)[: x.shape[0]].astype(x.dtype)
    return jnp.where(spoilt & (local < num_experts).any(axis=1, keepdims=True), jnp.nan, out)


def find_active(local: Int[Array, "T k"], weights: Float[Array, "T k"], num_experts: int, padded: int) -> Active:
    """Which experts are to be visited, and with which tokens; `padded` tokens, of which those past T choose none.

    local: the experts of each token, `num_experts` for those of other shards.
    """
    chosen = jax.nn.one_hot(local, num_experts, dtype=jnp.float32)  # those of other shards are zeros
    spread = lambda by_token: jnp.pad(by_token.T, ((0, 0), (0, padded - local.shape[0])))  # noqa: E731
    member, weight = spread(chosen.sum(1)) > 0, spread(jnp.einsum("tke,tk->te", chosen, weights))
    rank = jnp.where(member, jnp.cumsum(member, axis=1) - 1, -1).astype(jnp.int32)
    tokens = member.sum(1).astype(jnp.int32)
    order = jnp.argsort(tokens == 0, stable=True)[: min(num_experts, local.size)].astype(jnp.int32)
    count = (tokens > 0).sum().astype(jnp.int32)[None]
    return Active(order, tokens[order], count, rank[order][:, None], weight[order][:, None])


def _run(
    x: Array,
    matrices,
    scales,
    active: Active,
    layer: Array,
    transpose_rhs: bool,
    shape: Shape,
    chip: Chip,
    tiling: Tiling,
) -> Float[Array, "C T D"]:
    """Each core's sum over its experts."""
    kinds, scales = tpu_scale.lay_out(scales, matrices, transpose_rhs=transpose_rhs)
    frame = Frame(tiling, shape, chip.cores, tuple(kinds), transpose_rhs)
    scalars = (active.expert, active.tokens, active.count, layer[None])
    arrays = (x, active.rank, active.weight, *matrices, *(s for s in scales if s is not None))
    inputs = varying_alike(*scalars, *arrays)
    visits = jnp.maximum(1, (inputs[2][0] + chip.cores - 1) // chip.cores)
    in_specs, out_spec, scratch = specs(frame, [s for s in scales if s is not None])
    return pl.pallas_call(
        functools.partial(kernel, frame),
        out_shape=kernel_output((chip.cores, *x.shape), jnp.float32, inputs[0]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(chip.cores, visits, frame.width_steps + frame.model_steps),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=scratch,
        ),
        compiler_params=tpu_params(chip, "parallel", "arbitrary", "arbitrary"),
        name="fused_moe",
    )(*inputs)
