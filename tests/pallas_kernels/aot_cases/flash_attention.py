"""flash_attention as GLM-4.5 and Air train: 96 query heads on 8 kv heads of 128, packed sequences.

Axes: B batch, S sequence, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_attention
from pallas_kernels.analysis.cases import Case
from pallas_kernels.flash_attention import tpu_backward
from pallas_kernels.flash_attention.problem import Problem


def cases() -> list[Case]:
    return [forward(4096), backward(4096)]


def matrix() -> list[Case]:
    shapes = [
        {"length": 4096, "packed": False},
        {"length": 5000},
        {"length": 32768, "packed": False},
        {"length": 131072, "heads": (12, 1, 128), "packed": False},  # one of eight devices
        {"length": 4096, "heads": (64, 8, 64)},
        {"length": 4096, "dtype": jnp.float32, "heads": (12, 1, 128)},
    ]
    return [make(**shape) for shape in shapes for make in (forward, backward)]


def forward(length: int, **options) -> Case:
    name, (q, k, v), segments, scores = _shapes(length, **options)
    lse = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)

    def attend(q, k, v, segment_ids=None):
        return flash_attention(
            q, k, v, segment_ids=segment_ids, heads_first=True, return_lse=True, implementation="tpu"
        )

    arguments = (q, k, v, *segments)
    head_dim = q.shape[3]
    return Case(f"flash_attention/forward, {name}", attend, arguments, _bytes(arguments, q, lse), 4 * scores * head_dim)


def backward(length: int, **options) -> Case:
    name, (q, k, v), segments, scores = _shapes(length, **options)
    row = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    head_dim = q.shape[3]

    def gradients(q, k, v, lse, delta, dout, segment_ids=None):
        ids = None if segment_ids is None else (segment_ids, segment_ids)
        problem = Problem(causal=True, scale=head_dim**-0.5)
        return tpu_backward.backward(q, k, v, ids, 0, lse, delta, dout, problem=problem)

    arguments = (q, k, v, row, row, q, *segments)
    flops = 10 * scores * head_dim
    return Case(f"flash_attention/backward, {name}", gradients, arguments, _bytes(arguments, q, k, v), flops)


def _shapes(length, batch: int = 1, heads=(96, 8, 128), dtype=jnp.bfloat16, packed: bool = True):
    """A name, q, k and v, segment ids in a list (two documents in each row) or none, and how many scores are seen."""
    num_heads, kv_heads, head_dim = heads
    q, k = (jax.ShapeDtypeStruct((batch, n, length, head_dim), dtype) for n in (num_heads, kv_heads))
    first = 5 * length // 8 if packed else length
    segments = [np.repeat((np.arange(length) >= first)[None], batch, axis=0).astype(np.int32)] if packed else []
    scores = batch * num_heads * sum(n * (n + 1) / 2 for n in (first, length - first))
    name = f"B={batch} S={length} H={num_heads} K={kv_heads} D={head_dim}, {jnp.dtype(dtype)}"
    return name + (", packed" if packed else ""), (q, k, k), segments, scores


def _bytes(*trees) -> float:
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees)))
