"""The model against what transformers computed, for every checkpoint of tests/fixtures and of the golden set.

Compared where the mask is 1. The logits' standard deviation is near 1, float32 rounding near 1e-6.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm45_jax as glm
from tests.support import oracle_paths, published_gradient, quick_jit

TOLERANCE = 2e-5
SLOW = {"bf16", "glm46", "groups", "golden_a_air_f32", "golden_b_glm45_f32"}  # what they compute, others compute too
FAST_GRADIENTS = {"air", "raw_weights", "tied"}
MASKS = ("full", "left", "right")


def all_masks(params: Any, config: Any, tokens: jax.Array, masks: jax.Array, left_positions: jax.Array) -> Any:
    """In one program: all masks as one batch, and left padding once more with explicit positions."""
    rows = jnp.tile(tokens, (len(MASKS), 1))
    out = glm.forward(params, config, rows, attention_mask=masks, collect=("hidden_states", "router"))
    left = glm.forward(params, config, tokens, positions=left_positions, attention_mask=masks[2:4])
    return out, left.logits


@pytest.fixture(scope="module")
def computed(oracles):
    """(oracle, our outputs) of a folder; each is computed once."""

    @functools.cache
    def get(path):
        o = oracles(path)
        masks = np.concatenate([o[f"mask_{name}"] for name in MASKS])
        # one fixture and one golden checkpoint compiled as users do, the others quickly
        compiled = jax.jit if o.name in ("air", "golden_a_air_f32") else quick_jit
        run = compiled(all_masks, static_argnums=1)
        return o, run(o.params, o.config, o["input_ids"], masks, o["position_ids_left"])

    return get


@pytest.mark.few(2)
@pytest.mark.parametrize("path", oracle_paths(slow=SLOW))
def test_logits(path, computed) -> None:
    o, (out, left_with_positions) = computed(path)
    batch = len(o["input_ids"])
    assert out.logits.dtype == jnp.float32
    for i, name in enumerate(MASKS):
        same(out.logits[i * batch : (i + 1) * batch], o[f"logits_{name}"], o[f"mask_{name}"])
    same(left_with_positions, o["logits_left_pos"], o["mask_left"])


@pytest.mark.few(3)
@pytest.mark.parametrize("path", oracle_paths(slow=SLOW))
def test_hidden_states(path, computed) -> None:
    o, (out, _) = computed(path)
    batch, layers = len(o["input_ids"]), o.config.num_hidden_layers
    assert out.hidden_states.shape[0] == layers + 1
    for i in range(layers + 1):
        # the residual stream grows with depth, so the tolerance is relative to it
        scale = max(1.0, float(np.std(o[f"hidden_{i}"])))
        np.testing.assert_allclose(out.hidden_states[i, :batch], o[f"hidden_{i}"], atol=TOLERANCE * scale, rtol=0)
    np.testing.assert_array_equal(out.hidden, out.hidden_states[-1])


@pytest.mark.parametrize("path", oracle_paths("router_logits_0", slow=SLOW))
def test_router(path, computed) -> None:
    o, (out, _) = computed(path)
    batch, moe_layers = len(o["input_ids"]), o.config.num_moe_layers
    assert out.router.logits.shape[0] == moe_layers
    for i in range(moe_layers):
        logits = np.asarray(out.router.logits[i, :batch]).reshape(o[f"router_logits_{i}"].shape)
        np.testing.assert_allclose(logits, o[f"router_logits_{i}"], atol=TOLERANCE, rtol=0)
        if f"router_indices_{i}" in o:
            indices = np.asarray(out.router.indices[i, :batch]).reshape(len(logits), -1)
            np.testing.assert_array_equal(np.sort(indices, -1), o[f"router_indices_{i}"])


@pytest.mark.parametrize("path", oracle_paths("mtp_logits", slow={"bf16", "glm46", "golden_g_mtp_f32"}))
def test_mtp(path, oracles) -> None:
    o = oracles(path)
    mtp = quick_jit(glm.mtp_forward, static_argnums=1)(o.params, o.config, o["input_ids"])
    np.testing.assert_allclose(mtp.logits, o["mtp_logits"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(mtp.hidden, o["mtp_hidden"], atol=TOLERANCE, rtol=0)
    # position t predicts token t + 2, so the last position has no target
    log_probs = jax.nn.log_softmax(o["mtp_logits"][:, :-1])
    expected = -np.take_along_axis(np.asarray(log_probs), o["input_ids"][:, 2:, None], -1).mean()
    _, metrics = quick_jit(glm.loss_fn, static_argnums=1)(o.params, o.config, {"tokens": o["input_ids"]})
    assert metrics["mtp_cross_entropy"] == pytest.approx(float(expected), abs=1e-5)


def cross_entropy(params: Any, config: Any, batch: Any) -> jax.Array:
    return glm.loss_fn(params, config, batch)[1]["cross_entropy"]


slope = quick_jit(jax.value_and_grad(cross_entropy), static_argnums=1)


@pytest.mark.slow
@pytest.mark.parametrize("path", oracle_paths("loss", fast=FAST_GRADIENTS))
def test_loss_and_gradients(path, oracles) -> None:
    o = oracles(path)
    mask = o["mask_right"]
    loss, grads = slope(o.params, o.config, {"tokens": o["input_ids"], "segment_ids": mask, "loss_mask": mask})
    assert loss == pytest.approx(float(o["loss"]), abs=5e-6)
    names = [name for name in o.arrays if name.startswith("grad:")]
    assert len(names) > 10
    for name in names:
        expected = o[name]
        scale = max(1.0, float(np.abs(expected).max()))
        ours = published_gradient(grads, o.config, name.removeprefix("grad:"))
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE * scale, rtol=0, err_msg=name)


def same(ours: Any, theirs: np.ndarray, mask: np.ndarray) -> None:
    real = mask == 1
    np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], atol=TOLERANCE, rtol=0)


def test_the_fixtures_cover_every_option(oracles) -> None:
    """The oracles would not catch an option that none of them sets."""
    configs = [oracles(path.values[0]).config for path in oracle_paths()]
    kinds: dict[str, Any] = {
        "use_qk_norm": {True, False}, "attention_bias": {True, False}, "norm_topk_prob": {True, False},
        "tie_word_embeddings": {True, False}, "n_shared_experts": {0, 1, 2}, "partial_rotary_factor": {0.25, 0.5, 1.0},
        "mtp_own_embed": {True, False}, "mtp_own_head": {True, False}, "num_nextn_predict_layers": {0, 1},
    }  # fmt: skip
    for field, values in kinds.items():
        assert values <= {getattr(config, field) for config in configs}, field
    assert {c.n_group for c in configs} > {1} and any(1 < c.topk_group < c.n_group for c in configs)
    assert {0, 1} <= {c.first_k_dense_replace for c in configs} and any(c.num_moe_layers == 0 for c in configs)
    assert any(c.num_key_value_heads == 1 for c in configs) and any(c.routed_scaling_factor != 1 for c in configs)
    assert all(c.num_experts_per_tok < c.n_routed_experts for c in configs)
