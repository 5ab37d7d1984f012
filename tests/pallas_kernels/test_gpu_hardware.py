"""The Mosaic GPU kernels on a Hopper GPU at the widths of GLM-4.5 and Air, with rows as uneven as routing makes them.

Every call is repeated, and must give the same bits: what a missing wait would show, since no kernel adds in an order
of its own. The comparisons are made on the GPU, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention, fused_moe, grouped_matmul, grouped_swiglu, linear_cross_entropy
from tests.pallas_kernels.hopper import HOPPER_AT_HAND

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HOPPER_AT_HAND, reason="needs an H100 (docs/kernels/gpu.md)"),
]
BF16 = jnp.bfloat16
TRUTH = "cpu"  # portable XLA, in float32: by blocks, where the reference would fill the GPU's memory
REPEATS = 10
WIDTHS = {"air": (4096, 1408), "glm-4.5": (5120, 1536)}


def _normal(seed: int, *shape: int, scale: float = 1.0, dtype: Any = BF16) -> jax.Array:
    return jax.jit(lambda: (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype))()


def _uneven(groups: int, rows: int, seed: int) -> jax.Array:
    """Group sizes that a routing could give, some of them empty."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.multinomial(rows, rng.dirichlet([0.5] * groups)), jnp.int32)


def _float32(*arrays: jax.Array) -> list[jax.Array]:
    return [x.astype(jnp.float32) for x in arrays]


def _same_bits_each_time(f: Callable[..., Any], *arguments: Any) -> Any:
    f = jax.jit(f)
    first = f(*arguments)
    equal = jax.jit(lambda a, b: jnp.stack([jnp.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)))]))
    again = [equal(first, f(*arguments)) for _ in range(REPEATS)]
    assert np.all(again), np.asarray(again)
    return first


@jax.jit
def _errors(found: jax.Array, right: jax.Array, of_each: float) -> tuple[jax.Array, jax.Array]:
    """How far any is off beyond `of_each` of what is right, as a share of the largest; whether all are finite."""
    found, right = found.astype(jnp.float32), right.astype(jnp.float32)
    beyond = jnp.abs(found - right) - of_each * jnp.abs(right)
    return jnp.max(beyond) / jnp.max(jnp.abs(right)), jnp.isfinite(found).all() & (jnp.abs(right).max() > 0)


def _assert_close(found: Any, expected: Any, of_largest: float, of_each: float = 2**-8) -> None:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    errors = [tuple(map(float, _errors(*pair, of_each))) for pair in pairs]
    assert all(finite and beyond <= of_largest for beyond, finite in errors), (errors, of_largest)


@pytest.mark.parametrize("layout", ["KN", "NK"])
@pytest.mark.parametrize(("model", "groups"), [("air", 16), ("glm-4.5", 16), ("glm-4.5", 160)])
def test_grouped_matmul(model: str, groups: int, layout: str) -> None:
    (k, n), transpose = WIDTHS[model], layout == "NK"
    rows = 8192 if groups == 16 else 1003
    sizes = _uneven(groups, rows - 3, seed=groups)
    lhs, dout = _normal(0, rows, k), _normal(1, rows, n)
    rhs = _normal(2, groups, *((n, k) if transpose else (k, n)))

    def with_gradients(lhs, rhs, dout, implementation):
        f = lambda *x: grouped_matmul(*x, sizes, transpose_rhs=transpose, implementation=implementation)  # noqa: E731
        out, pull = jax.vjp(f, lhs, rhs)
        return out, *pull(dout)

    found = _same_bits_each_time(lambda *x: with_gradients(*x, "gpu"), lhs, rhs, dout)
    expected = jax.jit(lambda *x: with_gradients(*x, TRUTH))(*_float32(lhs, rhs, dout))
    _assert_close(found, expected, of_largest=1e-5)


@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("model", WIDTHS)
def test_grouped_swiglu(model: str, keep_products: bool) -> None:
    k, f = WIDTHS[model]
    sizes, rows = _uneven(16, 4000, seed=3), 4099
    lhs, dout = _normal(0, rows, k), _normal(1, rows, f)
    gate, up = (_normal(seed, 16, f, k, scale=k**-0.5) for seed in (2, 3))

    def with_gradients(lhs, gate, up, dout, implementation):
        options = {"transpose_rhs": True, "keep_products": keep_products, "implementation": implementation}
        out, pull = jax.vjp(lambda *x: grouped_swiglu(*x, sizes, **options), lhs, gate, up)
        return out, *pull(dout)

    found = _same_bits_each_time(lambda *x: with_gradients(*x, "gpu"), lhs, gate, up, dout)
    expected = jax.jit(lambda *x: with_gradients(*x, TRUTH))(*_float32(lhs, gate, up, dout))
    _assert_close(found, expected, of_largest=2**-8)  # the products' gradients are rounded before they are multiplied


@pytest.mark.parametrize("tokens", [1, 8, 64, 256])
@pytest.mark.parametrize("model", WIDTHS)
def test_fused_moe(model: str, tokens: int) -> None:
    d, f = WIDTHS[model]
    x = _normal(0, tokens, d)
    gate, up, down = (_normal(i, 2, 32, *s, scale=d**-0.5) for i, s in ((1, (f, d)), (2, (f, d)), (3, (d, f))))
    rng = np.random.default_rng(0)
    indices = jnp.asarray(np.stack([rng.permutation(40)[:8] for _ in range(tokens)]), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(tokens, 8)), jnp.float32)

    def routed(x, gate, up, down, implementation):
        options = {"expert_offset": 5, "layer": 1, "transpose_rhs": True, "implementation": implementation}
        return fused_moe(x, gate, up, down, indices, weights, **options)

    found = _same_bits_each_time(lambda *a: routed(*a, "gpu"), x, gate, up, down)
    expected = jax.jit(lambda *a: routed(*a, TRUTH))(*_float32(x, gate, up, down))
    _assert_close(found, expected, of_largest=2**-8)


@pytest.mark.parametrize("case", ["packed", "long", "not causal", "a chunk late"])
def test_flash_attention(case: str) -> None:
    heads, kv_heads, queries, keys = {
        "packed": (24, 2, 4096, 4096),
        "long": (4, 1, 16384, 16384),
        "not causal": (12, 1, 2000, 3001),
        "a chunk late": (12, 1, 777, 8192),
    }[case]
    shapes = (1, queries, heads, 128), (1, keys, kv_heads, 128)
    q, k, v, dout = (_normal(i, *shape) for i, shape in enumerate((shapes[0], shapes[1], shapes[1], shapes[0])))
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 6, (1, queries))), jnp.int32)
    options: dict[str, Any] = {"return_lse": True, "causal": case != "not causal", "q_offset": keys - queries}
    if case == "packed":
        options["segment_ids"] = options["kv_segment_ids"] = ids

    def with_gradients(q, k, v, dout, implementation):
        f = lambda *x: flash_attention(*x, implementation=implementation, **options)  # noqa: E731
        (out, lse), pull = jax.vjp(f, q, k, v)
        return (out, lse), pull((dout, jnp.ones_like(lse)))

    found = _same_bits_each_time(lambda *x: with_gradients(*x, "gpu"), q, k, v, dout)
    expected = jax.jit(lambda *x: with_gradients(*x, TRUTH))(*_float32(q, k, v, dout))
    _assert_close(found[0], expected[0], of_largest=2**-8)
    _assert_close(found[1], expected[1], of_largest=2**-7)


def test_linear_cross_entropy() -> None:
    tokens, model, vocabulary = 1111, 4096, 151552
    hidden, head = _normal(0, tokens, model), _normal(1, vocabulary, model, scale=3 * model**-0.5)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 151365, tokens), jnp.int32).at[:9].set(-1)

    def with_gradients(hidden, head, implementation):
        options = {"valid_vocab": 151365, "return_entropy": True, "temperature": 0.7, "transpose_head": True}
        f = lambda *x: linear_cross_entropy(*x, targets, implementation=implementation, **options)  # noqa: E731
        out, pull = jax.vjp(f, hidden, head)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    found = _same_bits_each_time(lambda *x: with_gradients(*x, "gpu"), hidden, head)
    expected = jax.jit(lambda *x: with_gradients(*x, TRUTH))(*_float32(hidden, head))
    _assert_close(found[0], expected[0], of_largest=1e-5, of_each=1e-5)
    _assert_close(found[1], expected[1], of_largest=2**-7)
