"""Serving with quantised weights and a quantised cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.errors import UserError
from glm45_jax.infer import Engine, EngineOptions, generate_detailed
from glm45_jax.infer.calibrate import cache_scales
from glm45_jax.model import Ragged, init_pages, paged_step, quantize_params
from glm45_jax.model.paged import QuantizedPages
from tests.support import quick_jit, random_params, random_tokens, small_config

CONFIG = small_config(
    num_hidden_layers=2, num_nextn_predict_layers=1, eos_token_id=(94, 95), max_position_embeddings=64
)
OPTIONS = EngineOptions(slots=2, cache_tokens=256, page_size=16, step_tokens=16, warm_up=False)
PROMPTS = [random_tokens(CONFIG, n, seed=n).tolist() for n in (7, 19, 3)]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def answers(params, count: int = 10, **changes):
    with Engine(params, CONFIG, options=dataclasses.replace(OPTIONS, **changes)) as engine:
        found = engine.generate_batch(PROMPTS, count, stop_ids=())
        assert engine.stats()["pages_in_use"] == 0
        return found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "fp8-block"])
def test_quantised_weights_answer_as_generate_does(params, form):
    quantised = quantize_params(params, CONFIG, form, head=True)
    wanted = generate_detailed(quantised, CONFIG, PROMPTS, 10, stop_ids=())
    for found, one in zip(answers(quantised), wanted):
        assert found.answer == one.answer
        np.testing.assert_allclose(found.logprobs, one.logprobs, atol=1e-4)


def one_step(params, pages, tokens):
    """The logits after every token of a prompt."""
    starts, lengths = jnp.array([0, tokens.size]), jnp.array([tokens.size])
    batch = Ragged(tokens, starts, lengths, jnp.zeros((1, 1), jnp.int32), jnp.int32(1))
    return quick_jit(lambda p, pages: paged_step(p, CONFIG, pages, batch, jnp.arange(tokens.size)))(params, pages)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.1), pytest.param("fp8", 0.2, marks=pytest.mark.slow)])
def test_a_quantised_cache_is_off_by_its_steps_alone(params, dtype, most):
    tokens = random_tokens(CONFIG, 24, seed=4)
    scales = cache_scales(params, CONFIG, dtype, [tokens.tolist()])
    name = {"fp8": "float8_e4m3fn"}.get(dtype, dtype)
    pages = init_pages(CONFIG, 1, 32, name, scales)
    assert isinstance(pages, QuantizedPages) and pages.values.dtype == name
    found, exact = one_step(params, pages, tokens), one_step(params, init_pages(CONFIG, 1, 32), tokens)
    assert found.pages.values.nbytes * 4 == exact.pages.nbytes
    head = CONFIG.head_dim
    of_each = jnp.repeat(found.pages.scales.swapaxes(1, 2)[:, None, :, None], head, -1).reshape(3, 1, -1, 1, 2 * head)
    stored = found.pages.values.astype(jnp.float32) * of_each
    # the first layer's keys and values come from the same hidden states: half a step, or half of e4m3's last bit
    step = of_each[0] / 2 if dtype == "int8" else jnp.maximum(jnp.abs(exact.pages[0]) / 16, of_each[0] / 1024)
    assert (jnp.abs(stored[0] - exact.pages[0]) <= step * 1.001)[:, :, :24].all()
    assert not np.asarray(found.pages.values[2], np.float32).any()  # the MTP layer's, which has read nothing
    error = np.abs(found.logits - exact.logits).mean() / np.abs(exact.logits).mean()
    assert 0 < error < most


@pytest.mark.slow
def test_scales_leave_room_above_what_was_seen(params):
    tokens = random_tokens(CONFIG, 20, seed=5)
    exact = one_step(params, init_pages(CONFIG, 1, 32), tokens).pages[:2].reshape(2, 1, -1, 32, 2, CONFIG.head_dim)
    largest = np.abs(exact).max((1, 3, 5)).swapaxes(1, 2)
    for dtype, margin, most in (("int8", 1.25, 127), ("fp8", 4, 448)):
        scales = cache_scales(params, CONFIG, dtype, [tokens.tolist()])
        assert scales.shape == (3, 2, CONFIG.num_key_value_heads)
        np.testing.assert_allclose(scales[:2] * most / margin, largest, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_serving_over_a_quantised_cache(params, dtype):
    """Near to the float cache, and the same with drafts as without, whose pages are quantised too."""
    exact, found = answers(params), answers(params, cache_dtype=dtype)
    for a, b in zip(found, exact):
        assert abs(a.logprobs[0] - b.logprobs[0]) < 0.1
    drafted = answers(params, cache_dtype=dtype, drafts=2, step_tokens=32)
    for a, b in zip(drafted, found):
        assert a.answer == b.answer
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.slow
def test_other_weights_bring_their_own_scales(params):
    other = jax.tree.map(lambda x: x * 3, random_params(CONFIG, seed=8))
    with Engine(params, CONFIG, options=dataclasses.replace(OPTIONS, cache_dtype="int8")) as engine:
        before = engine._programs._pages.scales
        assert engine.options.page_size == 32
        engine.update_params(other)
        found = engine.generate_batch(PROMPTS, 6, stop_ids=())
        assert not np.allclose(before, engine._programs._pages.scales)
    with Engine(other, CONFIG, options=dataclasses.replace(OPTIONS, cache_dtype="int8")) as engine:
        assert [f.answer for f in engine.generate_batch(PROMPTS, 6, stop_ids=())] == [f.answer for f in found]


def test_refused(params):
    with pytest.raises(UserError, match="cache_dtype 'int4'"):
        Engine(params, CONFIG, options=dataclasses.replace(OPTIONS, cache_dtype="int4"))
    with pytest.raises(UserError, match="with scales None"):
        init_pages(CONFIG, 1, 32, "int8")
    with pytest.raises(UserError, match=r"with scales \(3, 2, 2\)"):
        init_pages(CONFIG, 1, 32, "float32", jnp.ones((3, 2, 2)))
