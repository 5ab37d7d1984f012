"""The CPU's native code against float64, and against XLA's loops, which take its place where there is no compiler."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_moe, grouped_matmul, native, paged_attention
from pallas_kernels.fused_moe import cpu as fused_moe_cpu
from pallas_kernels.native import ops

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")

ODD = {"experts": 5, "model": 70, "width": 37}  # no multiple of a vector or a tile
EVEN = {"experts": 8, "model": 64, "width": 128}


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def experts_of(rng, sizes, layers, dtype):
    e, d, f = sizes["experts"], sizes["model"], sizes["width"]
    shapes = (layers, e, f, d), (layers, e, f, d), (layers, e, d, f)
    return tuple(normal(rng, *shape, dtype=dtype) * shape[-1] ** -0.5 for shape in shapes)


def test_there_is_native_code_where_there_is_a_compiler():
    assert native.available()


@pytest.mark.few(1)
@pytest.mark.parametrize("tokens", [1, 3, 29, 110])
@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_moe(tokens, sizes, dtype):
    """Every layer, with experts of other shards among those chosen; of few rows each, and of many."""
    rng = np.random.default_rng(tokens)
    gate, up, down = matrices = experts_of(rng, sizes, 2, dtype)
    e, k, offset = sizes["experts"], 3, 2
    x, shares = normal(rng, tokens, sizes["model"]), normal(rng, tokens, k)
    chosen = np.stack([rng.permutation(e + 2 * offset)[:k] for _ in range(tokens)]).astype(np.int32)
    scales = (None,) * 3
    for layer in (0, 1):
        args = x, matrices, scales, jnp.asarray(chosen), shares, jnp.int32(offset), jnp.int32(layer)
        found = jax.jit(functools.partial(ops.fused_moe, transpose_rhs=True))(*args)
        want = np.zeros((tokens, sizes["model"]))
        wide = [np.asarray(m[layer].astype(jnp.float32), np.float64) for m in (gate, up, down)]
        for t in range(tokens):
            for expert, share in zip(chosen[t] - offset, np.asarray(shares[t], np.float64)):
                if 0 <= expert < e:
                    row = np.asarray(x[t], np.float64)
                    g, u = wide[0][expert] @ row, wide[1][expert] @ row
                    want[t] += share * (wide[2][expert] @ (g / (1 + np.exp(-g)) * u))
        np.testing.assert_allclose(found, want, atol=2e-5)
        np.testing.assert_allclose(fused_moe_cpu.forward(*args, transpose_rhs=True), want, atol=2e-5)


@pytest.mark.few(8)
@pytest.mark.parametrize("rows", [1, 7, 100, 1500])
@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("swiglu", [False, True], ids=["matmul", "swiglu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped(rows, sizes, swiglu, dtype):
    """Groups without rows, with few and with many, rows before the first group and behind the last."""
    rng = np.random.default_rng(rows)
    gate, up, _ = experts_of(rng, sizes, 2, dtype)
    lhs, e = normal(rng, rows, sizes["model"]), sizes["experts"]
    first = rows // 5
    cuts = np.sort(rng.integers(0, rows - first + 1, e))
    counts = np.diff(np.concatenate([[0], cuts])).astype(np.int32)
    groups = jnp.asarray(counts), jnp.int32(first), jnp.int32(1)
    matrices = [gate, up] if swiglu else [gate]
    if swiglu:
        (found,) = ops.grouped_swiglu(lhs, matrices, [None, None], groups, transpose_rhs=True, keep_products=False)
    else:
        found = ops.grouped_matmul(lhs, gate, None, *groups, transpose_rhs=True, dtype=jnp.float32)
    want, at = np.zeros((rows, sizes["width"])), first
    for g, count in enumerate(counts):
        x = np.asarray(lhs[at : at + count], np.float64)
        products = [x @ np.asarray(m[1, g].astype(jnp.float32), np.float64).T for m in matrices]
        silu = lambda y: y / (1 + np.exp(-y))  # noqa: E731
        want[at : at + count] = silu(products[0]) * products[1] if swiglu else products[0]
        at += count
    np.testing.assert_allclose(found, want, atol=2e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "heads, kv_heads, dim, page", [(4, 2, 20, 3), (6, 1, 64, 16), (2, 2, 7, 5), (12, 4, 128, 8), (14, 1, 12, 6)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_paged_attention(heads, kv_heads, dim, page, dtype):
    """Rows that decode, verify drafts and read a prompt, beside one that waits and one that is not live; NaN around."""
    rng = np.random.default_rng(page)
    new, lengths = [1, 3, 40, 0, 2], [300, 11, 57, 5, 4]
    width = -(-max(lengths) // page)
    table = rng.permutation(len(new) * width).reshape(len(new), width).astype(np.int32)
    pages = np.full((2, table.size + 1, kv_heads, page, 2 * dim), np.nan, np.float32)
    for row, (count, length) in enumerate(zip(new, lengths)):
        for position in range(length - count):
            pages[1, table[row, position // page], :, position % page] = rng.normal(size=(kv_heads, 2 * dim))
    starts, total = jnp.int32(np.concatenate([[0], np.cumsum(new)])), sum(new) + 3
    q, k, v = (normal(rng, total, n, dim) for n in (heads, kv_heads, kv_heads))
    args = q, k, v, jnp.asarray(pages, dtype), jnp.asarray(table), jnp.int32(lengths), starts, 4
    run = lambda name: paged_attention(*args, layer=1, implementation=name)  # noqa: E731
    (out, stored), (want, want_stored) = run("native"), run("reference")
    np.testing.assert_allclose(out, want, atol=3e-6)
    np.testing.assert_array_equal(stored.astype(jnp.float32), want_stored.astype(jnp.float32))
    assert np.isfinite(out).all() and not np.asarray(out[starts[4] :]).any()


def test_pages_stay_in_their_place():
    """Donated pages are written where they are: a copy would cost as much as the whole cache at every layer."""
    pages = jnp.zeros((2, 4096, 1, 16, 128))
    one = jnp.ones((1, 1, 64))
    table = jnp.arange(8, dtype=jnp.int32)[None]

    def step(pages):
        def layer(i, pages):
            return paged_attention(one, one, one, pages, table, np.int32([9]), np.int32([0, 1]), 1, layer=i)[1]

        return jax.lax.fori_loop(0, 2, layer, pages)

    compiled = jax.jit(step, donate_argnums=0).lower(pages).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pages.nbytes and memory.temp_size_in_bytes < pages.nbytes // 100


def test_the_same_bits_every_time():
    """Threads share the work: which does what must not show."""
    rng = np.random.default_rng(0)
    matrices = experts_of(rng, EVEN | {"model": 256, "width": 320}, 1, "float32")
    x, shares = normal(rng, 9, 256), normal(rng, 9, 3)
    chosen = jnp.asarray(np.stack([rng.permutation(8)[:3] for _ in range(9)]), jnp.int32)
    run = jax.jit(
        lambda x: ops.fused_moe(x, matrices, (None,) * 3, chosen, shares, None, jnp.int32(0), transpose_rhs=True)
    )
    first = np.asarray(run(x))
    for _ in range(200):
        np.testing.assert_array_equal(run(x), first)


def test_what_native_code_does_not_do_is_left_to_xla():
    rng = np.random.default_rng(1)
    rhs, lhs = normal(rng, 2, 8, 6), normal(rng, 4, 8)  # [in, out]
    sizes = jnp.int32(np.array([3, 1]))
    with pytest.raises(NotImplementedError):
        grouped_matmul(lhs, rhs, sizes, implementation="native")
    want = np.concatenate([lhs[:3] @ rhs[0], lhs[3:] @ rhs[1]])
    np.testing.assert_allclose(grouped_matmul(lhs, rhs, sizes), want, atol=1e-5)


def test_other_platforms_never_meet_it():
    """A program for CUDA, Hopper or not, or for a TPU whose kernel cannot: what stands in is portable XLA."""
    rng = np.random.default_rng(2)
    matrices = experts_of(rng, ODD, 1, "float32")
    x, shares = normal(rng, 3, ODD["model"]), normal(rng, 3, 2)
    chosen = jnp.asarray([[0, 1], [2, 3], [4, 0]], jnp.int32)

    def step(x):
        return fused_moe(x, *(m[0] for m in matrices), chosen, shares, transpose_rhs=True)

    texts = {p: jax.jit(step).trace(x).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "rocm")}
    assert "glm45_fused_moe" in texts["cpu"]
    assert not any("glm45" in texts[platform] for platform in ("cuda", "rocm"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"GLM45_NATIVE": "0"}, {"CXX": "/bin/false"}], ids=["turned off", "no compiler"]
)
def test_without_a_compiler_all_works(environment, tmp_path):
    program = (
        "import numpy as np, jax.numpy as jnp; from pallas_kernels import fused_moe, native;"
        "w = jnp.ones((2, 3, 3)); x = jnp.ones((1, 3));"
        "out = fused_moe(x, w, w, w, np.int32([[1]]), jnp.ones((1, 1)), transpose_rhs=True,"
        "                implementation=('native', 'cpu'));"
        "print(native.available(), float(out[0, 0]))"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    works, value = done.stdout.split()
    assert works == "False" and abs(float(value) - 27 / (1 + np.exp(-3))) < 1e-4
