"""The operations inside a layer, where the oracles are too small or too exact to see them: bfloat16, long sequences."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.model import layers
from glm45_jax.model.layers import InStack, matmul_t, rms_norm, rotary_tables, rotate, swiglu
from pallas_kernels import native
from tests.support import random_params, small_config


def test_rms_norm_multiplies_after_the_cast() -> None:
    """As the published model does: scale * bfloat16(x / rms), not bfloat16(scale * x / rms)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 32)).astype(ml_dtypes.bfloat16)
    scale = (1 + 0.2 * rng.standard_normal(32)).astype(ml_dtypes.bfloat16)
    x32 = x.astype(np.float32)
    normed = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-5)
    ours = np.asarray(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5))
    assert ours.dtype == ml_dtypes.bfloat16
    after = scale * normed.astype(ml_dtypes.bfloat16)
    before = (scale.astype(np.float32) * normed).astype(ml_dtypes.bfloat16)
    assert (ours == after).mean() > 0.99 and (ours == before).mean() < 0.9


@pytest.mark.few(1)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("outputs", [513, 20000])
@pytest.mark.parametrize("shape", [(1, 1, 512), (4, 3, 512), (49, 512)])
def test_few_rows_times_a_large_weight(
    shape: tuple[int, ...], outputs: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way through `matmul_t`, with gradients, against float64; without a C++ compiler too."""
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    rng = np.random.default_rng(0)
    shapes = (shape, (outputs, 512), (*shape[:-1], outputs))
    x, weight, target = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    assert weight.size >= layers._LARGE_WEIGHT and (outputs > layers._MOST_LAYER_OUTPUTS) == (outputs == 20000)
    exact = [a.astype(np.float64) for a in (x, weight, target)]
    y, back = jax.vjp(matmul_t, jnp.asarray(x), jnp.asarray(weight))
    np.testing.assert_allclose(y, exact[0] @ exact[1].T, atol=1e-3)
    slopes = back(jnp.asarray(target))
    np.testing.assert_allclose(slopes[0], exact[2] @ exact[1], atol=1e-2)
    np.testing.assert_allclose(slopes[1], exact[2].reshape(-1, outputs).T @ exact[0].reshape(-1, 512), atol=1e-3)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (x, weight)]
    stack = jnp.stack([jnp.zeros_like(weight), jnp.asarray(weight)])
    np.testing.assert_array_equal(jax.jit(matmul_t)(x, InStack(stack, jnp.int32(1))), jax.jit(matmul_t)(x, weight))
    assert matmul_t(*half).dtype == jnp.bfloat16 and matmul_t(*half, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_an_mlp_in_its_stack(rows: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of native code, or products one by one: silu(gate x) * up x, through down, in float64."""
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    rng, (d, f) = np.random.default_rng(0), (96, 130)
    x = rng.standard_normal((rows, 1, d)).astype(np.float32)
    stacks = [rng.standard_normal((3, *shape)).astype(np.float32) for shape in ((f, d), (f, d), (d, f))]

    @jax.jit
    def run(x, stacks, layer):
        names = ("gate", "up", "down")
        weights = [SimpleNamespace(get_value=functools.partial(InStack, s, layer)) for s in stacks]
        return swiglu(x, SimpleNamespace(**{n: SimpleNamespace(weight=w) for n, w in zip(names, weights)}))

    gate, up, down = (s[2].astype(np.float64) for s in stacks)
    g = x.astype(np.float64) @ gate.T
    expected = (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(run(x, stacks, 2), expected, rtol=1e-5, atol=1e-3)


def test_rotation_pairs_the_halves_of_the_first_dimensions() -> None:
    config = small_config(head_dim=16, partial_rotary_factor=0.5, rope_theta=1e4)
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 16)).astype(np.float32)
    positions = np.array([[0, 5, 100]])
    out = np.asarray(rotate(jnp.asarray(x), *rotary_tables(config, jnp.asarray(positions))))
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(out[:, :, 0], x[:, :, 0])
    for i in range(4):  # pair i is dimensions i and i + 4, turned by position * theta^(-2i/8)
        angle = positions[0] * 1e4 ** (-2 * i / 8)
        pair = (x[0, :, :, i] + 1j * x[0, :, :, i + 4]) * np.exp(1j * angle)
        np.testing.assert_allclose(out[0, :, :, i] + 1j * out[0, :, :, i + 4], pair, atol=1e-5)


def test_angles_stay_float32_under_bfloat16() -> None:
    """Position 1001 in bfloat16 would be 1000: an angle wrong by a radian."""
    tables = [rotary_tables(small_config(dtype=dtype), jnp.array([[1001, 4097]])) for dtype in ("float32", "bfloat16")]
    for exact, rounded in zip(*tables):
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(rounded, np.float32), exact, atol=4e-3)


@pytest.mark.slow
def test_a_decode_step_on_a_cpu_reads_matrices_where_they_lie() -> None:
    """Cut out of its stack, each would be copied at every step; experts', and those of attention and of the MLPs."""
    if not native.available():
        pytest.skip("no C++ compiler on this machine")
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 320, "moe_intermediate_size": 384}
    config = small_config(**sizes, first_k_dense_replace=2, num_hidden_layers=4)
    params, cache = random_params(config), glm.init_cache(config, 2, 8)
    step = jax.jit(lambda p, c, t: glm.decode_step(p, config, c, t)).lower(params, cache, np.zeros(2, np.int32))
    text = step.compile().as_text()
    calls = {name: text.count(f'custom_call_target="glm45_{name}"') for name in ("grouped", "fused_moe")}
    assert calls["grouped"] >= 4 and calls["fused_moe"] == 3  # dense MLP, shared expert, routed ones
    shapes = {x.shape[1:] for kind in ("dense_layers", "moe_layers") for x in jax.tree.leaves(params[kind])}
    large = {shape for shape in shapes if np.prod(shape) >= layers._LARGE_WEIGHT}
    assert len(large) >= 5
    for shape in large:
        assert f"f32[1,{','.join(map(str, shape))}]" not in text, f"a matrix of {shape} was cut out"
