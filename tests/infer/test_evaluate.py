"""Perplexity in windows, and what quantised weights lose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.errors import UserError
from glm45_jax.infer import compare, perplexity
from glm45_jax.model import quantize_params
from tests.support import FIXTURES, load_oracle, quick_jit, random_params, random_tokens, small_config

CONFIG = small_config()


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


_logits = quick_jit(lambda params, ids: glm.forward(params, CONFIG, ids).logits)


def nll_of(params, ids, seen: int = 1) -> float:
    """Of the tokens from number `seen` on, the plain way."""
    padded = jnp.zeros((1, 16), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    logp = jax.nn.log_softmax(_logits(params, padded)[0, : len(ids) - 1])
    return float(-jnp.take_along_axis(logp, padded[0, 1 : len(ids), None], 1)[seen - 1 :].sum())


def test_one_window_is_the_mean_of_all_tokens(params):
    ids = random_tokens(CONFIG, 13).tolist()
    found = perplexity(params, CONFIG, ids)
    assert found.tokens == 12
    np.testing.assert_allclose(found.nll, nll_of(params, ids) / 12, rtol=1e-5)
    np.testing.assert_allclose(found.perplexity, np.exp(found.nll), rtol=1e-6)


@pytest.mark.slow
def test_windows_score_each_token_once_with_context(params):
    ids = random_tokens(CONFIG, 21, seed=1).tolist()
    found = perplexity(params, CONFIG, ids, window=8, context=3, batch_size=2)
    # 0-8, 5-13, 10-18, 15-21: each but the first sees three tokens that were scored before
    expected = nll_of(params, ids[:8]) + sum(nll_of(params, ids[at : at + 8], 3) for at in (5, 10, 15))
    assert found.tokens == 20
    np.testing.assert_allclose(found.nll, expected / 20, rtol=1e-5)


@pytest.mark.slow
def test_texts_do_not_see_each_other(params):
    texts = [random_tokens(CONFIG, n, seed=n).tolist() for n in (9, 4, 1)]
    found = perplexity(params, CONFIG, texts, batch_size=3)
    np.testing.assert_allclose(found.nll, sum(nll_of(params, t) for t in texts[:2]) / 11, rtol=1e-5)
    assert found.tokens == 11


def test_refused(params):
    with pytest.raises(UserError, match="two tokens"):
        perplexity(params, CONFIG, [[5]])
    with pytest.raises(UserError, match="holds token 96"):
        perplexity(params, CONFIG, [1, 96])
    with pytest.raises(UserError, match="do not go together"):
        perplexity(params, CONFIG, [1, 2], window=4, context=4)


@pytest.mark.slow
def test_compared_with_itself_nothing_differs_and_with_another_it_does(params):
    ids = random_tokens(CONFIG, 40, seed=2).tolist()
    same = compare(params, params, CONFIG, ids, window=16, context=4)
    assert same.kl == 0 and same.agreement == 1 and same.nll == same.other_nll
    np.testing.assert_allclose(same.nll, perplexity(params, CONFIG, ids, window=16, context=4).nll, rtol=1e-5)
    other = compare(params, random_params(CONFIG, seed=5), CONFIG, ids, window=16, context=4)
    assert other.kl > 0.1 and other.agreement < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("form", "most"), [("int8", 4e-3), ("fp8", 3e-2), ("int8-block", 1e-2), ("fp8-block", 5e-2)])
def test_quantised_weights_lose_little(form, most):
    oracle = load_oracle(FIXTURES / "air")
    ids = random_tokens(oracle.config, 4, 48, seed=3).tolist()
    found = compare(oracle.params, quantize_params(oracle.params, oracle.config, form, head=True), oracle.config, ids)
    assert 0 < found.kl < most and abs(found.nll - found.other_nll) < 0.05
