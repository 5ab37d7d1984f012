"""The engine's answers are those of `generate`, whatever is served beside them, and it gives everything back."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
from typing import Any

import jax
import numpy as np
import pytest

from glm45_jax.errors import UserError
from glm45_jax.infer import Engine, EngineOptions, generate_detailed
from glm45_jax.infer.drafting import TRIAL, Drafting
from tests.support import random_params, small_config, small_tokenizer

CONFIG = small_config(num_hidden_layers=2, eos_token_id=(94, 95))
SMALL = EngineOptions(slots=4, cache_tokens=256, page_size=4, step_tokens=32, cache_dtype="float32")
UNPREPARED = EngineOptions(slots=2, cache_tokens=64, step_tokens=16, cache_dtype="float32", warm_up=False)
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.3}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def engine(params):
    with Engine(params, CONFIG, options=SMALL) as engine:
        yield engine
        stats = engine.stats()
    assert stats["compiled_in_service"] == 0
    assert engine.stats()["pages_in_use"] == engine.stats()["running"] == engine.stats()["waiting"] == 0


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Some with a common beginning."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 90, 24).tolist()
    return [base[: rng.integers(0, 24)] + rng.integers(0, 90, rng.integers(1, 12)).tolist() for _ in range(count)]


def same(found, wanted) -> None:
    assert (found.prompt, found.answer, found.finish_reason) == (wanted.prompt, wanted.answer, wanted.finish_reason)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)


def test_many_at_once_are_as_one_by_one(params, engine):
    asked = prompts(17)
    wanted = generate_detailed(params, CONFIG, asked, 14)
    for found, one in zip(engine.generate_batch(asked, 14), wanted):
        same(found, one)
    order = random.Random(1).sample(range(17), 17)  # pages of the first time are found now
    for found, i in zip(engine.generate_batch([asked[i] for i in order], 14), order):
        same(found, wanted[i])
    assert engine.stats()["prefix_tokens_found"] > 0


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": [0.7, 1.0, 1.3], "seed": [3, 4, 5]},
        pytest.param(
            {"temperature": 0.9, "top_k": [0, 5, 3], "top_p": [0.9, 1.0, 0.5], "seed": [1, 1, 1]},
            marks=pytest.mark.slow,
        ),
        {**PENALTIES, "temperature": [0.0, 1.0, 0.0], "seed": [1, 2, 3]},
        pytest.param({"logit_bias": [{7: -math.inf, 3: 2.5}, None, {50: 100.0}]}, marks=pytest.mark.slow),
        pytest.param({"stop_ids": []}, marks=pytest.mark.slow),
    ],
    ids=["drawn", "filtered", "penalties", "bias", "no-stop"],
)
def test_every_way_of_choosing(params, engine, options):
    asked = prompts(3, seed=2)
    for found, wanted in zip(
        engine.generate_batch(asked, 9, **options), generate_detailed(params, CONFIG, asked, 9, **options)
    ):
        same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("pages", [14, 20])
def test_little_room_makes_requests_begin_anew(params, pages):
    small = EngineOptions(
        slots=4, cache_tokens=pages * 4, page_size=4, step_tokens=32, cache_dtype="float32", warm_up=False
    )
    asked = prompts(9, seed=3)
    with Engine(params, CONFIG, options=small) as engine:
        for found, wanted in zip(engine.generate_batch(asked, 18), generate_detailed(params, CONFIG, asked, 18)):
            same(found, wanted)
    stats = engine.stats()
    assert stats["pages_in_use"] == 0 and stats["finished"] == 9 and (stats["preempted"] > 0 or pages > 14)


def test_a_cancelled_request_leaves_nothing_behind(engine):
    before = engine.stats()["cancelled"]
    requests = [engine.submit(prompt, 150, stop_ids=[]) for prompt in prompts(6, seed=4)]
    first = next(iter(requests[0]))
    for request in requests:
        request.cancel()
        request.cancel()
    assert len(first.tokens) == 1
    for request in requests:
        request.result(60)
        assert request.finish_reason == "cancelled"
    assert engine.stats()["cancelled"] == before + 6
    (answer,) = engine.generate_batch(prompts(1), 3)
    assert len(answer.answer) == 3


def test_deltas_come_to_threads_and_event_loops(engine):
    asked = prompts(4, seed=5)
    wanted = [g.answer for g in engine.generate_batch(asked, 11)]
    results: list[list[int]] = [[] for _ in asked]

    def listen(i):
        results[i] = [t for delta in engine.submit(asked[i], 11) for t in delta.tokens]

    threads = [threading.Thread(target=listen, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()

    async def hear(i):
        results[i] = [t async for delta in engine.submit(asked[i], 11) for t in delta.tokens]

    async def both():
        await asyncio.gather(hear(2), hear(3))

    asyncio.run(both())
    for thread in threads:
        thread.join()
    assert results == wanted


@pytest.mark.slow
def test_other_weights_are_in_force_at_once(params, engine):
    asked = prompts(3, seed=6)
    before = [g.answer for g in engine.generate_batch(asked, 8)]
    other = jax.tree.map(lambda x: x[..., ::-1] if x.ndim > 1 else x, params)
    try:
        engine.update_params(other)
        for found, wanted in zip(engine.generate_batch(asked, 8), generate_detailed(other, CONFIG, asked, 8)):
            same(found, wanted)
    finally:
        engine.update_params(params)
    assert [g.answer for g in engine.generate_batch(asked, 8)] == before


@pytest.mark.slow
def test_text_and_stop_strings():
    tokenizer = small_tokenizer()
    config = small_config(num_hidden_layers=2, vocab_size=384, eos_token_id=tokenizer.eos_ids)
    params, asked = random_params(config), [tokenizer.encode(text) for text in ("the cat", "a dog sat", "on")]
    with Engine(params, config, tokenizer=tokenizer, options=UNPREPARED) as engine:
        texts = [g.text for g in engine.generate_batch(asked, 12, temperature=1.0, seed=5)]
        stop = next(text for text in texts if len(text) > 4)[2:4]
        how: Any = {"stop_strings": [stop, "the dog"], "temperature": 1.0, "seed": 5, "tokenizer": tokenizer}
        wanted = [generate_detailed(params, config, [prompt], 12, **how)[0] for prompt in asked]
        del how["tokenizer"]
        for prompt, one in zip(asked, wanted):
            request = engine.submit(prompt, 12, **how)
            assert "".join(delta.text for delta in request) == one.text
            same(request.result(), one)
        assert any(one.finish_reason == "stop" for one in wanted)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "is empty"),
        ([1000], {}, "holds token 1000"),
        ([1] * 300, {}, "leaves no room"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"temperature": -1.0}, "temperature is -1"),
        ([1], {"stop_strings": "x"}, "give the engine its tokenizer"),
    ],
)
def test_bad_requests_are_refused(engine, prompt, options, message):
    with pytest.raises(UserError, match=message):
        engine.submit(prompt, **options)


def test_sizes_must_go_together(params):
    with pytest.raises(UserError, match="step_tokens"):
        Engine(params, CONFIG, options=EngineOptions(slots=8, step_tokens=4))
    with pytest.raises(UserError, match="page_size is 0"):
        Engine(params, CONFIG, options=EngineOptions(page_size=0))


def test_a_failure_is_told_to_all(params):
    engine = Engine(params, CONFIG, options=UNPREPARED)
    engine._start = lambda parts: 1 / 0  # type: ignore[assignment]
    request = engine.submit([1, 2], 4)
    with pytest.raises(UserError, match="the engine has failed: division by zero"):
        request.result(60)
    with pytest.raises(UserError, match="the engine"):
        engine.submit([1, 2], 4)
    engine.close()


@pytest.mark.slow
def test_weights_that_are_not_numbers_end_the_request_alone(params):
    broken = jax.tree.map(lambda x: x * math.nan, params)
    with Engine(broken, CONFIG, options=UNPREPARED) as engine:
        with pytest.raises(UserError, match="not numbers"):
            engine.submit([1, 2], 4).result(60)
        engine.update_params(params)
        assert len(engine.submit([1, 2], 4, stop_ids=[]).result(60).answer) == 4


@pytest.mark.slow
def test_close_finishes_what_was_asked(params):
    engine = Engine(params, CONFIG, options=UNPREPARED)
    requests = [engine.submit([1, 2 + i], 6, stop_ids=[]) for i in range(5)]
    engine.close()
    assert [len(r.result(0).answer) for r in requests] == [6] * 5
    with pytest.raises(UserError, match="closed"):
        engine.submit([1], 1)


# --- drafts ----------------------------------------------------------------------------------------------------------

MTP = small_config(num_hidden_layers=2, eos_token_id=(94, 95), num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def mtp_params():
    """The MTP layer's own parts small: it then often agrees with the main model on what repeats."""
    return random_params(MTP)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [1, 3])
def test_drafts_change_no_answer(mtp_params, drafts, monkeypatch):
    """Greedy, drawn, and with penalties and biases (which are not drafted) beside one another."""
    monkeypatch.setattr("glm45_jax.infer.drafting.Drafting.begins", lambda self, rows, without: True)
    monkeypatch.setattr("glm45_jax.infer.drafting.Drafting.goes_on", lambda self, rows, drafting: True)
    asked = prompts(9, seed=7)
    how: dict[str, Any] = {
        "temperature": [0.0, 0.0, 0.8, 1.0, 0.0, 1.2, 0.0, 0.7, 0.0],
        "top_p": [1.0, 1.0, 0.9, 1.0, 1.0, 0.8, 1.0, 1.0, 1.0],
        "presence_penalty": [0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        "logit_bias": [None, None, None, {7: 5.0}, {3: -4.0}, None, None, None, None],
        "seed": list(range(9)),
    }
    wanted = generate_detailed(mtp_params, MTP, asked, 17, **how)
    options = EngineOptions(
        slots=4, cache_tokens=160, page_size=4, step_tokens=32, drafts=drafts, cache_dtype="float32", warm_up=False
    )
    with Engine(mtp_params, MTP, options=options) as engine:
        for found, one in zip(engine.generate_batch(asked, 17, **how), wanted):
            same(found, one)
        stats = engine.stats()
    assert stats["drafts_given"] > 40 and stats["pages_in_use"] == 0


@pytest.mark.slow
def test_drafting_that_ends_and_begins_again_drafts_the_same(mtp_params, monkeypatch):
    """Then the MTP layer has read what it had missed; else its drafts would be worse, and no answer would show it."""
    asked = prompts(3, seed=9)
    monkeypatch.setattr("glm45_jax.infer.schedule.Scheduler.pause", 3)

    def drafted(goes_on) -> tuple[list[list[int]], dict[tuple[int, int], list[int]]]:
        options = EngineOptions(
            slots=3, cache_tokens=240, page_size=4, step_tokens=32, drafts=2, cache_dtype="float32", warm_up=False
        )
        monkeypatch.setattr("glm45_jax.infer.drafting.Drafting.begins", lambda self, rows, without: goes_on())
        monkeypatch.setattr("glm45_jax.infer.drafting.Drafting.goes_on", lambda self, rows, drafting: goes_on())
        found: dict[tuple[int, int], list[int]] = {}
        with Engine(mtp_params, MTP, options=options) as engine:
            put, first = engine._scheduler.put, None

            def seen(sequence, tokens, drafts=()):
                nonlocal first
                first = sequence.number if first is None else first
                put(sequence, tokens, drafts)
                if sequence.drafting:
                    found[sequence.number - first, len(sequence.tokens)] = [*drafts]

            engine._scheduler.put = seen  # type: ignore[method-assign]
            return [one.answer for one in engine.generate_batch(asked, 40, stop_ids=[])], found

    steps = itertools.count()
    answers, always = drafted(lambda: True)
    others, at_times = drafted(lambda: next(steps) // 16 % 2 == 0)
    assert others == answers
    both = always.keys() & at_times.keys()
    assert len(both) > 20 and len(at_times) < len(always)
    assert all(always[place] == at_times[place] for place in both)


@pytest.mark.slow
def test_drafts_that_hold_are_accepted():
    """A model that says one token whatever it reads: all drafts of it hold."""
    params = random_params(MTP)
    params["head"]["weight"] = params["head"]["weight"] * 0
    options = EngineOptions(slots=1, cache_tokens=160, page_size=4, step_tokens=32, drafts=3, warm_up=False)
    with Engine(params, MTP, options=options) as engine:
        (found,) = engine.generate_batch([[5, 6, 7]], 41, stop_ids=[])
        stats = engine.stats()
    assert found.answer == [0] * 41
    assert stats["drafts_accepted"] == stats["drafts_given"] == 30 and stats["steps"] == 11


@pytest.mark.slow
def test_drafting_ends_where_it_does_not_pay(mtp_params):
    options = EngineOptions(slots=2, cache_tokens=160, page_size=4, step_tokens=32, drafts=1, warm_up=False)
    with Engine(mtp_params, MTP, options=options) as engine:
        engine._drafting = known(1, {1: (1e-9, 1e9), 2: (1e-9, 1e9)})
        engine._drafting._elapsed = 0.0  # or it would be time for a trial
        engine._drafting.timed = lambda *_, **__: None  # type: ignore[method-assign]
        asked = prompts(3, seed=8)
        for found, one in zip(engine.generate_batch(asked, 12), generate_detailed(mtp_params, MTP, asked, 12)):
            same(found, one)
        assert engine.stats()["drafts_given"] == 0


def known(most: int, times: dict[int, tuple[float, float]], chance: float = 0.8) -> Drafting:
    """One that has seen steps of so many sequences often: without drafts and with them."""
    drafting = Drafting(most, EngineOptions(slots=16).rows)
    for rows, (plain, drafted) in times.items():
        for drafts, seconds in ((False, plain), (True, drafted)):
            for _ in range(TRIAL):
                drafting.timed(rows, seconds, drafts=drafts)
    drafting.chance = chance
    return drafting


def test_whether_drafts_pay():
    assert Drafting(2).begins(4, 0), "nothing is known"
    assert not Drafting(0).begins(4, 0)
    drafting = known(2, {4: (1.0, 1.5)})
    assert drafting.begins(4, 0) and drafting.goes_on(4, 4)
    for _ in range(200):
        drafting.saw(2, 0)
    assert drafting.chance < 0.05 and not drafting.goes_on(4, 4) and drafting.worth_reading == 1
    assert not any(drafting.begins(4, 0) for _ in range(32))
    for _ in range(400):
        drafting.saw(2, 2)
    assert drafting.goes_on(4, 4) and drafting.begins(4, 0) and drafting.worth_reading == 2


def test_the_first_drafts_say_most():
    drafting = Drafting(2)
    for _ in range(8):
        drafting.saw(2, 0)
    assert drafting.chance < 0.35
    for _ in range(500):
        drafting.saw(1, 1)
    before = drafting.chance
    drafting.saw(1, 0)
    assert before - drafting.chance < 0.03


def test_few_that_draft_do_not_make_the_step_longer_for_all():
    """One of four gains a token for a step that is longer for the others too."""
    drafting = known(2, {4: (1.0, 1.5)}, chance=0.9)
    assert [drafting.goes_on(4, n) for n in range(5)] == [False, False, True, True, True]
    assert drafting.begins(4, 1) and not drafting.begins(4, 3)


def test_the_first_steps_after_those_of_another_kind_do_not_count():
    """They find nothing of theirs in the caches: where all draft, the few without would seem slow."""
    drafting = known(2, {1: (1.0, 2.0)}, chance=0.9)
    for _ in range(20):
        for _ in range(3):
            drafting.timed(1, 9.0, drafts=False)
        for _ in range(6):
            drafting.timed(1, 2.0, drafts=True)
    assert 1.3 < drafting.gain(1, 1) < 1.4


def test_a_step_that_the_machine_was_away_in_does_not_count():
    drafting = known(2, {1: (1.0, 1.5)})
    for _ in range(6):
        drafting.timed(1, 1.5, drafts=True)
    for _ in range(3):
        drafting.timed(1, 100.0, drafts=True)
    assert drafting.goes_on(1, 1)


def test_the_first_of_a_wave_knows_that_more_will_come():
    """Requests come one by one; the first would draft, and hold up all others."""
    drafting = known(2, {1: (1.0, 1.1), 4: (1.0, 1.2), 16: (1.0, 4.0)})
    assert drafting.begins(1, 0)
    drafting.goes_on(16, 0)
    for running in (12, 8, 4, 2, 1):  # the wave before ends
        drafting.goes_on(running, 0)
    assert not drafting.begins(1, 0)
    for _ in range(200):
        drafting.goes_on(1, 0)
    assert drafting.begins(1, 0)


def test_trials_of_drafts_that_do_not_pay_take_a_hundredth_of_the_time():
    """A trial makes every sequence's steps longer, for several tokens."""
    drafting = Drafting(2)
    drafting.timed_at_start(16, 1.0, 4.0)
    lost = elapsed = 0.0
    for _ in range(10_000):
        drafting.timed(16, 1.0, drafts=False)
        elapsed += 1.0
        if drafting.begins(16, 0):
            lost += TRIAL * 3.0
            elapsed += TRIAL * 4.0
            for _ in range(TRIAL):
                assert drafting.goes_on(16, 16)
                drafting.timed(16, 4.0, drafts=True)
        assert not drafting.goes_on(16, 16)
    assert 0.005 < lost / elapsed < 0.011


def test_what_was_timed_at_the_start_counts_until_both_kinds_are_seen():
    """Without it an engine that always drafts would never know what a step without drafts takes."""
    drafting = Drafting(1)
    drafting.timed_at_start(1, 1.0, 1.2)
    drafting.timed_at_start(8, 1.0, 1.95)
    assert drafting.gain(1, 1) > 1 > drafting.gain(8, 8)
    for _ in range(50):
        drafting.timed(8, 1.5, drafts=True)
    assert drafting.gain(8, 8) < 1, "one of the kinds alone says nothing"
    for _ in range(TRIAL):
        assert drafting.gain(8, 8) < 1, "nor do a few steps"
        drafting.timed(8, 1.4, drafts=False)
    assert drafting.gain(8, 8) > 1


def test_what_steps_without_drafts_take_is_seen_where_all_would_draft():
    """What was timed at the start may be wrong, and while all draft no other step would show it."""
    drafting = Drafting(2)
    drafting.timed_at_start(16, 1.0, 1.1)
    steps = 0
    while drafting.goes_on(16, 16):
        assert drafting.begins(16, 0)
        drafting.timed(16, 4.0, drafts=True)
        steps += 1
    assert TRIAL < steps < 60
    for _ in range(TRIAL):
        assert not drafting.begins(16, 0)
        drafting.timed(16, 1.0, drafts=False)
    assert not drafting.begins(16, 0) and not drafting.goes_on(16, 16)


def test_a_slow_moment_does_not_keep_drafts_going_that_do_not_pay():
    """Steps without drafts are seen again soon at first, then less and less often where drafts go on to pay."""

    def until_plain(drafting: Drafting, drafted: float, plain: float) -> int:
        steps = 0
        while drafting.goes_on(16, 16):
            drafting.timed(16, drafted, drafts=True)
            steps += 1
        for _ in range(TRIAL):
            drafting.timed(16, plain, drafts=False)
            assert not drafting.goes_on(16, 0)
        return steps

    pays, does_not = Drafting(2), Drafting(2)
    for drafting in (pays, does_not):
        drafting.timed_at_start(16, 1.0, 1.1)
    often = [until_plain(pays, 1.5, 1.0) for _ in range(9)]
    assert often[1] < 100 and 1000 < often[-1] <= 4000
    assert all(a <= b <= 2 * a + 1 for a, b in itertools.pairwise(often))
    assert until_plain(does_not, 4.0, 9.0) + until_plain(does_not, 4.0, 1.0) < 150, "a step took 9 s but for a moment"
    assert sum(until_plain(does_not, 4.0, 1.0) for _ in range(20)) < 2 * TRIAL


def test_a_burst_of_slow_steps_does_not_begin_drafts():
    """Steps without them seem slow beside what those with drafts took at another time."""
    drafting = known(2, {16: (1.0, 4.0)})
    for seconds in [1.0] * TRIAL + [9.0] * TRIAL:
        drafting.timed(16, seconds, drafts=False)
        assert not drafting.begins(16, 0)
    for _ in range(TRIAL):  # a trial in the midst of it
        drafting.timed(16, 36.0, drafts=True)
    assert not drafting.begins(16, 0)


def test_what_looks_nearly_as_quick_at_the_start_is_tried_in_service():
    near, far = Drafting(1), Drafting(1)
    near.timed_at_start(1, 1.0, 1.9)
    far.timed_at_start(1, 1.0, 3.0)
    assert near.begins(1, 0) and all(near.goes_on(1, 1) for _ in range(3)) and not far.begins(1, 0)
    for _ in range(TRIAL):
        near.timed(1, 1.9, drafts=True)
    assert not near.goes_on(1, 1) and not near.begins(1, 0)
