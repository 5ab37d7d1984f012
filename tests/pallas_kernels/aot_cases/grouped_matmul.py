"""grouped_matmul at the experts' shapes of GLM-4.5 and Air.

Axes: M rows, K contracted, N columns, E experts of one shard.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import grouped_matmul
from pallas_kernels.analysis.cases import Case

AIR = {"k": 4096, "n": 2816}  # gate and up side by side, the shape that other kernels are known by
SPREADS = ("balanced", "zipf", "all on one")


def cases() -> list[Case]:
    return every_direction(8192, **AIR)


def matrix() -> list[Case]:
    shapes = [
        {"m": 8192, **AIR},
        {"m": 8192, **AIR, "spread": "zipf"},
        {"m": 8192, **AIR, "spread": "all on one"},
        {"m": 8192, "k": 4096, "n": 1408},
        {"m": 8192, "k": 5120, "n": 1536},
        {"m": 16384, "k": 5120, "n": 1536, "groups": 160},
        {"m": 8192, "k": 4096, "n": 1408, "groups": 128},
        {"m": 4096, "k": 5120, "n": 1536, "groups": 1},
        {"m": 37, "k": 4096, "n": 1408},
        {"m": 8192, "k": 4096, "n": 1408, "dtype": jnp.float32},
        {"m": 8192, "k": 4096, "n": 1408, "transpose": True},
    ]
    kinds = [(jnp.int8, "channel", True), (jnp.int8, "block", False), (jnp.float8_e4m3fn, "block", True)]
    kinds += [(jnp.int8, "block", True), (jnp.float8_e4m3fn, "channel", False)]
    quantised = [
        forward(8192, 4096, 1408, weights=weights, per=per, transpose=transpose) for weights, per, transpose in kinds
    ]
    return [case for shape in shapes for case in every_direction(**shape)] + quantised


def every_direction(m: int, k: int, n: int, **options: Any) -> list[Case]:
    return [make(m, k, n, **options) for make in (forward, dlhs, drhs)]


def forward(m: int, k: int, n: int, *, weights: Any = None, per: str = "channel", **options: Any) -> Case:
    what, lhs, rhs, sizes, out, how = _shapes(m, k, n, **options)
    flops = 2.0 * m * k * n
    if weights is None:
        op = lambda lhs, rhs, sizes: grouped_matmul(lhs, rhs, sizes, **how)  # noqa: E731
        return Case(f"grouped_matmul/forward, {what}", op, (lhs, rhs, sizes), nbytes(lhs, rhs, out), flops)
    rhs = jax.ShapeDtypeStruct(rhs.shape, weights)
    blocks = (1, n) if per == "channel" else (k // 128, n // 128)
    scale = jax.ShapeDtypeStruct((rhs.shape[0], *blocks), jnp.float32)
    op = lambda lhs, rhs, scale, sizes: grouped_matmul(lhs, rhs, sizes, rhs_scale=scale, **how)  # noqa: E731
    name = f"grouped_matmul/forward, {what}, {jnp.dtype(weights)} per {per}"
    return Case(name, op, (lhs, rhs, scale, sizes), nbytes(lhs, rhs, scale, out), flops)


def dlhs(m: int, k: int, n: int, **options: Any) -> Case:
    return _gradient(0, m, k, n, **options)


def drhs(m: int, k: int, n: int, **options: Any) -> Case:
    return _gradient(1, m, k, n, **options)


def _gradient(which: int, m: int, k: int, n: int, **options: Any) -> Case:
    what, lhs, rhs, sizes, out, how = _shapes(m, k, n, **options)

    def op(lhs, rhs, sizes, dout):
        return jax.vjp(lambda *operands: grouped_matmul(*operands, sizes, **how), lhs, rhs)[1](dout)[which]

    name = f"grouped_matmul/{('dlhs', 'drhs')[which]}, {what}"
    return Case(name, op, (lhs, rhs, sizes, out), nbytes(lhs, rhs, out), 2.0 * m * k * n)


def _shapes(m, k, n, *, groups: int = 16, dtype: Any = jnp.bfloat16, spread: str = "balanced", transpose: bool = False):
    lhs, out = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((m, n), dtype)
    rhs = jax.ShapeDtypeStruct((groups, n, k) if transpose else (groups, k, n), dtype)
    layout = "NK" if transpose else "KN"
    what = f"M={m} K={k} N={n} E={groups}, {jnp.dtype(dtype)} {layout}, {spread}"
    how = {"transpose_rhs": transpose, "implementation": "tpu"}
    return what, lhs, rhs, group_sizes(m, groups, spread), out, how


def group_sizes(rows: int, groups: int, spread: str) -> np.ndarray:
    """How many rows each group has: alike, falling as one over its rank, or all in the second."""
    shares = {
        "balanced": np.ones(groups),
        "zipf": 1 / (np.random.default_rng(0).permutation(groups) + 1),
        "all on one": np.arange(groups) == min(1, groups - 1),
    }[spread]
    ends = np.round(np.cumsum(shares) / shares.sum() * rows).astype(np.int32)
    return np.diff(ends, prepend=0).astype(np.int32)


def nbytes(*arrays: Any) -> float:
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)))
