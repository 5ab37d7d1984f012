"""Every implementation of fused_moe against float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_moe
from pallas_kernels.analysis import count_traffic
from pallas_kernels.chip import named_chip
from tests.pallas_kernels.support import WITH_NATIVE, on, quantise
from tests.support import quick_jit

D, F, E, L = 12, 7, 9, 3


def _weights():
    rng = np.random.default_rng(0)
    return rng.normal(size=(L, E, D, F)), rng.normal(size=(L, E, D, F)), rng.normal(size=(L, E, F, D))


def _expected(x, gate, up, down, indices, weights):
    out = np.zeros_like(x)
    for t, (chosen, share) in enumerate(zip(indices, weights)):
        for e, w in zip(chosen, share):
            g = x[t] @ gate[e]
            out[t] += w * ((g / (1 + np.exp(-g)) * (x[t] @ up[e])) @ down[e])
    return out


@pytest.mark.few(12)
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("transpose", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("spread", ["random", "all on the same", "few experts"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_against_float64(tokens: int, spread: str, transpose: bool, implementation: str) -> None:
    rng = np.random.default_rng(tokens)
    pool = {"random": range(E), "all on the same": [2, 5], "few experts": [0, 3, 8]}[spread]
    indices = np.stack([rng.permutation(pool)[:2] for _ in range(tokens)]).astype(np.int32)
    weights, x = rng.random((tokens, 2)), rng.normal(size=(tokens, D))
    stacks = _weights()
    expected = _expected(x, *(s[1] for s in stacks), indices, weights)
    given = [jnp.asarray(np.swapaxes(s, 2, 3) if transpose else s, jnp.float32) for s in stacks]
    call = quick_jit(functools.partial(fused_moe, transpose_rhs=transpose, implementation=implementation))
    args = (jnp.asarray(x, jnp.float32), *given, jnp.asarray(indices), jnp.asarray(weights, jnp.float32))
    with on(implementation):
        out = call(*args, layer=jnp.int32(1))
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("transpose", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("per", ["channel", "block"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_experts_of_one_shard(dtype: str, per: str, transpose: bool, implementation: str) -> None:
    rng = np.random.default_rng(0)
    sizes = (3, 256, 384), (3, 256, 384), (3, 384, 256)
    quantised = [quantise(rng.normal(size=size), dtype, per) for size in sizes]
    indices = np.stack([rng.permutation(6)[:2] for _ in range(19)]).astype(np.int32)
    weights, x = rng.random((19, 2)), rng.normal(size=(19, 256))
    inside = (indices >= 2) & (indices < 5)
    expected = _expected(x, *(q[2] for q in quantised), np.where(inside, indices - 2, 0), weights * inside)
    values = [jnp.swapaxes(q[0], 1, 2) if transpose else q[0] for q in quantised]
    scales = dict(zip(("gate_scale", "up_scale", "down_scale"), (q[1] for q in quantised)))
    call = quick_jit(functools.partial(fused_moe, transpose_rhs=transpose, implementation=implementation))
    args = (jnp.asarray(x, jnp.float32), *values, jnp.asarray(indices), jnp.asarray(weights, jnp.float32))
    with on(implementation):
        out = call(*args, **scales, expert_offset=jnp.int32(2))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("implementation", WITH_NATIVE)
def test_gradients_are_those_of_the_sorted_form(implementation: str) -> None:
    rng = np.random.default_rng(1)
    indices = jnp.asarray(np.stack([rng.permutation(E)[:2] for _ in range(7)]), jnp.int32)
    args = [
        jnp.asarray(a, jnp.float32) for a in (rng.normal(size=(7, D)), *(w[0] for w in _weights()), rng.random((7, 2)))
    ]

    def loss(x, gate, up, down, weights, implementation):
        out = fused_moe(x, gate, up, down, indices, weights, implementation=implementation)
        return jnp.sum(jnp.sin(out))

    def plain(x, gate, up, down, weights):
        g, u = jnp.einsum("td,tkdf->tkf", x, gate[indices]), jnp.einsum("td,tkdf->tkf", x, up[indices])
        return jnp.sum(jnp.sin(jnp.einsum("tkf,tkfd,tk->td", jax.nn.silu(g) * u, down[indices], weights)))

    every = tuple(range(5))
    with on(implementation):
        found = quick_jit(jax.grad(functools.partial(loss, implementation=implementation), every))(*args)
    for a, b in zip(found, quick_jit(jax.grad(plain, every))(*args)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_blocks_and_cores_of_the_tpu_kernel(tokens: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of every matrix, one of them past its end, and experts dealt to two cores, some with none."""
    from pallas_kernels.fused_moe import tpu
    from pallas_kernels.fused_moe.tiling import Tiling

    two = dataclasses.replace(named_chip("v5p"), cores=cores)
    monkeypatch.setattr(tpu, "tpu_to_tile_for", lambda _: two)
    monkeypatch.setattr(tpu, "tile", lambda shape, chip: Tiling(min(16, shape.padded), 128, 128))
    rng = np.random.default_rng(tokens)
    gate, up, down = rng.normal(size=(5, 256, 176)), rng.normal(size=(5, 256, 176)), rng.normal(size=(5, 176, 256))
    indices = np.stack([rng.permutation(5)[:1] for _ in range(tokens)]).astype(np.int32)
    weights, x = rng.random((tokens, 1)), rng.normal(size=(tokens, 256))
    args = (jnp.asarray(a, jnp.float32) for a in (x, gate, up, down))
    with on("tpu"):
        out = quick_jit(functools.partial(fused_moe, implementation="tpu"))(
            *args, jnp.asarray(indices), jnp.asarray(weights, jnp.float32)
        )
    expected = _expected(x, gate, up, down, indices, weights)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.few(2)
@pytest.mark.parametrize("implementation", WITH_NATIVE)
@pytest.mark.parametrize("what", ["token", "weight"])
def test_what_is_not_finite_spoils_its_own_row_alone(what: str, implementation: str) -> None:
    """Slots of a batch that are not in use may hold anything."""
    gate, up, down = (jnp.asarray(w[0], jnp.float32) for w in _weights())
    x, weights = jnp.ones((6, D)), jnp.ones((6, 2))
    x, weights = (x.at[2, 3].set(jnp.nan), weights) if what == "token" else (x, weights.at[2, 1].set(jnp.nan))
    # the token after it chose experts of other shards alone
    indices = jnp.array([[1, 4]] * 6).at[3].set(jnp.array([E, E + 1]))
    x = x.at[3].set(jnp.inf)
    op = functools.partial(fused_moe, expert_offset=0, implementation=implementation)
    with on(implementation):
        out = np.asarray(quick_jit(op)(x, gate, up, down, indices, weights))
    assert np.isnan(out[2]).all() and (out[3] == 0).all()
    others = np.delete(out, [2, 3], axis=0)
    assert np.isfinite(others).all() and (others == others[0]).all() and others.any()


@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_a_core_without_experts_fetches_none(num_experts: int) -> None:
    """A v5p's two cores take turns; bytes are counted by walking the index maps."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    indices = np.arange(num_experts, dtype=np.int32)[None]
    args = shape(1, 4096), *[shape(16, 4096, 1408)] * 2, shape(16, 1408, 4096), indices
    call = functools.partial(fused_moe, implementation="tpu", chip="v5p")
    traffic = count_traffic(call, *args, jax.ShapeDtypeStruct(indices.shape, jnp.float32))
    (kernel,) = traffic.kernels
    block = 3 * 4096 * 1408 * 2
    assert num_experts * block <= kernel.read_bytes <= (num_experts + 0.15 + (num_experts == 1)) * block


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 6])
def test_reads_only_the_chosen_experts(tokens: int) -> None:
    """The weights of experts nobody chose are NaN: reading them would show."""
    gate, up, down = (jnp.asarray(w[0], jnp.float32) for w in _weights())
    chosen = jnp.array([[1, 4]] * tokens)
    unused = jnp.ones(E, bool).at[chosen[0]].set(False)[:, None, None]
    poisoned = [jnp.where(unused, jnp.nan, w) for w in (gate, up, down)]
    out = fused_moe(jnp.ones((tokens, D)), *poisoned, chosen, jnp.ones((tokens, 2)), implementation="cpu")
    assert jnp.isfinite(out).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    gate, up, down = (jnp.asarray(w[0], jnp.float32) for w in _weights())
    with pytest.raises(ValueError, match="don't fit"):
        fused_moe(jnp.ones((1, D)), gate, up, gate, jnp.zeros((1, 2), int), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="tokens"):
        fused_moe(jnp.ones((2, D)), gate, up, down, jnp.zeros((1, 2), int), jnp.ones((1, 2)))
