"""The vocabulary in chunks, each by dense products of all tokens: portable XLA.

A chunk of the head's gradient is finished by one product over all tokens, so that nothing as large as the head is
accumulated; only hidden's gradient is, in float32. Given lse the backward pass takes three products of T x D x V.

Axes: T tokens, D model, V vocabulary, C columns of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy.problem import Problem, logits_gradient
from pallas_kernels.mosaic import varying_alike

_LANES = 128
_NOTHING = 0.5 * float(jnp.finfo(jnp.float32).min)  # finite: its exponential times itself is zero


def chunk_columns(tokens: int, vocabulary: int, most_logits: int) -> int:
    """Columns of a chunk of at most `most_logits` logits: whole lanes, and all chunks alike where there is a way."""
    count = math.ceil(vocabulary / max(_LANES, most_logits // max(tokens, 1)))
    for more in range(count, 2 * count):
        if vocabulary % (more * _LANES) == 0:
            return vocabulary // more
    return min(vocabulary, math.ceil(vocabulary / count / _LANES) * _LANES)


def forward(hidden, head, targets, *, problem: Problem, most_logits: int):
    """lse [T], the target's logit [T] and, when it is wanted, the entropy [T]."""
    tokens = hidden.shape[0]

    def chunk(so_far, start, size):
        logits, is_target = _logits(hidden, _columns(head, start, size, problem), targets, start, problem)
        lse = jax.nn.logsumexp(logits, axis=1)
        whole = jnp.logaddexp(so_far[0], lse)
        out = whole, so_far[1] + jnp.sum(jnp.where(is_target, logits, 0), axis=1)
        if not problem.with_entropy:
            return out
        log_p = logits - whole[:, None]
        before = so_far[0] - whole
        entropy = jnp.exp(before) * (so_far[2] - before) - jnp.sum(jnp.exp(log_p) * log_p, axis=1)
        return *out, entropy

    start = tuple(jnp.full(tokens, x, jnp.float32) for x in (_NOTHING, 0, 0)[: 2 + problem.with_entropy])
    start = tuple(varying_alike(x, hidden)[0] for x in start)
    return _over_chunks(chunk, start, problem.vocabulary, chunk_columns(tokens, problem.vocabulary, most_logits))


def backward(hidden, head, targets, lse, coefficients, *, problem: Problem, most_logits: int):
    """The gradients of hidden and head."""
    lse, *coefficients = (x[:, None] for x in (lse, *coefficients))
    coefficients = tuple(problem.scale * x for x in coefficients)

    def chunk(gradients, start, size):
        dhidden, dhead = gradients
        piece = _columns(head, start, size, problem)
        logits, is_target = _logits(hidden, piece, targets, start, problem)
        dlogits = logits_gradient(logits, lse, is_target, coefficients).astype(hidden.dtype)
        dhidden += problem.hidden_gradient(dlogits, piece)
        dpiece = problem.head_gradient(dlogits, hidden).astype(head.dtype)
        return dhidden, jax.lax.dynamic_update_slice_in_dim(dhead, dpiece, start, problem.vocabulary_axis)

    zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, head.dtype)
    zeros = tuple(varying_alike(x, hidden)[0] for x in zeros)
    columns = chunk_columns(hidden.shape[0], problem.vocabulary, most_logits)
    dhidden, dhead = _over_chunks(chunk, zeros, problem.vocabulary, columns)
    return dhidden.astype(hidden.dtype), dhead


def _columns(head, start, size, problem):
    return jax.lax.dynamic_slice_in_dim(head, start, size, axis=problem.vocabulary_axis)


def _logits(hidden, piece, targets, start, problem):
    logits = problem.logits(hidden, piece)
    return logits, jnp.arange(logits.shape[1]) == (targets - start)[:, None]


def _over_chunks(chunk: Callable[..., Any], carry: Any, length: int, size: int) -> Any:
    """`carry = chunk(carry, start, size)` over all of `length`, the last chunk as long as what remains."""
    count, rest = divmod(length, size)
    carry = jax.lax.fori_loop(0, count, lambda i, carry: chunk(carry, i * size, size), carry)
    return chunk(carry, length - rest, rest) if rest else carry
