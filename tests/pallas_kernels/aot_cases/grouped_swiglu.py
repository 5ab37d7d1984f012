"""grouped_swiglu at the experts' shapes of GLM-4.5 and Air. Axes: M rows, K model, F expert width, E experts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.analysis.cases import Case
from tests.pallas_kernels.aot_cases.grouped_matmul import group_sizes, nbytes

AIR, FULL = {"k": 4096, "f": 1408}, {"k": 5120, "f": 1536}


def cases() -> list[Case]:
    return [forward(8192, **AIR), backward(8192, **AIR)]


def matrix() -> list[Case]:
    shapes = [{"m": 8192, **AIR}, {"m": 8192, **FULL}, {"m": 32768, **AIR}, {"m": 32768, **FULL}]
    shapes += [{"m": 32768, **AIR, "spread": "zipf"}, {"m": 8192, **AIR, "keep_products": True}]
    shapes += [{"m": 8192, **FULL, "dtype": jnp.float32}]
    beside = [in_three_steps(m, **AIR) for m in (8192, 32768)]
    return [make(**shape) for shape in shapes for make in (forward, backward)] + beside


def forward(m: int, k: int, f: int, **options: Any) -> Case:
    what, args, hidden, how = _shapes(m, k, f, **options)
    op = functools.partial(grouped_swiglu, **how)
    return Case(f"grouped_swiglu/forward, {what}", op, args, nbytes(args[:3], hidden), 4.0 * m * k * f)


def backward(m: int, k: int, f: int, **options: Any) -> Case:
    """All three gradients, the products computed anew (or kept: those count as results of the forward pass)."""
    what, args, hidden, how = _shapes(m, k, f, **options)

    def op(lhs, gate, up, sizes, dout):
        return jax.vjp(lambda *operands: grouped_swiglu(*operands, sizes, **how), lhs, gate, up)[1](dout)

    least = 2 * nbytes(args[:3]) + nbytes(hidden)
    return Case(f"grouped_swiglu/backward, {what}", op, (*args, hidden), least, 12.0 * m * k * f)


def in_three_steps(m: int, k: int, f: int, **options: Any) -> Case:
    """What it takes the place of: two grouped matmuls, and XLA's silu(gate) * up."""
    what, args, hidden, _ = _shapes(m, k, f, **options)

    def op(lhs, gate, up, sizes):
        g, u = (grouped_matmul(lhs, w, sizes, implementation="tpu") for w in (gate, up))
        return (jax.nn.silu(g.astype(jnp.float32)) * u.astype(jnp.float32)).astype(lhs.dtype)

    return Case(f"grouped_swiglu/in three steps, {what}", op, args, nbytes(args[:3], hidden), 4.0 * m * k * f)


def _shapes(m, k, f, *, groups=16, spread="balanced", keep_products=False, dtype: Any = jnp.bfloat16):
    lhs, weights, hidden = (jax.ShapeDtypeStruct(s, dtype) for s in ((m, k), (groups, k, f), (m, f)))
    kept = ", products kept" if keep_products else ""
    what = f"M={m} K={k} F={f} E={groups}, {jnp.dtype(dtype)}, {spread}{kept}"
    how = {"implementation": "tpu", "keep_products": keep_products}
    return what, (lhs, weights, weights, group_sizes(m, groups, spread)), hidden, how
