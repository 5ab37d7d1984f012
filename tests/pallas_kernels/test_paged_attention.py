"""Every implementation of paged_attention against float64 attention over a contiguous cache, on ragged batches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention.tiling import Tiling
from tests.pallas_kernels.support import NATIVE, on
from tests.support import quick_jit

IMPLEMENTATIONS = [
    "reference",
    "cpu",
    pytest.param(NATIVE, id="native"),
    "batched",
    pytest.param("tpu", marks=pytest.mark.slow),
]  # the interpreter is slow
N, R, P, NUM_PAGES = 22, 5, 4, 32
PAGE_SIZE = {"float32": 8, "bfloat16": 16, "int8": 32, "float8_e4m3fn": 32}
# KV heads, group, head size: two tiles of queries of each are made, and blocks of two pages
HEADS = {"grouped": (2, 3, 64), "one group": (1, 12, 128), "no group": (3, 1, 64)}

# new tokens and lengths of the live rows, in units of "page" where a float is given
MIXTURES = {
    "decoding": [(1, 1), (1, 2.0), (1, 17), (1, 4.0), (1, 1.0)],
    "mixture": [(1, 3.5), (0, 9), (5, 5), (13, 2.5), (1, 7)],
    "one long prompt": [(22, 22)],
    "one token": [(1, 1)],
    "a chunk that fills the last page": [(0, 0), (8, 4.0), (9, 1.5)],
    "drafts": [(4, 2.0), (3, 9), (4, 1.25), (2, 2), (4, 3.0)],
    "nobody": [],
    "rows without tokens": [(0, 0), (0, 12)],
}


@functools.cache
def _compiled(implementation: str, page_size: int):
    tiling = Tiling(2 * page_size, (1, 8))
    return quick_jit(functools.partial(paged_attention, implementation=implementation, tiling=tiling))


class Case:
    """A batch, its rows' contiguous caches, and what has to come of it."""

    def __init__(self, mixture, heads="grouped", dtype="float32", page_dtype="float32", layers=None, seed=0, tokens=N):
        self.rng = np.random.default_rng(seed)
        self.kv_heads, group, self.head_dim = HEADS[heads]
        self.page_dtype, self.page_size = jnp.dtype(page_dtype), PAGE_SIZE[page_dtype]
        self.layers, self.layer = layers, None if layers is None else self.rng.integers(layers)
        lengths = [max(m, int(n * self.page_size) if isinstance(n, float) else n) for m, n in mixture]
        self.rows = [(m, min(n, P * self.page_size)) for (m, _), n in zip(mixture, lengths)]
        normal = lambda *shape: np.asarray(self.rng.normal(size=shape), jnp.dtype(dtype))  # noqa: E731
        self.q = normal(tokens, self.kv_heads * group, self.head_dim)
        self.k, self.v = normal(tokens, self.kv_heads, self.head_dim), normal(tokens, self.kv_heads, self.head_dim)
        self.starts = np.cumsum([0] + [m for m, _ in self.rows])
        for x in (self.q, self.k, self.v):
            x[self.starts[-1] :] = np.nan  # past the last row: nobody's
        quantised = self.page_dtype.itemsize == 1
        scales = np.asarray(self.rng.uniform(0.01, 0.02, (layers or 1, 2, self.kv_heads)), np.float32)
        self.kv_scale = scales if quantised else None
        self._fill()

    def _stored(self, x):
        """Keys and values [tokens, 2, K, D] as stored, [K, tokens, 2 D]."""
        x = x.astype(np.float32)
        if self.kv_scale is not None:
            most = 127 if self.page_dtype == jnp.int8 else 448
            x = np.clip(x * (1 / self.kv_scale[self.layer or 0])[:, :, None], -most, most)
            x = np.rint(x) if self.page_dtype == jnp.int8 else x
        return np.moveaxis(np.concatenate([x[:, 0], x[:, 1]], -1), 0, 1).astype(self.page_dtype)

    def _fill(self):
        shape = (NUM_PAGES, self.kv_heads, self.page_size, 2 * self.head_dim)
        nothing = 127 if self.page_dtype == jnp.int8 else np.nan
        self.before = np.full((self.layers or 1, *shape), nothing, self.page_dtype)
        self.table = self.rng.choice([-7, 10**6, NUM_PAGES, 0], (R, P)).astype(np.int32)
        free = list(self.rng.permutation(NUM_PAGES - 1) + 1)
        self.caches, mine = [], self.before[self.layer or 0]
        for r, (m, n) in enumerate(self.rows):
            new = slice(self.starts[r], self.starts[r] + m)
            old = np.asarray(self.rng.normal(size=(n - m, 2, self.kv_heads, self.head_dim)), np.float32)
            cache = np.concatenate([self._stored(old), self._stored(np.stack([self.k[new], self.v[new]], 1))], 1)
            for j in range(-(-n // self.page_size)):
                self.table[r, j] = free.pop()
                held = cache[:, j * self.page_size : min((j + 1) * self.page_size, n - m)]
                mine[self.table[r, j], :, : held.shape[1]] = held
            self.caches.append(cache)

    def arguments(self):
        lengths, starts = np.full(R, 10**6, np.int32), np.full(R + 1, -3, np.int32)
        lengths[: len(self.rows)] = [n for _, n in self.rows]
        starts[: len(self.starts)] = self.starts
        pages = self.before if self.layers is not None else self.before[0]
        args = [jnp.asarray(x) for x in (self.q, self.k, self.v, pages, self.table, lengths, starts)]
        options = {} if self.layer is None else {"layer": jnp.int32(self.layer)}
        if self.kv_scale is not None:
            options["kv_scale"] = jnp.asarray(self.kv_scale if self.layers is not None else self.kv_scale[0])
        return (*args, jnp.int32(len(self.rows))), options

    def expected(self):
        out = np.zeros(self.q.shape)
        group = self.q.shape[1] // self.kv_heads
        for (m, n), start, cache in zip(self.rows, self.starts, self.caches):
            both = cache.astype(np.float64).reshape(self.kv_heads, n, 2, self.head_dim)
            if self.kv_scale is not None:
                both = both * self.kv_scale[self.layer or 0].T[:, None, :, None]
            for i in range(m):
                for head in range(self.q.shape[1]):
                    k, v = np.moveaxis(both[head // group, : n - m + i + 1], 1, 0)
                    scores = k @ self.q[start + i, head].astype(np.float64) / np.sqrt(self.head_dim)
                    weights = np.exp(scores - scores.max())
                    out[start + i, head] = weights @ v / weights.sum()
        return out

    def check(self, out, pages, tolerance):
        assert out.dtype == self.q.dtype
        np.testing.assert_allclose(np.asarray(out, np.float64), self.expected(), rtol=tolerance, atol=tolerance)
        bits = lambda x: np.asarray(x).view(f"u{self.page_dtype.itemsize}")  # noqa: E731
        after, before = bits(pages).reshape(self.before.shape).copy(), bits(self.before).copy()
        mine, was = after[self.layer or 0], before[self.layer or 0]
        for r, ((m, n), cache) in enumerate(zip(self.rows, self.caches)):
            for j in range(-(-n // self.page_size)):
                page, held = self.table[r, j], bits(cache)[:, j * self.page_size : (j + 1) * self.page_size]
                np.testing.assert_array_equal(mine[page, :, : held.shape[1]], held)
                # of the page in which the new tokens end, what is past them belongs to no one
                mine[page, :, held.shape[1] :] = was[page, :, held.shape[1] :] if m else mine[page, :, held.shape[1] :]
                was[page, :, : held.shape[1]] = held
        np.testing.assert_array_equal(after, before)


def _verify(case: Case, implementation: str, tolerance: float) -> None:
    args, options = case.arguments()
    with on(implementation):
        result = jax.block_until_ready(_compiled(implementation, case.page_size)(*args, **options))
    case.check(*result, tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures(mixture: str, implementation: str) -> None:
    _verify(Case(MIXTURES[mixture]), implementation, 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("page_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_types_of_pages_and_a_layer_of_a_stack(page_dtype: str, implementation: str) -> None:
    """With float32 queries what is stored is used as exactly as in float64; the other layers stay as they were."""
    _verify(Case(MIXTURES["mixture"], page_dtype=page_dtype, layers=3), implementation, 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "heads, dtype, page_dtype",
    [("one group", "bfloat16", "bfloat16"), ("no group", "bfloat16", "int8"), ("one group", "float32", "float32")],
)
def test_heads(heads: str, dtype: str, page_dtype: str, implementation: str) -> None:
    tolerance = 1.5e-2 if dtype == "bfloat16" else 3e-6
    _verify(Case(MIXTURES["mixture"], heads, dtype, page_dtype), implementation, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_of_one_row(implementation: str) -> None:
    """The smallest batch there is, of N = 1."""
    for length in (1, 9, 1.0, 4.0):
        _verify(Case([(1, length)], tokens=1), implementation, 3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_mixtures(implementation: str) -> None:
    page_size = PAGE_SIZE["float32"]

    @settings(max_examples=6 if implementation == "tpu" else 25, deadline=None, database=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, N), st.integers(0, P * page_size)), max_size=R), st.integers(0, 99))
    def check(rows, seed):
        left, mixture = N, []
        for tokens, before in rows:
            tokens = min(tokens, left)
            left -= tokens
            mixture.append((tokens, min(tokens + before, P * page_size)))
        _verify(Case(mixture, seed=seed), implementation, 3e-6)

    check()


def test_shapes_that_do_not_fit_are_refused() -> None:
    args, options = Case(MIXTURES["decoding"], page_dtype="int8").arguments()
    q, k, v, pages, table, lengths, starts, rows = args
    for wrong, message in (
        ((q, k[:, :1], v, pages, table, lengths, starts, rows), "don't fit"),
        ((q, k, v, pages[None], table, lengths, starts, rows), "layer not given"),
        ((q, k, v, pages, table[:2], lengths, starts, rows), r"expected \[R, P\]"),
        ((q, k, v, pages.astype(jnp.int16), table, lengths, starts, rows), "pages of int16"),
        ((q, k, v, pages.astype(jnp.bfloat16), table, lengths, starts, rows), "kv_scale is for int8"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(*wrong, **options)
    with pytest.raises(ValueError, match="int8 and float8"):
        paged_attention(*args)
    with pytest.raises(ValueError, match=r"is not \(2, 2\)"):
        paged_attention(*args, kv_scale=jnp.ones((2, 3)))


def test_a_gradient_is_refused() -> None:
    args, _ = Case(MIXTURES["decoding"]).arguments()
    with pytest.raises(TypeError, match="has no gradient: training attends with flash_attention"):
        jax.grad(lambda q: paged_attention(q, *args[1:])[0].sum())(args[0])
