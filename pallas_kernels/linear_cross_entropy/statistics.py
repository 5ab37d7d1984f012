"""Three numbers of each token's logits from which loss and entropy follow, differentiable, whatever computes them.

With z the logits over the temperature and p their softmax:

    lse = logsumexp(z)    target = z[target]    entropy = -sum(p * log p)    loss = lse - target

The gradient of z for any cotangents (l, t, e) of the three is p * (l - e * (entropy + log p)), and t more at the
target, so that an implementation needs to know three coefficients per token and nothing of losses.

Axes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.linear_cross_entropy import cpu, gpu, reference, tpu
from pallas_kernels.linear_cross_entropy.problem import Problem

_FORWARD = {"reference": reference.forward, "cpu": cpu.forward, "tpu": tpu.forward, "gpu": gpu.forward}
_BACKWARD = {"reference": reference.backward, "cpu": cpu.backward, "tpu": tpu.backward, "gpu": gpu.backward}


class Statistics(NamedTuple):
    """Of each token's scaled logits over a vocabulary or a part of one, float32.

    Attributes:
      lse: log of the sum of exponentials.
      target: the target's logit; zero where the target lies elsewhere.
      entropy: of the softmax over the part; None where it was not asked for.
    """

    lse: Float[Array, " T"]
    target: Float[Array, " T"]
    entropy: Float[Array, " T"] | None = None


def dispatched(implementations: Mapping[str, Callable[..., Any]], implementation: Implementation, problem: Problem):
    """The implementation as a function of arrays, one example after another under `vmap`: memory is what it saves.

    Platforms without an implementation of their own take the portable one, which is made for the CPU.
    """
    bound = {name: functools.partial(f, problem=problem) for name, f in implementations.items()}
    call = lambda *args: dispatch(bound, implementation, *args, default="cpu")  # noqa: E731
    return jax.custom_batching.sequential_vmap(call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def statistics(
    hidden: Float[Array, "T D"],
    head: Float[Array, ...],
    targets: Int[Array, " T"],
    problem: Problem,
    implementation: Implementation,
) -> Statistics:
    """A target that is no column of the vocabulary must be negative."""
    return Statistics(*dispatched(_FORWARD, implementation, problem)(hidden, head, targets))


def _fwd(hidden, head, targets, problem, implementation):
    out = statistics(hidden, head, targets, problem, implementation)
    return out, (hidden, head, targets, out)


def _bwd(problem, implementation, residuals, cotangents):
    hidden, head, targets, out = residuals
    of_lse, of_target, of_entropy = cotangents
    coefficients = (of_lse, of_target)
    if out.entropy is not None:
        coefficients = (of_lse - of_entropy * out.entropy, of_target, -of_entropy)
    gradient = dispatched(_BACKWARD, implementation, problem)
    dhidden, dhead = gradient(hidden, head, targets, out.lse, coefficients)
    return dhidden, dhead, np.zeros(targets.shape, jax.dtypes.float0)


statistics.defvjp(_fwd, _bwd)


def over_shards(part: Statistics, axis: Hashable) -> Statistics:
    """Of the whole vocabulary, from those of each shard's part of it, inside `shard_map` over the mesh axis `axis`."""
    largest = jax.lax.pmax(jax.lax.stop_gradient(part.lse), axis)
    lse = largest + jnp.log(jax.lax.psum(jnp.exp(part.lse - largest), axis))
    target, entropy = jax.lax.psum(part.target, axis), None
    if part.entropy is not None:  # that of the parts, and of the choice among them
        entropy = jax.lax.psum(jnp.exp(part.lse - lse) * (part.entropy + lse - part.lse), axis)
    return Statistics(lse, target, entropy)
