"""The router against a plain reading of its definition in NumPy: selection, groups, weights, float32 throughout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import glm45_jax as glm
from glm45_jax.config import ModelConfig
from glm45_jax.model.moe import route
from tests.support import quick_jit, random_params, random_tokens, small_config

forward = quick_jit(glm.forward, static_argnames=("config", "collect"))


def choose(logits: np.ndarray, bias: np.ndarray, c: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Experts (ascending) and their weights for router logits [T, E], one token at a time."""
    experts, weights = [], []
    for row in logits.astype(np.float64):
        scores = 1 / (1 + np.exp(-row))
        biased = scores + bias
        groups = biased.reshape(c.n_group, -1)
        best = np.argsort([-np.sort(group)[-2:].sum() for group in groups])[: c.topk_group]
        size = groups.shape[1]
        allowed = [e for e in range(len(row)) if e // size in best]
        top = sorted(sorted(allowed, key=lambda e: -biased[e])[: c.num_experts_per_tok])
        weight = scores[top]
        if c.norm_topk_prob:
            weight = weight / (weight.sum() + 1e-20)
        experts.append(top)
        weights.append(weight * c.routed_scaling_factor)
    return np.array(experts), np.array(weights)


CASES = [
    {},
    {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 8},
    {"n_group": 4, "topk_group": 2},
    {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    {"n_group": 4, "topk_group": 4},
    {"n_group": 1, "n_routed_experts": 12, "num_experts_per_tok": 5},
]


def routed(config: ModelConfig, params, tokens):
    """Router logits [Lm*T, E], indices and weights [Lm*T, k], sorted by expert, and the biases [Lm*T, E]."""
    out = forward(params, config=config, tokens=tokens, collect=("router",)).router
    logits, indices, weights = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (out.logits, out.indices, out.weights))
    order = np.argsort(indices, axis=-1)
    bias = np.repeat(np.asarray(params["moe_layers"]["moe"]["router"]["bias"]), tokens.size, axis=0)
    return logits, np.take_along_axis(indices, order, -1), np.take_along_axis(weights, order, -1), bias


@pytest.mark.few(3)
@pytest.mark.parametrize("shift", [0.0, -5.0, 5.0])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_choices_and_weights(changes: dict, shift: float) -> None:
    """A common shift of all biases changes nothing: groups that are out are out, not scored 0."""
    config = small_config(**changes)
    params = random_params(config)
    params["moe_layers"]["moe"]["router"]["bias"] += shift
    logits, indices, weights, bias = routed(config, params, random_tokens(config, 2, 12))
    expected = [choose(logits[i : i + 1], bias[i], config) for i in range(len(logits))]
    np.testing.assert_array_equal(indices, np.concatenate([e for e, _ in expected]))
    np.testing.assert_allclose(weights, np.concatenate([w for _, w in expected]), atol=1e-6)
    if config.norm_topk_prob:
        np.testing.assert_allclose(weights.sum(-1), config.routed_scaling_factor, rtol=1e-5)


def test_the_bias_selects_and_does_not_weigh() -> None:
    config = small_config(norm_topk_prob=False, routed_scaling_factor=1.0)
    params = random_params(config)
    tokens = random_tokens(config, 2, 12)
    logits, indices, weights, _ = routed(config, params, tokens)
    np.testing.assert_allclose(weights, np.take_along_axis(1 / (1 + np.exp(-logits)), indices, -1), atol=1e-6)
    params["moe_layers"]["moe"]["router"]["bias"] *= 0
    assert (routed(config, params, tokens)[1] != indices).any()


def test_routing_stays_float32_under_bfloat16() -> None:
    """Biases near 7 differ by less than bfloat16 resolves there (1/32): rounded, they send tokens elsewhere."""
    config = small_config(dtype="bfloat16", param_dtype="bfloat16")
    params = random_params(config)
    router = params["moe_layers"]["moe"]["router"]
    assert router["bias"].dtype == jnp.float32 and router["weight"].dtype == jnp.bfloat16
    router["bias"] = 7 + router["bias"] * 0.25
    logits, indices, _, bias = routed(config, params, random_tokens(config, 4, 12))
    assert (logits != logits.astype(ml_dtypes.bfloat16).astype(np.float32)).mean() > 0.9, "logits were rounded"
    exact = np.concatenate([choose(logits[i : i + 1], bias[i], config)[0] for i in range(len(logits))])
    np.testing.assert_array_equal(indices, exact)
    rounded = bias.astype(ml_dtypes.bfloat16).astype(np.float32)
    wrong = np.concatenate([choose(logits[i : i + 1], rounded[i], config)[0] for i in range(len(logits))])
    assert (wrong != exact).any(-1).mean() > 0.05, "the case cannot tell"


def test_every_token_gets_all_its_experts() -> None:
    """However uneven the load is, none is dropped: with one expert favoured by all, a token's output is as alone."""
    config = small_config()
    params = random_params(config)
    bias = params["moe_layers"]["moe"]["router"]["bias"]
    params["moe_layers"]["moe"]["router"]["bias"] = bias.at[:, 3].add(10.0)
    tokens = random_tokens(config, 2, 12)
    _, indices, _, _ = routed(config, params, tokens)
    assert (indices == 3).any(-1).all()
    whole = forward(params, config=config, tokens=tokens).logits
    for row in range(2):
        one = forward(params, config=config, tokens=tokens[row : row + 1, :1]).logits
        np.testing.assert_allclose(whole[row : row + 1, :1], one, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 300])
def test_the_product_is_float32_to_the_last_bit_on_every_platform(tokens: int) -> None:
    """A TPU multiplies float32 in bfloat16 unless told: experts would change places, and nothing would say so."""
    router = nnx.Dict(weight=nnx.Param(jnp.zeros((64, 64))), bias=nnx.Param(jnp.zeros(64)))
    config = small_config(n_routed_experts=64)
    with jax.default_matmul_precision("bfloat16"):
        traced = jax.jit(lambda x: route(x, router, config).logits).trace(jnp.zeros((tokens, 64), jnp.bfloat16))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.dot_general") == text.count("precision = [HIGHEST, HIGHEST]") == 1
