"""A step is the same in one batch or in micro-batches, balances the experts, and refuses a broken gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.config import get_preset
from glm45_jax.train.config import SpikeConfig, TrainConfig
from glm45_jax.train.optimizer import OptimizerConfig
from glm45_jax.train.step import balance_experts, init_state, train_step
from tests.support import quick_jit

MODEL = get_preset("tiny", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, first_k_dense_replace=0)


def config(**changes):
    rules = OptimizerConfig(learning_rate=0.01, min_learning_rate=0.001)
    return TrainConfig(model=MODEL, steps=20, batch_size=4, seq_len=24, optimizer=rules, **changes)


def make_batch(seed=0, rows=4, length=24):
    """Packed rows of unequal weight: micro-batches differ in targets, so a mean of means would be wrong."""
    rng = np.random.default_rng(seed)
    segments = np.repeat([[1, 2, 3, 0]], rows, 0).repeat(length // 4, 1)
    segments[0] = 1
    mask = rng.random((rows, length)) < np.array([0.9, 0.1, 0.5, 0.7])[:, None]
    return {
        "tokens": jnp.asarray(rng.integers(0, 320, (rows, length)), jnp.int32),
        "segment_ids": jnp.asarray(segments, jnp.int32),
        "positions": jnp.asarray(np.tile(np.arange(length // 4), 4)[None].repeat(rows, 0), jnp.int32),
        "loss_mask": jnp.asarray(mask),
    }


@functools.cache
def step_of(config):
    return quick_jit(functools.partial(train_step, config=config))


@functools.cache
def start(config):
    return quick_jit(functools.partial(init_state, config))()


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.slow
def test_micro_batches_change_nothing():
    whole, parts = config(), config(accumulation=2)
    one, metrics_one = step_of(whole)(start(whole), make_batch())
    two, metrics_two = step_of(parts)(start(whole), make_batch())
    assert metrics_one.keys() == metrics_two.keys()
    for name in metrics_one:
        np.testing.assert_allclose(metrics_two[name], metrics_one[name], rtol=2e-5, err_msg=name)
    want = flat(one.params)
    for name, got in flat(two.params).items():  # in the mean: both rules blow up rounding where a gradient is nearly 0
        assert np.abs(got - want[name]).mean() < 2e-5, name
    bias = "['moe_layers']['moe']['router']['bias']"
    np.testing.assert_array_equal(flat(two.params)[bias], want[bias])


@pytest.mark.slow
def test_selection_bias_follows_the_load_of_every_layer():
    run = config()
    state, metrics = step_of(run)(start(run), make_batch())
    load = np.asarray(metrics["expert_load"], np.float64)
    layers = MODEL.num_moe_layers
    assert load.shape == (layers + 1, MODEL.n_routed_experts)
    want = 1e-3 * np.sign(load.mean(1, keepdims=True) - load)
    assert (want != 0).any(1).all()
    np.testing.assert_allclose(state.params["moe_layers"]["moe"]["router"]["bias"], want[:layers], rtol=1e-6)
    np.testing.assert_allclose(state.params["mtp"]["block"]["moe"]["router"]["bias"], want[-1], rtol=1e-6)


def test_bias_updates_balance_a_lopsided_router():
    """Tokens that all prefer the same experts are spread by the bias alone, through the top-k it selects with."""
    rng = np.random.default_rng(0)
    scores = rng.random((200, 8)) * 0.3 + np.linspace(0, 0.5, 8)
    params = {"moe_layers": {"moe": {"router": {"bias": jnp.zeros((1, 8))}}}}
    imbalance = []
    for _ in range(80):
        bias = np.asarray(params["moe_layers"]["moe"]["router"]["bias"])[0]
        chosen = np.argsort(scores + bias)[:, -2:]
        load = np.bincount(chosen.ravel(), minlength=8)
        imbalance.append(load.max() / load.mean())
        params = balance_experts(params, jnp.asarray(load)[None], 0.01)
    assert imbalance[0] > 3
    assert np.mean(imbalance[-10:]) < 1.3


def test_balance_experts_leaves_the_given_params_alone():
    params = {"moe_layers": {"moe": {"router": {"bias": jnp.zeros((1, 3)), "weight": jnp.ones(3)}}}}
    new = balance_experts(params, jnp.array([[5, 0, 1]]), 0.5)
    np.testing.assert_array_equal(new["moe_layers"]["moe"]["router"]["bias"], [[-0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(params["moe_layers"]["moe"]["router"]["bias"], np.zeros((1, 3)))


@pytest.mark.slow
def test_a_broken_gradient_or_a_spike_changes_nothing_but_counts():
    run = config(skip_spikes=SpikeConfig(factor=2.0, warmup=10, patience=3))
    good, _ = step_of(run)(start(run), make_batch())
    weights = {**good.params, "final_norm": {"scale": good.params["final_norm"]["scale"].at[0].set(jnp.inf)}}
    broken = dataclasses.replace(good, params=weights)
    after, metrics = step_of(run)(broken, make_batch(1))
    assert not np.isfinite(metrics["grad_norm"]) or not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.skipped)) == (2, 1)
    for name, got in flat((after.params, after.opt_state)).items():
        np.testing.assert_array_equal(got, flat((broken.params, broken.opt_state))[name], err_msg=name)
    calm = good.norms._replace(mean=jnp.float32(1e-3), count=jnp.int32(50))
    spiked, metrics = step_of(run)(dataclasses.replace(good, norms=calm), make_batch(1))
    assert float(metrics["grad_norm"]) > 2e-3 and int(metrics["skipped"]) == 1
    assert (int(spiked.step), int(spiked.norms.in_a_row)) == (2, 1)
    for name, got in flat((spiked.params, spiked.opt_state)).items():
        np.testing.assert_array_equal(got, flat((good.params, good.opt_state))[name], err_msg=name)
    # The skipped step takes nothing from the schedule either.
    _, metrics = step_of(run)(dataclasses.replace(after, params=good.params), make_batch(2))
    _, direct = step_of(run)(good, make_batch(2))
    np.testing.assert_array_equal(metrics["learning_rate"], direct["learning_rate"])


def test_metrics_say_what_was_done():
    run = config()
    batch = make_batch()
    state, metrics = step_of(run)(start(run), batch)
    same = np.asarray(batch["segment_ids"])
    targets = (same[:, 1:] == same[:, :-1]) & (same[:, 1:] > 0) & np.asarray(batch["loss_mask"])[:, 1:]
    assert float(metrics["tokens"]) == targets.sum()
    parts = metrics["cross_entropy"] + 0.3 * metrics["mtp_cross_entropy"] + 1e-4 * metrics["balance_loss"]
    np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.01, rtol=1e-6)
    assert float(metrics["grad_norm"]) > 0 and int(metrics["skipped"]) == 0 and int(state.step) == 1


def test_learns_a_batch_by_heart():
    run = config()
    state, losses = start(run), []
    for _ in range(20):
        state, metrics = step_of(run)(state, make_batch())
        losses.append(float(metrics["cross_entropy"]))
    assert losses[0] == pytest.approx(np.log(320), rel=0.05)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 0},
        {"first_k_dense_replace": 2},
        {"dtype": "bfloat16", "param_dtype": "bfloat16", "tie_word_embeddings": True, "n_shared_experts": 0},
    ],
)
def test_a_step_keeps_shapes_and_dtypes(changes):
    """Without MTP layer, without MoE layers in the main model, in bfloat16: what goes in comes out, and can go in."""
    run = config(accumulation=2).replace(model=MODEL.replace(**changes))
    state = jax.eval_shape(functools.partial(init_state, run))
    batch = jax.eval_shape(make_batch)
    after, metrics = jax.eval_shape(functools.partial(train_step, config=run), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].dtype == jnp.float32
