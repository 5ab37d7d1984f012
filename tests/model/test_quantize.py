"""Quantised weights: what they stand for, and the model that multiplies by them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.errors import UserError
from glm45_jax.model import Quantized, quantize_params
from glm45_jax.model.quantize import FORMS, quantize
from glm45_jax.model.quantized import is_quantized
from tests.support import quick_jit, random_params, random_tokens, small_config

CONFIG = small_config(
    num_nextn_predict_layers=1, mtp_own_head=True, hidden_size=160, intermediate_size=136, moe_intermediate_size=24
)


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CONFIG)


def dequantized(params: Any) -> Any:
    whole = lambda x: x.dequantized(jnp.float32) if is_quantized(x) else x  # noqa: E731
    return jax.tree.map(whole, params, is_leaf=is_quantized)


@pytest.mark.few(2)
@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_is_its_codes_times_scales_as_near_as_codes_are(form):
    matrix = jax.random.normal(jax.random.key(0), (2, 130, 200)) * jnp.linspace(0.01, 10, 130)[:, None]
    found = quantize(matrix, form)
    assert found.values.dtype == (jnp.int8 if "int8" in form else jnp.float8_e4m3fn)
    assert found.scales.shape == ((2, 2, 2) if "block" in form else (2, 1, 130))
    value = np.asarray(found.dequantized(jnp.float32))
    steps = np.repeat(np.repeat(found.scales, 128, 1), 128, 2)[:, :200, :130] if "block" in form else found.scales
    steps = np.swapaxes(np.broadcast_to(steps, (2, 200, 130)), 1, 2)
    # half a step of integers; of e4m3 half a step of three bits, or of the least ones
    bound = 0.5 * steps if "int8" in form else np.maximum(np.abs(matrix) / 16, steps * 2.0**-10)
    assert (np.abs(value - matrix) <= bound * (1 + 1e-5)).all()
    assert np.abs(np.asarray(found.values, np.float32)).max() == (127 if "int8" in form else 448)


def test_channels_of_zeros_are_zeros():
    found = quantize(jnp.zeros((3, 5)), "fp8")
    assert not np.asarray(found.dequantized(jnp.float32)).any()


@pytest.mark.slow
def test_what_is_quantised(params):
    flat = jax.tree_util.tree_flatten_with_path(quantize_params(params, CONFIG, "int8"), is_leaf=is_quantized)[0]
    names = {".".join(k.key for k in path): leaf for path, leaf in flat}
    quantised = {name for name, leaf in names.items() if is_quantized(leaf)}
    inside = {"attention.q.weight", "attention.k.weight", "attention.v.weight", "attention.o.weight"}
    moe = {f"moe.experts.{m}" for m in ("gate", "up", "down")} | {
        f"moe.shared.{m}.weight" for m in ("gate", "up", "down")
    }
    dense = {f"mlp.{m}.weight" for m in ("gate", "up", "down")}
    expected = {f"dense_layers.{n}" for n in inside | dense}
    expected |= {f"{kind}.{n}" for kind in ("moe_layers", "mtp.block") for n in inside | moe}
    assert quantised == expected
    heads = quantize_params(params, CONFIG, "int8", head=True)
    assert is_quantized(heads["head"]["weight"]) and is_quantized(heads["mtp"]["head"]["weight"])
    assert not is_quantized(heads["embed"]["weight"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS if f != "fp8")])
def test_the_model_computes_with_what_they_stand_for(params, form):
    """Also where the router, which is not quantised, sees other hidden states: the same weights give the same."""
    quantised = quantize_params(params, CONFIG, form, head=True)
    tokens = random_tokens(CONFIG, 2, 9)
    run = quick_jit(lambda p, t: (glm.forward(p, CONFIG, t).logits, glm.mtp_forward(p, CONFIG, t).logits))
    for found, expected in zip(run(quantised, tokens), run(dequantized(quantised), tokens)):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", pytest.param("fp8-block", marks=pytest.mark.slow)])
def test_decoding_is_the_forward_pass(params, form):
    quantised = quantize_params(params, CONFIG, form)
    tokens = random_tokens(CONFIG, 2, 7)
    expected = quick_jit(lambda p, t: glm.forward(p, CONFIG, t).logits)(quantised, tokens)
    cache = glm.init_cache(CONFIG, 2, 8)
    logits, cache = quick_jit(lambda p, c, t: glm.prefill(p, CONFIG, c, t))(quantised, cache, tokens[:, :6])
    np.testing.assert_allclose(logits, expected[:, 5], rtol=2e-4, atol=2e-4)
    logits, _ = quick_jit(lambda p, c, t: glm.decode_step(p, CONFIG, c, t))(quantised, cache, tokens[:, 6])
    np.testing.assert_allclose(logits, expected[:, 6], rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_stored_bytes(params):
    quantised = quantize_params(params, CONFIG, "int8")
    experts = quantised["moe_layers"]["moe"]["experts"]["gate"]
    assert (
        isinstance(experts, Quantized) and experts.values.nbytes == params["moe_layers"]["moe"]["experts"]["gate"].size
    )
    assert experts.scales.shape == (2, CONFIG.n_routed_experts, 1, 24)


def test_refused(params):
    with pytest.raises(UserError, match=r"int4.*choose one of int8"):
        quantize_params(params, CONFIG, "int4")  # pyright: ignore
    quantised = quantize_params(params, CONFIG, "int8")
    with pytest.raises(UserError, match="quantised already"):
        quantize_params(quantised, CONFIG, "fp8")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_training_is_refused(params, form):
    from glm45_jax.train import TrainConfig, loss_fn
    from glm45_jax.train.step import init_state

    quantised = quantize_params(params, CONFIG, form)
    tokens = random_tokens(CONFIG, 1, 8)
    with pytest.raises(UserError, match="quantised"):
        loss_fn(quantised, CONFIG, {"tokens": tokens})
    with pytest.raises(UserError, match="quantised"):
        init_state(TrainConfig(model=CONFIG, steps=1, seq_len=8, batch_size=1), quantised)


@pytest.mark.slow
def test_bfloat16_loses_no_more_than_rounding(params):
    config = CONFIG.replace(dtype="bfloat16", param_dtype="bfloat16")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    quantised = quantize_params(half, config, "int8")
    tokens = random_tokens(CONFIG, 2, 6)
    found = quick_jit(lambda p, t: glm.forward(p, config, t).logits)(quantised, tokens)
    expected = quick_jit(lambda p, t: glm.forward(p, CONFIG, t).logits)(dequantized(quantised), tokens)
    assert np.abs(found - expected).mean() < 0.1 * np.abs(expected).mean()
    assert dataclasses.is_dataclass(quantised["moe_layers"]["attention"]["q"]["weight"])
