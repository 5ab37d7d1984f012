"""Every option of the config matters: without its effect the output would be another."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np
import pytest

import glm45_jax as glm
from tests.support import quick_jit, random_params, random_tokens, small_config

forward = quick_jit(glm.forward, static_argnames=("config", "collect"))

# The same weights under a changed config.
VALUES = [
    {"norm_topk_prob": False},
    {"routed_scaling_factor": 1.0},
    {"num_experts_per_tok": 3},
    {"n_group": 4, "topk_group": 1},
    {"partial_rotary_factor": 1.0},
    {"partial_rotary_factor": 0.25},
    {"partial_rotary_factor": 0.0},
    {"rope_theta": 1e6},
    {"rms_norm_eps": 1e-1},
    {"tie_word_embeddings": True},
]
# Weights that an option adds, taken away.
PARTS = [
    ({"use_qk_norm": False}, ["attention.q_norm", "attention.k_norm"]),
    ({"attention_bias": False}, ["attention.q.bias", "attention.k.bias", "attention.v.bias"]),
    ({"n_shared_experts": 0}, ["moe.shared"]),
]


@pytest.fixture(scope="module")
def model():
    config = small_config()
    params, tokens = random_params(config), random_tokens(config, 1, 10)
    return config, params, tokens, forward(params, config=config, tokens=tokens).logits


def without(tree: dict[str, Any], path: list[str]) -> None:
    if path[0] in tree and len(path) == 1:
        del tree[path[0]]
    elif path[0] in tree:
        without(tree[path[0]], path[1:])


@pytest.mark.few(1)
@pytest.mark.parametrize("changes", VALUES, ids=str)
def test_values_matter(changes: dict[str, Any], model) -> None:
    config, params, tokens, base = model
    if changes.get("tie_word_embeddings"):
        params = {name: value for name, value in params.items() if name != "head"}
    out = forward(params, config=config.replace(**changes), tokens=tokens).logits
    assert out.shape == base.shape and np.abs(out - base).max() > 1e-2


@pytest.mark.few(1)
@pytest.mark.parametrize("changes, parts", PARTS, ids=str)
def test_parts_matter(changes: dict[str, Any], parts: list[str], model) -> None:
    config, params, tokens, base = model
    params = copy.deepcopy(params)
    for kind in ("dense_layers", "moe_layers"):
        for part in parts:
            without(params[kind], part.split("."))
    changed = config.replace(**changes)
    assert jax.tree.structure(params) == jax.tree.structure(glm.abstract_params(changed))
    out = forward(params, config=changed, tokens=tokens).logits
    assert np.abs(out - base).max() > 1e-2


@pytest.mark.parametrize(
    "path", ["attention.q.bias", "attention.v.bias", "moe.router.bias", "moe.shared.down.weight", "attention.o.weight"]
)
def test_every_weight_reaches_the_output(path: str, model) -> None:
    config, params, tokens, base = model
    params = copy.deepcopy(params)
    leaf, *rest = reversed(path.split("."))
    at = params["moe_layers"]
    for name in reversed(rest):
        at = at[name]
    at[leaf] = np.asarray(at[leaf]) + np.linspace(-1, 1, at[leaf].size, dtype=np.float32).reshape(at[leaf].shape)
    assert np.abs(forward(params, config=config, tokens=tokens).logits - base).max() > 1e-3


@pytest.mark.slow
def test_a_head_of_its_own_and_own_embedding_for_mtp() -> None:
    own = small_config(num_nextn_predict_layers=1, mtp_own_embed=True, mtp_own_head=True)
    shared = own.replace(mtp_own_embed=False, mtp_own_head=False)
    params, tokens = random_params(own), random_tokens(own, 1, 8)
    lent = copy.deepcopy(params)
    for name in ("embed", "head"):
        lent["mtp"].pop(name)
    run = quick_jit(glm.mtp_forward, static_argnums=1)
    a, b = run(params, own, tokens).logits, run(lent, shared, tokens).logits
    assert np.abs(a - b).max() > 1e-2
    for name in ("embed", "head"):
        params["mtp"][name] = params[name]
    np.testing.assert_allclose(run(params, own, tokens).logits, b, atol=1e-5)
