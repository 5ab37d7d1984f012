"""All logits in memory, in float32: plain XLA, the truth for every other implementation.

Axes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_cross_entropy.problem import Problem, logits_gradient


def forward(hidden: Float[Array, "T D"], head, targets: Int[Array, " T"], *, problem: Problem):
    """lse [T], the target's logit [T] and, when it is wanted, the entropy [T]."""
    logits, is_target, _ = _all_logits(hidden, head, targets, problem)
    out = jax.nn.logsumexp(logits, axis=1), jnp.sum(jnp.where(is_target, logits, 0), axis=1)
    log_p = logits - out[0][:, None]
    return (*out, -jnp.sum(jnp.exp(log_p) * log_p, axis=1)) if problem.with_entropy else out


def backward(hidden: Float[Array, "T D"], head, targets, lse: Float[Array, " T"], coefficients, *, problem: Problem):
    """The gradients of hidden and head."""
    logits, is_target, cut = _all_logits(hidden, head, targets, problem)
    columns = (x[:, None] for x in (lse, *coefficients))
    dlogits = problem.scale * logits_gradient(logits, next(columns), is_target, tuple(columns))
    dhidden = problem.hidden_gradient(dlogits, cut)
    dhead = problem.head_gradient(dlogits, hidden.astype(jnp.float32))
    absent = [(0, full - kept) for full, kept in zip(head.shape, dhead.shape)]
    return dhidden.astype(hidden.dtype), jnp.pad(dhead, absent).astype(head.dtype)


def _all_logits(hidden, head, targets, problem):
    cut = jax.lax.slice_in_dim(head, 0, problem.vocabulary, axis=problem.vocabulary_axis)
    return problem.logits(hidden, cut), jnp.arange(problem.vocabulary) == targets[:, None], cut
