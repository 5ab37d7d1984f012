"""Attention of queries to keys without the scores in memory: causal, grouped-query, by segments.

Axes: B batch, S queries, T keys, H query heads, K kv heads (H = G K), D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.chip import named_chip
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.flash_attention import cpu, gpu, reference, tpu, tpu_backward
from pallas_kernels.flash_attention.problem import Problem, Tiling
from pallas_kernels.flash_attention.tiling import check as check_tiling
from pallas_kernels.mosaic import varying_alike

_FORWARD = {"reference": reference.forward, "cpu": cpu.forward, "tpu": tpu.forward, "gpu": gpu.forward}
_BACKWARD = {
    "reference": reference.backward,
    "cpu": cpu.backward,
    "tpu": tpu_backward.backward,
    "gpu": gpu.backward,
}
# What the backward pass needs beside the arguments, to policies of `jax.checkpoint`: the result and its log-sum-exp.
RESIDUAL = "kept"


def flash_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    segment_ids: Int[Array, "B S"] | None = None,
    kv_segment_ids: Int[Array, "B T"] | None = None,
    causal: bool = True,
    q_offset: Int[Array, ""] | int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
    heads_first: bool = False,
    chip: str | None = None,
    tiling: Tiling | None = None,
) -> Float[Array, "B S H D"] | tuple[Float[Array, "B S H D"], Float[Array, "B S H"]]:
    """softmax(scale * q @ k.T) @ v over the keys that each query sees; the softmax is in float32.

    Query heads G i to G i + G - 1 share kv head i. Differentiable in q, k and v, for cotangents of both results.
    A query that sees no key comes out zero, with a log-sum-exp of -1e30, and has no gradient.

    Args:
      segment_ids: a query sees only keys of its own id. Every id is one, 0 too.
      kv_segment_ids: of the keys; by default those of the queries, if there are as many keys.
      causal: query i sees the keys up to i + q_offset.
      q_offset: the place of the first query among the keys; may be traced, and negative.
      scale: D ** -0.5 by default.
      return_lse: also the log of the sum of the exponentials of the scaled scores, natural, float32.
      implementation: None (by platform), "reference", "cpu" or "tpu", or several in order of preference. "cpu" is
        portable, and what other platforms run.
      heads_first: q is [B, H, S, D], k and v are [B, K, T, D], and so are the results ([B, H, S, D], [B, H, S]).
      chip: which TPU to tile for, by name; by default that of the mesh in force.
      tiling: of the TPU kernels, instead of the model's choice.

    Returns:
      Shaped like q and of its dtype; with `return_lse` also the log-sum-exp [B, S, H]. Two pieces of keys combine as
      logaddexp(lse1, lse2) and exp(lse1 - lse) * out1 + exp(lse2 - lse) * out2.

    Raises:
      ValueError: shapes, dtypes or a tiling that do not fit; ids of queries alone where there are more or fewer keys.
    """
    if not heads_first:
        q, k, v = (x.swapaxes(1, 2) if x.ndim == 4 else x for x in (q, k, v))
    _check(q, k, v)
    segments = _segments(q, k, segment_ids, kv_segment_ids)
    if chip is not None:
        named_chip(chip)
    if tiling is not None:
        check_tiling(tiling)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    known = int(q_offset) if not isinstance(q_offset, jax.core.Tracer) and jnp.ndim(q_offset) == 0 else None
    own_keys = kv_segment_ids is None and (segments is None or q.shape[2] == k.shape[2])
    all_see = own_keys and (not causal or (known is not None and known >= 0))
    problem = Problem(causal, scale, known, chip, tiling, all_see)
    if not q.size or not k.shape[2]:
        out, lse = reference.forward(q, k, v, segments, q_offset, problem=problem)
    else:
        if not isinstance(implementation, str | None):
            implementation = tuple(implementation)
        q_offset = jnp.asarray(q_offset, jnp.int32)
        q, k, v, q_offset, *segments = varying_alike(q, k, v, q_offset, *(segments or ()))
        out, lse = _attention(q, k, v, tuple(segments) or None, q_offset, problem, implementation)
    if not heads_first:
        out, lse = out.swapaxes(1, 2), lse.swapaxes(1, 2)
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, segments, q_offset, problem: Problem, implementation: Implementation):
    return _dispatched(_FORWARD, implementation, problem, q, k, v, segments, q_offset)


def _fwd(q, k, v, segments, q_offset, problem, implementation):
    out, lse = _attention(q, k, v, segments, q_offset, problem, implementation)
    out, lse = checkpoint_name(out, RESIDUAL), checkpoint_name(lse, RESIDUAL)
    return (out, lse), (q, k, v, segments, q_offset, out, lse)


def _bwd(problem, implementation, residuals, cotangents):
    q, k, v, segments, q_offset, out, lse = residuals
    dout, dlse = cotangents
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse
    dq, dk, dv = _dispatched(
        _BACKWARD, implementation, problem, q, k, v, segments, q_offset, lse, delta, dout.astype(q.dtype)
    )
    return dq, dk, dv, None, None


_attention.defvjp(_fwd, _bwd)


def _dispatched(implementations, implementation, problem: Problem, *args: Any):
    def told(function, q, k, v, segments, q_offset, *rest):
        q_offset = q_offset if problem.q_offset is None else problem.q_offset
        return function(q, k, v, segments, q_offset, *rest, problem=problem)

    told_all = {name: functools.partial(told, function) for name, function in implementations.items()}
    return _with_vmap(lambda *args: dispatch(told_all, implementation, *args, default="cpu"))(*args)


def _with_vmap(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(q, k, v, segments, q_offset, ...)` under `vmap`: the mapped axis becomes part of B, in one call.

    But where the offset is mapped too, of which a call has one: then there is a call for each.
    """
    folded, one_by_one, offset = jax.custom_batching.custom_vmap(run), jax.custom_batching.sequential_vmap(run), 4

    @folded.def_vmap
    def _mapped(size, mapped, *args):
        if mapped[offset]:
            axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
            out = jax.vmap(one_by_one, tuple(axes), axis_size=size)(*args)
        else:

            def rows(x, is_mapped):
                x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
                return x.reshape(-1, *x.shape[2:])

            arrays, which = ([*x[:offset], *x[offset + 1 :]] for x in (args, mapped))
            arrays = jax.tree.map(rows, arrays, which)
            out = folded(*arrays[:offset], args[offset], *arrays[offset:])
            out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return folded


def _check(q, k, v) -> None:
    """Heads first. Raises ValueError for what does not fit."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"flash_attention: q {q.shape}, k {k.shape} and v {v.shape} (heads first) don't fit; expected q "
            "[B, H, S, D], k and v [B, K, T, D]"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"flash_attention: {q.shape[1]} query heads can't share {k.shape[1]} kv heads evenly")
    if q.dtype != k.dtype or k.dtype != v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"flash_attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected bfloat16 or float32, all alike"
        )


def _segments(q, k, segment_ids, kv_segment_ids):
    """Ids of queries and keys, or None without any. Raises ValueError for what does not fit."""
    if segment_ids is None and kv_segment_ids is None:
        return None
    if segment_ids is None:
        raise ValueError("flash_attention: kv_segment_ids are given, segment_ids, those of the queries, are not")
    if kv_segment_ids is None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"flash_attention: with {q.shape[2]} queries and {k.shape[2]} keys, segment_ids alone don't say whose "
                "the keys are; give kv_segment_ids"
            )
        kv_segment_ids = segment_ids
    for name, ids, x in (("segment_ids", segment_ids, q), ("kv_segment_ids", kv_segment_ids, k)):
        if ids.shape != (x.shape[0], x.shape[2]) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"flash_attention: {name} {ids.dtype}{list(ids.shape)}, expected integers [{x.shape[0]}, {x.shape[2]}]"
            )
    return segment_ids.astype(jnp.int32), kv_segment_ids.astype(jnp.int32)
