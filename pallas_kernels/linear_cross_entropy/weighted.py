"""A weighted sum of the losses of all tokens, as training takes it: its gradient is known in the forward pass.

The backward pass only scales it. Where an implementation can, logits are computed once (three products of T x D x V
for loss and gradients); the TPU's computes them twice, which costs less than keeping a chunk's in memory.

Axes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation
from pallas_kernels.linear_cross_entropy import cpu, gpu, reference, tpu
from pallas_kernels.linear_cross_entropy.problem import Problem
from pallas_kernels.linear_cross_entropy.statistics import dispatched, statistics


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_sum(
    hidden: Float[Array, "T D"],
    head: Float[Array, ...],
    targets: Int[Array, " T"],
    weights: Float[Array, " T"],
    problem: Problem,
    implementation: Implementation,
) -> Float[Array, ""]:
    """sum(weights * loss); a target that is no column of the vocabulary must have weight zero."""
    lse, target, _ = statistics(hidden, head, targets, problem, implementation)
    return jnp.sum(weights * (lse - target))


def _fwd(hidden, head, targets, weights, problem, implementation):
    implementations = {
        "reference": functools.partial(_both_passes, reference),
        "cpu": cpu.loss_and_gradients,
        "tpu": functools.partial(_both_passes, tpu),
        "gpu": functools.partial(_both_passes, gpu),
    }
    total, *gradients = dispatched(implementations, implementation, problem)(hidden, head, targets, weights)
    return total, (*gradients, targets, weights)


def _bwd(problem, implementation, residuals, cotangent):
    dhidden, dhead, targets, weights = residuals
    scale = lambda x: (x.astype(jnp.float32) * cotangent).astype(x.dtype)  # noqa: E731
    return scale(dhidden), scale(dhead), np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(weights)


weighted_sum.defvjp(_fwd, _bwd)


def _both_passes(implementation: ModuleType, hidden, head, targets, weights, *, problem: Problem):
    lse, target = implementation.forward(hidden, head, targets, problem=problem)
    gradients = implementation.backward(hidden, head, targets, lse, (weights, -weights), problem=problem)
    return jnp.sum(weights * (lse - target)), *gradients
