"""The Mosaic GPU kernels at the shapes of GLM-4.5 and Air."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import grouped_matmul

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


def gpu_cases():
    return _grouped_matmul(8192, 16, 4096, 2816)


def gpu_matrix():
    shapes = [(m, e, k, n) for m, e in ((8192, 16), (65536, 160), (64, 128)) for k, n in ((4096, 1408), (5120, 1536))]
    both = [(m, e, *kn) for m, e, k, n in shapes for kn in ((k, n), (n, k))]
    return [case for shape in both for transpose in (False, True) for case in _grouped_matmul(*shape, transpose)]
