"""What changes in the course of a run follows from the step's number alone, exactly."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from glm45_jax.train import OptimizerConfig, TrainConfig, timeline
from glm45_jax.train.config import BatchWarmup, Change, SpikeConfig
from glm45_jax.train.optimizer import make_schedule
from glm45_jax.train.spikes import init_track, judge

TINY = get_preset("tiny")


def config(**changes):
    return TrainConfig(**{"model": TINY, "steps": 100, "batch_size": 16, "seq_len": 10, "accumulation": 4, **changes})


def test_the_batch_grows_in_whole_micro_batches():
    run = config(batch_warmup=BatchWarmup(start=4, tokens=1200, sizes=3))
    # 4, 8 and 12 sequences for 400 tokens each, then 16
    sizes = [timeline.batch_size_at(run, step) for step in range(30)]
    assert sizes == [4] * 10 + [8] * 5 + [12] * 3 + [16] * 12
    for step in range(30):
        now = timeline.at(run, step)
        assert (now.batch_size, now.accumulation) == (sizes[step], sizes[step] // 4)
        assert timeline.tokens_at(run, step) == 10 * sum(sizes[:step])
    assert timeline.piece_size(run) == 4
    assert len({timeline.at(run, step) for step in range(100)}) == 4, "each is compiled anew"


def test_the_recipes_batch_warmup():
    """16M to 64M tokens over the first 500B, at 4K."""
    run = config(
        batch_size=16384,
        seq_len=4096,
        accumulation=1024,
        steps=400_000,
        optimizer=OptimizerConfig(warmup_tokens=10**9),
        batch_warmup=BatchWarmup(start=4096, tokens=int(500e9), sizes=6),
        model=TINY.replace(max_position_embeddings=4096),
    )
    assert timeline.batch_size_at(run, 0) * 4096 == 2**24
    full = next(s for s in timeline.stretches(run) if s.batch_size == 16384)
    assert full.first_token == pytest.approx(500e9, rel=1e-3)
    steps = timeline.steps_for(run, int(15e12))
    assert timeline.tokens_at(run, steps - 1) < 15e12 <= timeline.tokens_at(run, steps)


@pytest.mark.parametrize("tokens", [1, 400, 401, 1199, 1200, 5000])
def test_steps_for_tokens(tokens):
    run = config(batch_warmup=BatchWarmup(start=4, tokens=1200, sizes=3), first_step=7, first_tokens=333)
    end = run.first_step + timeline.steps_for(run, tokens)
    assert timeline.tokens_at(run, end - 1) < 333 + tokens <= timeline.tokens_at(run, end)


def test_weights_change_at_their_tokens():
    run = config(
        bias_update_rate=1e-3,
        changes=(Change(tokens=800, bias_update_rate=0.0), Change(tokens=1600, mtp_loss_weight=0.1)),
    )
    at = lambda step: (timeline.at(run, step).bias_update_rate, timeline.at(run, step).mtp_loss_weight)  # noqa: E731
    # 160 tokens a step
    assert [at(step) for step in (0, 4, 5, 9, 10, 99)] == [(1e-3, 0.3)] * 2 + [(0.0, 0.3)] * 2 + [(0.0, 0.1)] * 2


def test_learning_rate_by_tokens():
    rules = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_tokens=400, decay_tokens=4400)
    run = config(optimizer=rules, batch_warmup=BatchWarmup(start=4, tokens=800, sizes=1))
    schedule = timeline.learning_rate(run)
    for step in (0, 3, 10, 20, 21, 37, 43, 90):  # 40 tokens a step, from step 20 on 160
        tokens = timeline.tokens_at(run, step)
        share = np.clip((tokens - 400) / 4000, 0, 1)
        want = tokens / 400 if tokens < 400 else 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * share))
        np.testing.assert_allclose(schedule(step), want, rtol=1e-5)
    for step in (1, 30):
        now = timeline.at(run, step)
        np.testing.assert_array_equal(timeline.learning_rate(now)(step), schedule(step))


def test_a_later_stage_goes_on_in_the_same_schedule():
    rules = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_tokens=400, decay_tokens=9000)
    whole = timeline.learning_rate(config(optimizer=rules))
    part = timeline.learning_rate(config(optimizer=rules, first_step=20, first_tokens=3200))
    np.testing.assert_allclose(part(jnp.arange(20, 50)), whole(jnp.arange(20, 50)), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_warmup": BatchWarmup(start=6, tokens=10)}, "no whole micro-batches of 4"),
        ({"batch_warmup": BatchWarmup(start=20, tokens=10)}, "above batch_size"),
        ({"changes": (Change(tokens=5), Change(tokens=4))}, "order"),
        ({"changes": (Change(tokens=5, mtp_loss_weight=-1.0),)}, "negative"),
        ({"first_step": 100}, "0..99"),
        ({"init_from": "a", "continue_from": "b"}, "one of them"),
        ({"optimizer": OptimizerConfig(warmup_tokens=10**6)}, "warmup_tokens"),
    ],
)
def test_schedules_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_steps_and_tokens_are_not_mixed():
    with pytest.raises(UserError, match="by steps and by tokens"):
        OptimizerConfig(warmup_steps=3, decay_tokens=100)
    with pytest.raises(UserError, match="how many a step has"):
        make_schedule(OptimizerConfig(warmup_tokens=3), 10)


# --- spikes ----------------------------------------------------------------------------------------------------------

RULE = SpikeConfig(factor=3.0, warmup=5, patience=4)


def taken(norms, config=RULE, losses=None):
    track, out = init_track(), []
    for n, norm in enumerate(norms):
        ok, track = judge(track, jnp.float32(norm), jnp.float32(1.0 if losses is None else losses[n]), config)
        out.append(bool(ok))
    return out, track


def test_a_spike_is_left_out_and_normal_steps_are_not():
    out, track = taken([1.0, 1.2, 0.8, 1.1, 0.9, 2.5, 4.0, 1.0])
    assert out == [True] * 6 + [False, True]
    assert float(track.mean) < 2, "one spike hardly moves the mean"
    assert taken([9.0, 1, 1, 1])[0] == [True] * 4, "nothing is judged before the warm-up is over"
    assert taken([1.0] * 8 + [100.0], None)[0] == [True] * 9


def test_gradients_that_grow_for_good_are_followed():
    out, track = taken([1.0] * 10 + [50.0] * 400)
    assert out[10:15] == [False] * 4 + [True], "patience"
    assert all(out[-50:]) and float(track.mean) > 50 / 3


def test_what_is_not_finite_is_left_out_and_leaves_no_trace():
    out, track = taken([1.0, np.nan, np.inf, 1.0])
    assert out == [True, False, False, True] and float(track.mean) == 1.0 and int(track.count) == 2
    assert taken([1.0, 1.0], losses=[1.0, np.nan])[0] == [True, False]
    assert taken([np.nan] * 20, None)[0] == [False] * 20
