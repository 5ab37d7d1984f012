"""The three grouped ops at random shapes and under jax's transformations, every implementation against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import fused_moe, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.tiling import Tiling
from tests.pallas_kernels.support import IMPLEMENTATIONS, NATIVE, on
from tests.support import quick_jit

WIDTHS = [1, 2, 13, 127, 128, 129, 257, 384]


def silu(x):
    return x / (1 + np.exp(-x))


def per_row(groups: np.ndarray, product: Callable[..., Any], rows: np.ndarray, columns: int) -> np.ndarray:
    """Each row by the matrices of its group; zero for rows of none."""
    out = np.zeros((len(rows), columns))
    for row, group in enumerate(groups):
        if group >= 0:
            out[row] = product(rows[row], group)
    return out


def draw_groups(rng: np.random.Generator, rows: int, groups: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
    """Sizes, from even to all in one, of at most `rows` together; the group of each row, -1 past the last."""
    used = int(rng.integers(0, rows + 1)) if rng.random() < 0.5 else rows
    sizes = rng.multinomial(used, rng.dirichlet([skew] * groups))
    return sizes.astype(np.int32), np.pad(np.repeat(np.arange(groups), sizes), (0, rows - used), constant_values=-1)


def close(got: Any, want: np.ndarray, relative: float = 1e-5) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=relative * max(1.0, np.abs(want).max(initial=0)))


def value_and_gradients(op: Callable[..., Any], implementation: str, dout: np.ndarray, *args: np.ndarray):
    @quick_jit
    def run(dout, *args):
        out, pull = jax.vjp(op, *args)
        return out, *pull(dout)

    with on(implementation):
        return jax.tree.map(np.asarray, run(*(jnp.asarray(x, jnp.float32) for x in (dout, *args))))


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "examples"), [("reference", 8), ("cpu", 12), (NATIVE, 12), ("tpu", 8)])
def test_grouped_matmul(implementation: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        st.sampled_from([0, 1, 2, 15, 16, 17, 97, 128, 130]), st.sampled_from(WIDTHS), st.sampled_from(WIDTHS),
        st.integers(1, 7), st.sampled_from([0.01, 0.3, 100.0]), st.booleans(), st.integers(0, 99),
    )  # fmt: skip
    def run(rows, k, n, groups, skew, transpose, seed):
        rng = np.random.default_rng(seed)
        sizes, group = draw_groups(rng, rows, groups, skew)
        lhs, rhs, dout = rng.normal(size=(rows, k)), rng.normal(size=(groups, k, n)), rng.normal(size=(rows, n))
        # several tiles of every axis where they can be cut
        tiling = Tiling(32, 128 if k % 128 == 0 else k, min(n, 128), 16) if implementation == "tpu" else None
        turn = lambda x: x.swapaxes(-1, -2) if transpose else x  # noqa: E731
        op = lambda lhs, rhs: grouped_matmul(  # noqa: E731
            lhs, rhs, jnp.asarray(sizes), transpose_rhs=transpose, implementation=implementation, tiling=tiling
        )
        out, dlhs, drhs = value_and_gradients(op, implementation, dout, lhs, turn(rhs))
        close(out, per_row(group, lambda x, g: x @ rhs[g], lhs, n))
        close(dlhs, per_row(group, lambda d, g: rhs[g] @ d, dout, k))
        close(turn(drhs), np.stack([lhs[group == g].T @ dout[group == g] for g in range(groups)]))

    run()


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "examples"), [("reference", 8), ("cpu", 12), (NATIVE, 12), ("tpu", 6)])
def test_grouped_swiglu(implementation: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        st.sampled_from([0, 1, 17, 64, 97]), st.sampled_from(WIDTHS), st.sampled_from(WIDTHS), st.integers(1, 5),
        st.sampled_from([0.01, 0.3, 100.0]), st.booleans(), st.booleans(), st.integers(0, 99),
    )  # fmt: skip
    def run(rows, k, f, groups, skew, transpose, keep, seed):
        rng = np.random.default_rng(seed)
        sizes, group = draw_groups(rng, rows, groups, skew)
        lhs, dout = rng.normal(size=(rows, k)), rng.normal(size=(rows, f))
        gate, up = rng.normal(size=(2, groups, k, f)) / k**0.5
        turn = lambda x: x.swapaxes(-1, -2) if transpose else x  # noqa: E731
        op = lambda lhs, gate, up: grouped_swiglu(  # noqa: E731
            lhs, gate, up, jnp.asarray(sizes), transpose_rhs=transpose, keep_products=keep,
            implementation=implementation,
        )  # fmt: skip
        out, dlhs, dgate, dup = value_and_gradients(op, implementation, dout, lhs, turn(gate), turn(up))
        g, u = (per_row(group, lambda x, e, w=w: x @ w[e], lhs, f) for w in (gate, up))
        sigmoid, routed = 1 / (1 + np.exp(-g)), (group >= 0)[:, None]
        dg, du = routed * dout * u * sigmoid * (1 + g * (1 - sigmoid)), routed * dout * silu(g)
        close(out, silu(g) * u)
        close(dlhs, sum(per_row(group, lambda d, e, w=w: w[e] @ d, d, k) for w, d in ((gate, dg), (up, du))))
        for found, d in ((dgate, dg), (dup, du)):
            close(turn(found), np.stack([lhs[group == e].T @ d[group == e] for e in range(groups)]))

    run()


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "examples"), [("reference", 8), ("cpu", 12), (NATIVE, 12), ("tpu", 8)])
def test_fused_moe(implementation: str, examples: int) -> None:
    """`offset` experts lie on the shards before, and some past the last: they add nothing."""

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        st.sampled_from([0, 1, 2, 7, 8, 9, 33]), st.sampled_from(WIDTHS), st.sampled_from(WIDTHS), st.integers(1, 9),
        st.integers(1, 4), st.integers(0, 3), st.booleans(), st.integers(0, 99),
    )  # fmt: skip
    def run(tokens, d, f, experts, k, offset, transpose, seed):
        rng = np.random.default_rng(seed)
        total = experts + offset + k
        indices = np.array([rng.permutation(total)[:k] for _ in range(tokens)], np.int32).reshape(tokens, k)
        weights, x = rng.random((tokens, k)), rng.normal(size=(tokens, d))
        gate, up = rng.normal(size=(2, experts, d, f)) / d**0.5
        down = rng.normal(size=(experts, f, d)) / f**0.5
        turn = lambda x: x.swapaxes(-1, -2) if transpose else x  # noqa: E731
        want = np.zeros((tokens, d))
        for t, choice in np.ndindex(tokens, k):
            if 0 <= (e := indices[t, choice] - offset) < experts:
                want[t] += weights[t, choice] * ((silu(x[t] @ gate[e]) * (x[t] @ up[e])) @ down[e])
        op = lambda *args: fused_moe(  # noqa: E731
            *args[:4], jnp.asarray(indices), args[4], expert_offset=offset, transpose_rhs=transpose,
            implementation=implementation,
        )  # fmt: skip
        with on(implementation):
            args = (x, turn(gate), turn(up), turn(down), weights)
            out = quick_jit(op)(*(jnp.asarray(a, jnp.float32) for a in args))
        close(out, want)

    run()


# --- transformations --------------------------------------------------------------------------------------------------


def matmul(implementation: str, x, sizes, gate, up, down):
    return grouped_matmul(x, gate, sizes, implementation=implementation)


def swiglu(implementation: str, x, sizes, gate, up, down):
    return grouped_swiglu(x, gate, up, sizes, implementation=implementation)


def moe(implementation: str, x, sizes, gate, up, down):
    """Each row goes to the expert whose group it is in, and to the next."""
    first = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
    indices = jnp.stack([first, first + 1], 1) % len(gate)
    weights = jnp.full(indices.shape, 0.5, jnp.float32)
    return fused_moe(x, gate, up, down, indices, weights, implementation=implementation)


OPS = {"grouped_matmul": matmul, "grouped_swiglu": swiglu, "fused_moe": moe}


def batch(seed: int = 0) -> list[jax.Array]:
    """Of two examples: rows, sizes, and the weights of three experts."""
    rng = np.random.default_rng(seed)
    shapes = (2, 19, 8), (2, 3, 8, 6), (2, 3, 8, 6), (2, 3, 6, 8)
    x, gate, up, down = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return [x, jnp.array([[7, 0, 12], [19, 0, 0]], jnp.int32), gate, up, down]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", OPS)
def test_vmap_scan_and_remat(op: str, implementation: str) -> None:
    """Each example's groups are its own."""
    args = batch()
    remat = (lambda f: f) if implementation == "tpu" else jax.checkpoint  # the interpreter's side effects refuse it

    def gradients(*args):
        loss = remat(lambda x, *weights: jnp.sin(OPS[op](implementation, x, args[1], *weights)).sum())
        return jax.value_and_grad(loss, (0, 1))(args[0], *args[2:])

    with on(implementation):
        one_by_one = [quick_jit(gradients)(*(x[i] for x in args)) for i in range(2)]
        mapped = quick_jit(jax.vmap(gradients))(*args)
        scanned = quick_jit(lambda args: jax.lax.scan(lambda _, x: (None, gradients(*x)), None, args)[1])(args)
    want = jax.tree.map(lambda *x: np.stack(x), *one_by_one)
    for got in (mapped, scanned):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "cpu", NATIVE])
@pytest.mark.parametrize("op", OPS)
def test_inside_a_checked_shard_map(op: str, implementation: str) -> None:
    """Rows differ by device and the weights do not: their gradient is summed over the devices by JAX itself.

    The interpreter of TPU kernels can't run checked; test_aot.py compiles them so.
    """
    x, sizes, *weights = batch()
    weights = [w[0] for w in weights]
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x, sizes, *weights):
        return jnp.sin(OPS[op](implementation, x[0], sizes[0], *weights)).sum()[None]

    specs = (P("rows"), P("rows"), P(), P(), P())
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P("rows"), check_vma=True)
    first = (x[:1], sizes[:1])
    with on(implementation):
        got = quick_jit(jax.grad(lambda x, *w: mapped(x, first[1], *w).sum(), (0, 1)))(first[0], *weights)
        want = quick_jit(jax.grad(lambda x, *w: loss(x, first[1], *w).sum(), (0, 1)))(first[0], *weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
