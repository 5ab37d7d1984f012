"""Attention as it is defined: every score at once, in float32.

Axes: B batch, K kv heads, G query heads per kv head, S queries, T keys, D head dim.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.flash_attention.problem import SEES_NOTHING, Problem, einsum, seen


def forward(q, k, v, segments, q_offset, *, problem: Problem):
    """[B, H, S, D], [B, K, T, D] twice -> [B, H, S, D] and the log-sum-exp [B, H, S]."""
    grouped = _grouped(q, k)
    scores, visible = _scores(grouped, k, segments, q_offset, problem)
    largest = jnp.max(jnp.where(visible, scores, SEES_NOTHING), axis=-1, keepdims=True, initial=SEES_NOTHING)
    weights = jnp.where(visible, jnp.exp(scores - largest), 0)
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    out = einsum("bkgst,bktd->bkgsd", weights, v.astype(jnp.float32)) / jnp.where(some, total, 1)
    lse = jnp.where(some, largest + jnp.log(jnp.where(some, total, 1)), SEES_NOTHING)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:-1])


def backward(q, k, v, segments, q_offset, lse, delta, dout, *, problem: Problem):
    """dq, dk, dv; delta [B, H, S] is what all gradients of a query's scores have taken off: sum(dout * out) - dlse."""
    grouped, dout = _grouped(q, k), _grouped(dout, k)
    scores, visible = _scores(grouped, k, segments, q_offset, problem)
    lse, delta = (x.reshape(grouped.shape[:-1])[..., None] for x in (lse, delta))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores, SEES_NOTHING) - lse), 0)
    dscores = weights * (einsum("bkgsd,bktd->bkgst", dout, v.astype(jnp.float32)) - delta) * problem.scale
    dq = einsum("bkgst,bktd->bkgsd", dscores, k.astype(jnp.float32)).reshape(q.shape)
    dk = einsum("bkgst,bkgsd->bktd", dscores, grouped)
    dv = einsum("bkgst,bkgsd->bktd", weights, dout)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _grouped(q, k):
    """Query heads by the kv head that they share, in float32: [B, K, G, S, D]."""
    return q.astype(jnp.float32).reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:])


def _scores(grouped, k, segments, q_offset, problem):
    scores = einsum("bkgsd,bktd->bkgst", grouped, k.astype(jnp.float32)) * problem.scale
    return scores, seen(problem, grouped.shape[3], k.shape[2], q_offset, segments)[:, None, None]
