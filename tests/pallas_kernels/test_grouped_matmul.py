"""Every implementation of grouped_matmul against float64, values and gradients, at awkward sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import blocks
from tests.pallas_kernels.support import WITH_NATIVE, on, quantise
from tests.support import quick_jit

# rows of each group, rows past the last group, K, N
CASES = {
    "even": ([8, 8, 8], 0, 16, 12),
    "empty groups": ([0, 5, 0, 7, 0], 0, 8, 4),
    "all in one": ([0, 0, 300, 0], 0, 5, 3),
    "rows past the end": ([3, 130, 1], 9, 7, 11),
    "one row": ([0, 1, 0], 0, 3, 2),
    "no rows routed": ([0, 0], 4, 3, 2),
    "around a block": ([127, 128, 129], 1, 6, 5),
    "primes": ([13, 2, 31, 17, 3], 2, 13, 7),
}


def _expected(lhs, rhs, sizes):
    out, start = np.zeros((len(lhs), rhs.shape[2])), 0
    for group, size in enumerate(sizes):
        out[start : start + size] = lhs[start : start + size] @ rhs[group]
        start += size
    return out


def _inputs(case, seed=0):
    sizes, past, k, n = CASES[case]
    rng = np.random.default_rng(seed)
    return rng.normal(size=(sum(sizes) + past, k)), rng.normal(size=(len(sizes), k, n)), np.asarray(sizes, np.int32)


@pytest.mark.few(8)
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("transpose", [False, True], ids=["KN", "NK"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, transpose: bool, implementation: str) -> None:
    lhs, rhs, sizes = _inputs(case)
    dout = np.random.default_rng(1).normal(size=(len(lhs), rhs.shape[2]))
    given = np.swapaxes(rhs, 1, 2) if transpose else rhs

    def product(lhs, rhs):
        return grouped_matmul(lhs, rhs, jnp.asarray(sizes), transpose_rhs=transpose, implementation=implementation)

    @quick_jit
    def with_gradients(lhs, rhs, dout):
        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(dout)

    with on(implementation):
        out, dlhs, drhs = with_gradients(*(jnp.asarray(x, jnp.float32) for x in (lhs, given, dout)))
    np.testing.assert_allclose(out, _expected(lhs, rhs, sizes), atol=2e-5)
    np.testing.assert_allclose(dlhs, _expected(dout, np.swapaxes(rhs, 1, 2), sizes), atol=2e-5)
    start, expected = 0, np.zeros_like(rhs)
    for group, size in enumerate(sizes):
        expected[group] = lhs[start : start + size].T @ dout[start : start + size]
        start += size
    np.testing.assert_allclose(np.swapaxes(drhs, 1, 2) if transpose else drhs, expected, atol=1e-4)


@pytest.mark.parametrize("implementation", WITH_NATIVE)
def test_a_layer_of_a_stack(implementation: str) -> None:
    lhs, rhs, sizes = _inputs("primes")
    stack = jnp.asarray(np.stack([rhs * 0, rhs, rhs * 2]), jnp.float32)
    lhs32, sizes = jnp.asarray(lhs, jnp.float32), jnp.asarray(sizes)

    def product(stack, layer):
        return grouped_matmul(lhs32, stack, sizes, layer=layer, implementation=implementation)

    with on(implementation):
        out = quick_jit(product)(stack, jnp.int32(2))
        gradient = quick_jit(jax.grad(lambda s: product(s, 1).sum()))(stack)
    np.testing.assert_allclose(out, _expected(lhs, rhs * 2, np.asarray(sizes)), atol=1e-4)
    assert (gradient[0] == 0).all() and (gradient[2] == 0).all() and (gradient[1] != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("transpose", [False, True], ids=["KN", "NK"])
@pytest.mark.parametrize("per", ["channel", "block"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_weights(dtype: str, per: str, transpose: bool, implementation: str) -> None:
    """Values and the gradient of the rows; that of the weights is refused."""
    sizes, rng = np.array([3, 0, 40, 20], np.int32), np.random.default_rng(0)
    k, n = (256, 384) if (per, implementation) == ("block", "tpu") else (150, 260)  # the TPU's takes whole blocks alone
    lhs, dout = rng.normal(size=(65, k)), rng.normal(size=(65, n))
    values, scale, weights = quantise(rng.normal(size=(4, k, n)), dtype, per)
    given = jnp.swapaxes(values, 1, 2) if transpose else values

    def product(lhs, rhs, scale):
        return grouped_matmul(
            lhs, rhs, jnp.asarray(sizes), rhs_scale=scale, transpose_rhs=transpose, implementation=implementation
        )

    @quick_jit
    def with_gradient(lhs, dout):
        out, pull = jax.vjp(lambda lhs: product(lhs, given, scale), lhs)
        return out, *pull(dout)

    with on(implementation):
        found = with_gradient(jnp.asarray(lhs, jnp.float32), jnp.asarray(dout, jnp.float32))
    for x, expected in zip(found, (_expected(lhs, weights, sizes), _expected(dout, weights.mT, sizes))):
        np.testing.assert_allclose(x, expected, atol=1e-5 * np.abs(expected).max())
    with on(implementation), pytest.raises(ValueError, match="frozen"):
        jax.grad(lambda s: product(jnp.asarray(lhs, jnp.float32), given, s).sum())(scale)


@pytest.mark.few(3)
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("k, n", [(128, 256), (256, 128), (128, 128)])
def test_blocks_as_wide_as_the_matrix(k: int, n: int, implementation: str) -> None:
    """A scale [E, 1, 2] is one per block; nothing but its width tells it from one per channel."""
    sizes, rng = np.array([3, 9], np.int32), np.random.default_rng(0)
    lhs, dout = rng.normal(size=(12, k)), rng.normal(size=(12, n))
    values, scale, weights = quantise(rng.normal(size=(2, k, n)), "int8", "block")
    assert scale.shape == (2, k // 128, n // 128)

    @quick_jit
    def with_gradient(lhs, dout):
        product = lambda lhs: grouped_matmul(  # noqa: E731
            lhs, values, jnp.asarray(sizes), rhs_scale=scale, implementation=implementation
        )
        out, pull = jax.vjp(product, lhs)
        return out, *pull(dout)

    with on(implementation):
        found = with_gradient(jnp.asarray(lhs, jnp.float32), jnp.asarray(dout, jnp.float32))
    for x, expected in zip(found, (_expected(lhs, weights, sizes), _expected(dout, weights.mT, sizes))):
        np.testing.assert_allclose(x, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("rows, matrices", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_rows_and_matrices_of_two_dtypes(rows: str, matrices: str, implementation: str) -> None:
    """As good as bfloat16, gradients too, each of the dtype of what it is a gradient of."""
    sizes, rng = np.array([3, 9], np.int32), np.random.default_rng(0)
    lhs, dout = jnp.asarray(rng.normal(size=(12, 40)), rows), jnp.asarray(rng.normal(size=(12, 24)), "float32")
    rhs = jnp.asarray(rng.normal(size=(2, 40, 24)), matrices)

    @quick_jit
    def with_gradients(lhs, rhs, dout):
        product = lambda lhs, rhs: grouped_matmul(  # noqa: E731
            lhs, rhs, jnp.asarray(sizes), preferred_element_type=jnp.float32, implementation=implementation
        )
        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(dout)

    with on(implementation):
        out, dlhs, drhs = with_gradients(lhs, rhs, dout)
    assert (out.dtype, dlhs.dtype, drhs.dtype) == (jnp.float32, lhs.dtype, rhs.dtype)
    lhs, rhs, dout = (np.asarray(x, np.float64) for x in (lhs, rhs, dout))
    gradient = np.stack([lhs[:3].T @ dout[:3], lhs[3:].T @ dout[3:]])
    for found, want in ((out, _expected(lhs, rhs, sizes)), (dlhs, _expected(dout, rhs.mT, sizes)), (drhs, gradient)):
        np.testing.assert_allclose(np.asarray(found, np.float64), want, atol=6e-3 * np.abs(want).max())


@pytest.mark.few(3)
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_experts_of_one_shard(offset: int, implementation: str) -> None:
    """Rows of other shards' experts come out zero and get no gradient; what they hold, NaN too, does not matter."""
    rng, sizes = np.random.default_rng(0), np.array([5, 0, 17, 9, 3], np.int32)
    lhs, rhs, dout = rng.normal(size=(40, 7)), rng.normal(size=(2, 7, 6)), rng.normal(size=(40, 6))
    start, mine = sizes[:offset].sum(), sizes[offset : offset + 2]
    rows = slice(start, start + mine.sum())
    elsewhere = np.ones(40, bool)
    elsewhere[rows] = False
    lhs[elsewhere] = dout[elsewhere] = np.nan

    @quick_jit
    def with_gradients(lhs, rhs, dout, offset):
        product = lambda lhs, rhs: grouped_matmul(  # noqa: E731
            lhs, rhs, jnp.asarray(sizes), group_offset=offset, implementation=implementation
        )
        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(dout)

    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    with on(implementation):
        out, dlhs, drhs = with_gradients(f32(lhs), f32(rhs), f32(dout), offset)
    for found, expected in ((out, _expected(lhs[rows], rhs, mine)), (dlhs, _expected(dout[rows], rhs.mT, mine))):
        np.testing.assert_allclose(found[rows], expected, atol=1e-5)
        assert (np.asarray(found)[elsewhere] == 0).all()
    parts = np.split(np.arange(mine.sum()) + start, np.cumsum(mine)[:-1])
    np.testing.assert_allclose(drhs, np.stack([lhs[p].T @ dout[p] for p in parts]), atol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("implementation", WITH_NATIVE)
def test_bfloat16_accumulates_in_float32(implementation: str) -> None:
    """256 products of about one: a bfloat16 sum would stop growing at 256."""
    lhs = jnp.ones((4, 1024), jnp.bfloat16)
    rhs = jnp.ones((1, 1024, 8), jnp.bfloat16)
    with on(implementation):
        out = grouped_matmul(
            lhs, rhs, jnp.array([4]), preferred_element_type=jnp.float32, implementation=implementation
        )
    assert out.dtype == jnp.float32 and (out == 1024).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    lhs, rhs, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 5, 6)), jnp.array([2, 2])
    with pytest.raises(ValueError, match="don't fit"):
        grouped_matmul(lhs, rhs, sizes)
    with pytest.raises(ValueError, match="for 2 groups"):
        grouped_matmul(jnp.zeros((4, 5)), rhs, jnp.array([4]))
    with pytest.raises(ValueError, match="there are 3 groups, and matrices for 2"):
        grouped_matmul(jnp.zeros((4, 5)), rhs, jnp.array([4, 0, 0]), group_offset=2)
    with pytest.raises(ValueError, match="no implementation is called fast"):
        grouped_matmul(jnp.zeros((4, 5)), rhs, sizes, implementation="fast")


@pytest.mark.parametrize("singles", [0, 3])
def test_blocks_cover_every_row_once_in_order(singles: int) -> None:
    rng = np.random.default_rng(0)
    cut = quick_jit(blocks.cut, static_argnums=(1, 2, 3))
    for total in (0, 1, *[100] * 18):
        sizes = rng.multinomial(total, rng.dirichlet([0.3] * 6))
        work = cut(jnp.asarray(sizes), 100, 16, singles)
        assert int(work.count) <= len(work.start)
        seen = [(int(g), int(s) + i) for g, s, r in zip(*work[:3]) for i in range(int(r))][:total]
        groups = np.repeat(np.arange(6), sizes)
        assert seen == [(int(group), row) for row, group in enumerate(groups)]
        if singles:
            small = np.isin(np.asarray(work.group), np.flatnonzero(sizes <= singles))
            assert (np.asarray(work.rows)[small & (np.asarray(work.rows) > 0)] == 1).all()
