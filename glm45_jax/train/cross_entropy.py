"""Cross-entropy of a large vocabulary without its logits in memory.

The loss is a weighted sum, so its gradient is known as soon as a chunk's logits are: the forward pass computes it chunk
by chunk and the backward pass only scales it. No logits are kept and none are computed twice.

Axes: N tokens, D model, V vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_CHUNK_LOGITS = 1 << 24  # float32 logits alive at once: 64 MiB


@jax.custom_vjp
def weighted_cross_entropy(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], targets: Int[Array, " N"], weights: Float[Array, " N"]
) -> Float[Array, ""]:
    """sum_n weights[n] * -log softmax(head @ hidden[n])[targets[n]], in float32.

    Differentiable in `hidden` and `head`; `weights` are constants (their gradient is zero).
    """

    def chunk(total, inputs):
        h, target, weight = inputs
        logits = _logits(h, head)
        picked = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return total + jnp.sum(weight * (jax.nn.logsumexp(logits, axis=1) - picked)), None

    return jax.lax.scan(chunk, jnp.float32(0), _chunks(hidden, targets, weights, head.shape[0]))[0]


def _fwd(hidden, head, targets, weights):
    def chunk(carry, inputs):
        total, dhead = carry
        h, target, weight = inputs
        logits = _logits(h, head)
        lse = jax.nn.logsumexp(logits, axis=1, keepdims=True)
        is_target = jnp.arange(head.shape[0]) == target[:, None]
        total += jnp.sum(weight * (lse[:, 0] - jnp.sum(jnp.where(is_target, logits, 0), axis=1)))
        dlogits = ((jnp.exp(logits - lse) - is_target) * weight[:, None]).astype(h.dtype)
        dh = jax.lax.dot_general(dlogits, head.astype(h.dtype), (((1,), (0,)), ((), ())))
        dhead += jax.lax.dot_general(dlogits, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (total, dhead), dh

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, dhead), dhidden = jax.lax.scan(chunk, start, _chunks(hidden, targets, weights, head.shape[0]))
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return total, (dhidden, dhead.astype(head.dtype), targets, weights)


def _bwd(residuals, g):
    dhidden, dhead, targets, weights = residuals
    scale = lambda x: (x.astype(jnp.float32) * g).astype(x.dtype)  # noqa: E731
    return scale(dhidden), scale(dhead), np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(weights)


weighted_cross_entropy.defvjp(_fwd, _bwd)


def _logits(h: Float[Array, "C D"], head: Float[Array, "V D"]) -> Float[Array, "C V"]:
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(h, head.astype(h.dtype), contract, preferred_element_type=jnp.float32)


def _chunks(hidden, targets, weights, vocab):
    """The tokens in equal chunks, padded with tokens of weight zero."""
    count = max(1, math.ceil(hidden.shape[0] * vocab / _CHUNK_LOGITS))
    size = math.ceil(hidden.shape[0] / count)
    pad = count * size - hidden.shape[0]
    split = lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(count, size, *x.shape[1:])  # noqa: E731
    return split(hidden), split(targets), split(weights)
