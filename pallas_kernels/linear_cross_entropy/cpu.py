"""linear_cross_entropy in chunks that fit the memory of any machine: portable XLA, made for the CPU.

Axes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_cross_entropy import chunked
from pallas_kernels.linear_cross_entropy.problem import Problem, logits_gradient
from pallas_kernels.mosaic import varying_alike

_MOST_LOGITS = 1 << 24  # float32 logits alive at once: 64 MiB

forward = functools.partial(chunked.forward, most_logits=_MOST_LOGITS)
backward = functools.partial(chunked.backward, most_logits=_MOST_LOGITS)


def loss_and_gradients(
    hidden: Float[Array, "T D"], head, targets: Int[Array, " T"], weights: Float[Array, " T"], *, problem: Problem
):
    """The weighted sum of the losses and its gradients of hidden and head, by chunks of tokens.

    The weights are known, so a chunk's gradient follows from its logits at once: three products instead of four.
    """
    cut = jax.lax.slice_in_dim(head, 0, problem.vocabulary, axis=problem.vocabulary_axis)

    def chunk(carry, inputs):
        total, dhead = carry
        h, target, weight = inputs
        logits = problem.logits(h, cut)
        lse = jax.nn.logsumexp(logits, axis=1, keepdims=True)
        is_target = jnp.arange(problem.vocabulary) == target[:, None]
        total += jnp.sum(weight * (lse[:, 0] - jnp.sum(jnp.where(is_target, logits, 0), axis=1)))
        scaled = problem.scale * weight[:, None]
        dlogits = logits_gradient(logits, lse, is_target, (scaled, -scaled)).astype(h.dtype)
        dh = problem.hidden_gradient(dlogits, cut).astype(h.dtype)
        return (total, dhead + problem.head_gradient(dlogits, h)), dh

    start = tuple(varying_alike(jnp.zeros(shape, jnp.float32), hidden)[0] for shape in ((), cut.shape))
    chunks = _token_chunks(hidden, targets, weights, problem.vocabulary)
    (total, dhead), dhidden = jax.lax.scan(chunk, start, chunks)
    absent = [(0, full - kept) for full, kept in zip(head.shape, cut.shape)]
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, dhidden, jnp.pad(dhead, absent).astype(head.dtype)


def _token_chunks(hidden, targets, weights, vocabulary):
    """The tokens in equal chunks, padded with tokens of weight zero."""
    count = max(1, math.ceil(hidden.shape[0] * vocabulary / _MOST_LOGITS))
    size = math.ceil(hidden.shape[0] / count)
    pad = count * size - hidden.shape[0]
    split = lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(count, size, *x.shape[1:])  # noqa: E731
    return split(hidden), split(targets), split(weights)
