"""The Mosaic GPU kernels at the shapes of GLM-4.5 and Air."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_attention, fused_moe, grouped_matmul, grouped_swiglu, linear_cross_entropy

BF16 = jnp.bfloat16


def _shape(*shape: int, dtype=BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _grouped_matmul(m: int, e: int, k: int, n: int, transpose: bool = False):
    """Forward and both gradients; M rows over E experts evenly."""
    layout = "NK" if transpose else "KN"
    rhs = _shape(e, n, k) if transpose else _shape(e, k, n)
    sizes = np.full(e, m // e, np.int32)

    def forward(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose, implementation="gpu")

    def pulled(index):
        return lambda lhs, rhs, sizes, dout: jax.vjp(lambda *x: forward(*x, sizes), lhs, rhs)[1](dout)[index]

    arguments = (_shape(m, k), rhs, sizes)
    what = f"[{m},{k}]x[{e},{layout}={k}x{n}]"
    return [
        (f"grouped_matmul/forward, {what}", forward, arguments),
        (f"grouped_matmul/dlhs, {what}", pulled(0), (*arguments, _shape(m, n))),
        (f"grouped_matmul/drhs, {what}", pulled(1), (*arguments, _shape(m, n))),
    ]


def _flash_attention(batch: int, queries: int, keys: int, heads: int = 96, kv_heads: int = 8, packed: bool = False):
    """Heads first, head_dim 128; forward, and backward with the forward before it."""
    q, kv = _shape(batch, heads, queries, 128), _shape(batch, kv_heads, keys, 128)
    ids = (_shape(batch, queries, dtype=jnp.int32), _shape(batch, keys, dtype=jnp.int32)) if packed else ()

    def forward(q, k, v, *ids):
        named = dict(zip(("segment_ids", "kv_segment_ids"), ids))
        return flash_attention(q, k, v, heads_first=True, q_offset=keys - queries, implementation="gpu", **named)

    def backward(q, k, v, dout, *ids):
        return jax.vjp(lambda *x: forward(*x, *ids), q, k, v)[1](dout)

    what = f"[{batch},{heads}/{kv_heads},{queries}x{keys},128]{' packed' if packed else ''}"
    return [
        (f"flash_attention/forward, {what}", forward, (q, kv, kv, *ids)),
        (f"flash_attention/backward, {what}", backward, (q, kv, kv, q, *ids)),
    ]


def _grouped_swiglu(m: int, e: int, k: int, f: int, transpose: bool = False):
    """Forward, and backward with the products computed anew."""
    weight = _shape(e, f, k) if transpose else _shape(e, k, f)
    sizes = np.full(e, m // e, np.int32)

    def forward(lhs, gate, up, sizes):
        return grouped_swiglu(lhs, gate, up, sizes, transpose_rhs=transpose, implementation="gpu")

    def backward(lhs, gate, up, sizes, dout):
        return jax.vjp(lambda *x: forward(*x, sizes), lhs, gate, up)[1](dout)

    what, arguments = f"[{m},{k}]x[{e},{'FK' if transpose else 'KF'}={k}x{f}]", (_shape(m, k), weight, weight, sizes)
    return [
        (f"grouped_swiglu/forward, {what}", forward, arguments),
        (f"grouped_swiglu/backward, {what}", backward, (*arguments, _shape(m, f))),
    ]


def _fused_moe(tokens: int, e: int, d: int, f: int, top_k: int = 8):
    """Decoding with the checkpoint's layout of the weights."""
    up, down = _shape(e, f, d), _shape(e, d, f)
    indices = (np.arange(tokens * top_k, dtype=np.int32) % e).reshape(tokens, top_k)

    def forward(x, gate, up, down, indices, weights):
        return fused_moe(x, gate, up, down, indices, weights, transpose_rhs=True, implementation="gpu")

    arguments = (_shape(tokens, d), up, up, down, indices, _shape(tokens, top_k, dtype=jnp.float32))
    return [(f"fused_moe/forward, [{tokens},{d}]x[{e},{f}]", forward, arguments)]


def _linear_cross_entropy(tokens: int, model: int, vocabulary: int = 151552):
    """The head as checkpoints have it; forward with the entropy."""

    def forward(hidden, head, targets):
        options = {"transpose_head": True, "return_entropy": True, "implementation": "gpu"}
        return linear_cross_entropy(hidden, head, targets, **options)

    arguments = (_shape(tokens, model), _shape(vocabulary, model), _shape(tokens, dtype=jnp.int32))
    return [(f"linear_cross_entropy/forward, [{tokens},{model}]x[{vocabulary},{model}]", forward, arguments)]


def gpu_cases():
    experts = _grouped_swiglu(8192, 16, 4096, 1408) + _fused_moe(8, 128, 4096, 1408)
    others = _flash_attention(1, 4096, 4096) + _linear_cross_entropy(8192, 4096)
    return _grouped_matmul(8192, 16, 4096, 2816) + experts + others


def gpu_matrix():
    shapes = [(4096, 1408), (5120, 1536)]
    layouts = [(8192, 16, *shape, transpose) for shape in shapes for transpose in (False, True)]
    layouts += [(64, 160, *shape, True) for shape in shapes]
    both = [(m, e, *kn, transpose) for m, e, k, f, transpose in layouts for kn in ((k, f), (f, k))]
    matmuls = [case for shape in both for case in _grouped_matmul(*shape)]
    swiglu = [case for shape in layouts for case in _grouped_swiglu(*shape)]
    attention = _flash_attention(1, 32768, 32768) + _flash_attention(1, 4096, 4096, packed=True)
    few = [
        case
        for n in (1, 8, 64, 256)
        for shape in ((128, 4096, 1408), (160, 5120, 1536))
        for case in _fused_moe(n, *shape)
    ]
    attention += _flash_attention(4, 1024, 8192)
    return matmuls + swiglu + few + attention + _linear_cross_entropy(8192, 5120)
