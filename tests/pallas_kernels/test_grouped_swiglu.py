"""Every implementation of grouped_swiglu against float64, values and gradients, with every option."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_swiglu
from tests.pallas_kernels.support import WITH_NATIVE, on, quantise
from tests.support import quick_jit

SIZES = np.array([5, 0, 40, 19, 3], np.int32)
ROWS, K, F = 70, 24, 40


def _groups(offset: int, count: int) -> np.ndarray:
    """Which of the given groups each row belongs to; -1 for none."""
    group = np.repeat(np.arange(len(SIZES)), SIZES) - offset
    group = np.pad(group, (0, ROWS - len(group)), constant_values=-1)
    return np.where((group >= 0) & (group < count), group, -1)


def _expected(lhs, gate, up, group, dout):
    """Values and gradients, in float64."""
    out, dlhs, dgate, dup = (np.zeros_like(x) for x in (dout, lhs, gate, up))
    for e in range(len(gate)):
        rows = group == e
        x, g, u, d = lhs[rows], lhs[rows] @ gate[e], lhs[rows] @ up[e], dout[rows]
        sigmoid = 1 / (1 + np.exp(-g))
        silu = g * sigmoid
        dg, du = d * u * (sigmoid + silu * (1 - sigmoid)), d * silu
        out[rows], dlhs[rows] = silu * u, dg @ gate[e].T + du @ up[e].T
        dgate[e], dup[e] = x.T @ dg, x.T @ du
    return out, dlhs, dgate, dup


def _inputs(seed=0, groups=5, k=K, f=F):
    rng = np.random.default_rng(seed)
    shapes = (ROWS, k), (groups, k, f), (groups, k, f), (ROWS, f)
    return [rng.normal(size=shape) for shape in shapes]


@functools.cache
def _with_gradients(implementation: str, **static):
    op = functools.partial(grouped_swiglu, group_sizes=jnp.asarray(SIZES), implementation=implementation, **static)

    @quick_jit
    def run(lhs, gate, up, dout, **traced):
        out, pull = jax.vjp(lambda *args: op(*args, **traced), lhs, gate, up)
        return out, *pull(dout)

    return run


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("transpose", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["KF", "FK"])
def test_values_and_gradients(transpose: bool, keep: bool, implementation: str) -> None:
    lhs, gate, up, dout = _inputs()
    turned = lambda x: np.swapaxes(x, 1, 2) if transpose else x  # noqa: E731
    args = [jnp.asarray(x, jnp.float32) for x in (lhs, turned(gate), turned(up), dout)]
    with on(implementation):
        found = _with_gradients(implementation, transpose_rhs=transpose, keep_products=keep)(*args)
    out, dlhs, dgate, dup = _expected(lhs, gate, up, _groups(0, 5), dout)
    for x, y in zip(found, (out, dlhs, turned(dgate), turned(dup))):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())


@pytest.mark.slow
@pytest.mark.parametrize("implementation", WITH_NATIVE)
def test_a_shard_of_a_layer(implementation: str) -> None:
    """Two experts of five, in the second of three layers; what other rows hold, NaN too, does not matter."""
    lhs, gate, up, dout = _inputs(1, groups=2)
    group = _groups(2, 2)
    expected = _expected(lhs, gate, up, group, dout)
    lhs[group < 0] = dout[group < 0] = np.nan
    stack = lambda x: jnp.asarray(np.stack([x * np.nan, x, x * np.nan]), jnp.float32)  # noqa: E731
    args = jnp.asarray(lhs, jnp.float32), stack(gate), stack(up), jnp.asarray(dout, jnp.float32)
    with on(implementation):
        found = _with_gradients(implementation)(*args, group_offset=jnp.int32(2), layer=jnp.int32(1))
    for x, y in zip(found, expected):
        x = x[1] if x.ndim == 4 else x
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())
    assert (found[2][0] == 0).all() and (found[2][2] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("per", ["channel", "block"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_weights(dtype: str, per: str, implementation: str) -> None:
    k, f = (256, 384) if (per, implementation) == ("block", "tpu") else (150, 260)  # the TPU's takes whole blocks alone
    lhs, gate, up, dout = _inputs(2, k=k, f=f)
    (gate, gate_scale, gate_meant), (up, up_scale, up_meant) = quantise(gate, dtype, per), quantise(up, dtype, per)

    @quick_jit
    def run(lhs, dout):
        op = lambda lhs: grouped_swiglu(  # noqa: E731
            lhs, gate, up, jnp.asarray(SIZES), gate_scale=gate_scale, up_scale=up_scale, implementation=implementation
        )
        out, pull = jax.vjp(op, lhs)
        return out, *pull(dout)

    with on(implementation):
        found = run(jnp.asarray(lhs, jnp.float32), jnp.asarray(dout, jnp.float32))
    for x, y in zip(found, _expected(lhs, gate_meant, up_meant, _groups(0, 5), dout)):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())


@pytest.mark.slow
@pytest.mark.parametrize("implementation", WITH_NATIVE)
def test_bfloat16_activation_in_float32(implementation: str) -> None:
    args = [jnp.asarray(x, jnp.bfloat16) for x in _inputs(3)]
    with on(implementation):
        found = _with_gradients(implementation)(*args)
    expected = _expected(*(np.asarray(x, np.float64) for x in args[:3]), _groups(0, 5), np.asarray(args[3], np.float64))
    for x, y in zip(found, expected):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=1.5e-2 * np.abs(y).max())
    np.testing.assert_allclose(np.asarray(found[0], np.float64), expected[0], rtol=2**-8, atol=1e-6)  # rounded once


def test_shapes_that_do_not_fit_are_refused() -> None:
    lhs, gate, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 6)), jnp.array([2, 2])
    with pytest.raises(ValueError, match="don't fit"):
        grouped_swiglu(lhs, gate, gate[:, :, :5], sizes)
    with pytest.raises(ValueError, match="expected one dtype"):
        grouped_swiglu(lhs, gate, gate.astype(jnp.int8), sizes, up_scale=jnp.ones((2, 1, 6)))
    with pytest.raises(ValueError, match="needs a scale"):
        grouped_swiglu(lhs, gate.astype(jnp.int8), gate.astype(jnp.int8), sizes)
