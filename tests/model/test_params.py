"""The parameter tree: what is declared, how it starts, that nothing is computed to learn its shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.config import get_preset
from glm45_jax.model import abstract_params, init_params, param_axes
from tests.support import quick_jit, small_config


@pytest.fixture(scope="module")
def fresh():
    config = get_preset("tiny", hidden_size=128, vocab_size=512, initializer_range=0.02)
    return config, quick_jit(init_params, static_argnums=0)(config, jax.random.key(0))


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_init_has_the_declared_shapes(fresh) -> None:
    config, params = fresh
    declared = leaves(abstract_params(config))
    assert leaves(params).keys() == declared.keys()
    for name, leaf in leaves(params).items():
        assert (leaf.shape, leaf.dtype) == (declared[name].shape, declared[name].dtype), name


def test_init_draws_as_published(fresh) -> None:
    """Normal with std 0.02 for matrices, ones for norms, zeros for biases; no two matrices alike."""
    config, params = fresh
    means = []
    for name, leaf in leaves(params).items():
        value = np.asarray(leaf)
        if "scale" in name:
            assert (value == 1).all(), name
        elif "bias" in name:
            assert (value == 0).all(), name
        else:
            assert value.std() == pytest.approx(config.initializer_range, rel=0.1), name
            means.append(float(value.reshape(-1)[:64].mean()))
    assert len(set(means)) == len(means)
    for kind in ("moe_layers",):
        experts = np.asarray(params[kind]["moe"]["experts"]["gate"])
        assert not np.array_equal(experts[0], experts[1]), "two layers start alike"
        assert not np.array_equal(experts[0, 0], experts[0, 1]), "two experts start alike"


@pytest.mark.slow
def test_init_follows_the_key() -> None:
    config = small_config()
    init = quick_jit(init_params, static_argnums=0)
    a, b, c = (init(config, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a["embed"]["weight"], c["embed"]["weight"])


def test_the_selection_bias_is_float32_whatever_the_dtype() -> None:
    tree = abstract_params(get_preset("glm-4.5"))
    for router in (tree["moe_layers"]["moe"]["router"], tree["mtp"]["block"]["moe"]["router"]):
        assert router["bias"].dtype == jnp.float32 and router["weight"].dtype == jnp.bfloat16


def test_axes_name_what_is_sharded() -> None:
    axes = param_axes(get_preset("glm-4.5"))
    assert axes["moe_layers"]["moe"]["experts"]["gate"] == ("layers", "experts", "expert_mlp", "expert_embed")
    assert axes["moe_layers"]["attention"]["k"]["weight"] == ("layers", "kv_heads", "embed")
    assert axes["embed"]["weight"] == ("vocab", "embed")
    assert axes["mtp"]["block"]["moe"]["router"]["bias"] == ("router",)


def test_published_shapes() -> None:
    tree = abstract_params(get_preset("glm-4.5-air"))
    assert tree["moe_layers"]["moe"]["experts"]["gate"].shape == (45, 128, 1408, 4096)
    assert tree["dense_layers"]["mlp"]["down"]["weight"].shape == (1, 4096, 10944)
    assert tree["mtp"]["eh_proj"]["weight"].shape == (4096, 8192)
    assert "q_norm" not in tree["moe_layers"]["attention"]
