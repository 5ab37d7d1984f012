"""Answers equal a plain loop over `forward`, batches their rows one by one; where answers end; what is compiled."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.errors import UserError
from glm45_jax.infer import generate_detailed
from glm45_jax.infer.generate import round_up
from glm45_jax.infer.sampling import TokenCounts, sample, sampling_params
from tests.infer.conftest import generate_module
from tests.support import FIXTURES, ROOT, quick_jit, random_params, small_config

CONFIG = small_config(num_hidden_layers=2, eos_token_id=(94, 95))
# most tests choose these numbers of prompts and tokens, to share two compiled programs of 4 rows and 32 slots
NEW = 12
PROMPTS = [[5, 17, 80, 3], [61], [9, 2, 44, 44, 7, 31, 8, 90, 12, 13, 14]]
PENALTIES: dict[str, Any] = {
    "repetition_penalty": [1.5, 1.0, 0.7],
    "presence_penalty": [0.0, 0.8, -0.5],
    "frequency_penalty": [0.5, 0.0, 0.4],
    "logit_bias": [{7: -3.0}, {3: 2.5, 4: -math.inf}, {50: 1.0}],
}


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(CONFIG)


_forward = quick_jit(glm.forward, static_argnums=1)


def logits_after(params, tokens: list[int]) -> np.ndarray:
    """Of the plain forward pass, in one shape for all lengths."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(params, CONFIG, padded).logits)[0, len(tokens) - 1]


def plain_loop(params, prompt: list[int], steps: int, options: dict[str, Any]) -> list[int]:
    """One token at a time, everything counted and computed anew."""
    settings, tokens = sampling_params(1, CONFIG.vocab_size, options=options), list(prompt)  # type: ignore
    for _ in range(steps):
        counts = np.zeros((2, 1, CONFIG.vocab_size), np.int32)
        np.add.at(counts, (0, 0, prompt), 1)
        np.add.at(counts, (1, 0, tokens[len(prompt) :]), 1)
        logits = logits_after(params, tokens)[None]
        chosen, _ = _sample(logits, settings, np.array([len(tokens)]), TokenCounts(counts[0] > 0, counts[1]))
        tokens.append(int(chosen[0]))
    return tokens


_sample = quick_jit(sample)


def row_options(options: dict[str, Any], row: int) -> dict[str, Any]:
    return {name: [value[row]] if isinstance(value, list) else value for name, value in options.items()}


# --- what is generated -----------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        {},
        PENALTIES,
        PENALTIES | {"temperature": [0.8, 1.5, 0.0], "top_k": [0, 9, 0], "top_p": 0.9, "seed": [3, 4, 5]},
    ],
    ids=["greedy", "penalties", "sampled"],
)
def test_a_ragged_batch_equals_a_plain_loop_over_forward(options, params) -> None:
    out = glm.generate(params, CONFIG, PROMPTS, NEW, stop_ids=[], **options)
    expected = [plain_loop(params, prompt, NEW, row_options(options, i)) for i, prompt in enumerate(PROMPTS)]
    assert out == expected
    if options:
        assert out != glm.generate(params, CONFIG, PROMPTS, NEW, stop_ids=[])


@pytest.mark.slow
def test_a_batch_equals_its_rows_one_by_one(params) -> None:
    options = PENALTIES | {"temperature": [0.0, 1.0, 1.3], "min_p": 0.01, "seed": [1, 2, 3]}
    together = generate_detailed(params, CONFIG, PROMPTS, NEW, **options)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generate_detailed(params, CONFIG, [[*prompt]], 31 - len(prompt), **row_options(options, i))
        assert alone.answer[:NEW] == together[i].answer
        np.testing.assert_allclose(alone.logprobs[:NEW], together[i].logprobs, atol=1e-5)


def test_logprobs_are_those_of_forward(params) -> None:
    for g in generate_detailed(params, CONFIG, PROMPTS, NEW, temperature=1.5, top_k=20, seed=3):
        assert len(g.logprobs) == len(g.answer) and g.tokens == g.prompt + g.answer
        for i, (token, logprob) in enumerate(zip(g.answer, g.logprobs)):
            logits = logits_after(params, g.prompt + g.answer[:i])
            assert logprob == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=2e-5)


def test_decoding_that_begins_later_goes_on_the_same(params) -> None:
    """A draw depends on the token's position in its sequence, not on how long decoding has run."""
    options: dict[str, Any] = {"temperature": 1.0, "seed": [8, 9, 7], "stop_ids": []}
    whole = glm.generate(params, CONFIG, PROMPTS, NEW, **options)
    cut = [row[: len(prompt) + 5] for row, prompt in zip(whole, PROMPTS)]
    assert glm.generate(params, CONFIG, cut, NEW - 5, **options) == whole


def test_seeds(params) -> None:
    run = functools.partial(glm.generate, params, CONFIG, [PROMPTS[2]] * 4, NEW, temperature=1.2, stop_ids=[])
    answers = run(seed=5)
    assert answers == run(seed=[5, 6, 7, 8])
    assert len({tuple(row) for row in answers}) == 4
    assert len({tuple(row) for row in run(seed=[5] * 4)}) == 1


def test_padded_vocabulary_rows_are_never_chosen(params) -> None:
    config = CONFIG.replace(real_vocab_size=30)
    prompts = [[token % 30 for token in prompt] for prompt in PROMPTS]
    out = glm.generate(params, config, prompts, NEW, temperature=[0.0, 3.0, 9.0], stop_ids=[])
    assert max(map(max, out)) < 30
    unmasked = glm.generate(params, CONFIG, prompts, NEW, temperature=[0.0, 3.0, 9.0], stop_ids=[])
    assert all(max(row) >= 30 for row in unmasked[1:])


def test_prompts_may_be_arrays(params) -> None:
    prompts = np.array([[5, 6, 7], [8, 9, 10], [7, 7, 7]])
    expected = glm.generate(params, CONFIG, prompts.tolist(), 20)
    assert all(type(token) is int for row in expected for token in row)
    assert glm.generate(params, CONFIG, prompts, 20) == expected  # type: ignore
    assert glm.generate(params, CONFIG, jnp.asarray(prompts), 20) == expected  # type: ignore


# --- where answers end -----------------------------------------------------------------------------------------------


def test_stop_ids_end_their_row_alone_and_are_kept(params) -> None:
    free = generate_detailed(params, CONFIG, PROMPTS, NEW, stop_ids=[])
    assert [g.finish_reason for g in free] == ["length"] * 3 and [len(g.answer) for g in free] == [NEW] * 3
    stop = next(t for t in free[0].answer[2:] if t not in free[0].answer[:2] and t not in free[1].answer)
    at = free[0].answer.index(stop)
    ended = generate_detailed(params, CONFIG, PROMPTS, NEW, stop_ids=[stop])
    assert ended[0].answer == free[0].answer[: at + 1] and ended[0].finish_reason == "stop"
    assert ended[0].logprobs == pytest.approx(free[0].logprobs[: at + 1])
    assert ended[1].answer == free[1].answer and ended[1].finish_reason == "length"
    assert glm.generate(params, CONFIG, PROMPTS, NEW, stop_ids=stop) == [g.tokens for g in ended]


def test_the_configs_stop_ids_are_the_default(params) -> None:
    bias = {CONFIG.eos_token_id[1]: 100.0}
    free, ended = (
        generate_detailed(params, CONFIG, PROMPTS, NEW, logit_bias=bias, presence_penalty=-1, stop_ids=stop_ids)
        for stop_ids in ([], None)
    )
    assert {len(g.answer) for g in free} == {NEW} and [g.answer for g in ended] == [[CONFIG.eos_token_id[1]]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_new_tokens(count, params) -> None:
    prompts = [*PROMPTS, [3] * 14]  # long enough to need as many slots as the other tests
    some, more = (glm.generate(params, CONFIG, prompts, n, stop_ids=[]) for n in (count, 14))
    assert some == [row[: len(prompt) + count] for row, prompt in zip(more, prompts)]


@pytest.mark.slow
def test_the_context_of_the_model_ends_an_answer(params) -> None:
    config = CONFIG.replace(max_position_embeddings=12)
    whole = glm.generate(params, CONFIG, PROMPTS, NEW, stop_ids=[])
    short = generate_detailed(params, config, PROMPTS, NEW, stop_ids=[])
    assert [g.tokens for g in short] == [row[:12] for row in whole]
    assert {g.finish_reason for g in short} == {"length"}
    with pytest.raises(UserError, match=r"prompts\[1\] has 12 tokens"):
        glm.generate(params, config, [[1], [2] * 12], 1)


def test_no_prompts(params) -> None:
    assert glm.generate(params, CONFIG, [], 5) == []  # nothing is compiled or run


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("text", "list of token ids"),
        (["text"], r"prompts\[0\] is not a list of token ids"),
        ([1, 2], r"prompts\[0\] is not a list"),
        ([[1], []], r"prompts\[1\] is empty"),
        ([[1.5]], r"prompts\[0\] is not a list"),
        ([[1, 96]], r"prompts\[0\] holds token 96"),
        ([[-1]], r"prompts\[0\] holds token -1"),
    ],
)
def test_bad_prompts_are_named(prompts, said, params) -> None:
    with pytest.raises(UserError, match=said):
        glm.generate(params, CONFIG, prompts, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"stop_strings": ["x"]}, "pass the tokenizer"),
        ({"stop_strings": [""]}, "not empty"),
        ({"temperature": [1.0] * 2}, "temperature has 2 values for 3 prompts"),
        ({"temperatur": 1.0}, "unknown sampling option"),
    ],
)
def test_bad_options_are_named(options, said, params) -> None:
    with pytest.raises(UserError, match=said):
        glm.generate(params, CONFIG, PROMPTS, **options)


def test_logits_that_are_not_numbers_are_an_error(params) -> None:
    broken = params | {"final_norm": {"scale": params["final_norm"]["scale"] * jnp.nan}}
    with pytest.raises(UserError, match="not numbers"):
        glm.generate(broken, CONFIG, PROMPTS, NEW)


# --- compiling and stepping ------------------------------------------------------------------------------------------


def test_shapes_are_rounded_up_to_few() -> None:
    sizes = [round_up(n) for n in range(1, 4097)]
    assert all(size >= n for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) == 5 + 4 * 4
    assert all(size <= 1.25 * n for n, size in enumerate(sizes, 1) if n > 256)


@pytest.mark.slow
def test_the_same_shapes_compile_once(params) -> None:
    """Nothing at all is compiled for other lengths of the same bucket, other settings, other stop ids."""
    glm.generate(params, CONFIG, PROMPTS, NEW)
    with_penalties = functools.partial(glm.generate, params, CONFIG, PROMPTS, NEW, **PENALTIES)
    with_penalties()
    compiled: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        glm.generate(params, CONFIG, [[1, 2, 3], [4, 5], [6], [7] * 16], 9)
        glm.generate(params, CONFIG, PROMPTS, NEW, temperature=1.0, top_k=5, top_p=0.5, min_p=0.1, seed=9)
        glm.generate(params, CONFIG, PROMPTS, 7, stop_ids=[1, 2, 3])
        with_penalties(temperature=0.7, seed=3)
        assert not compiled
        glm.generate(params, CONFIG, [[1]] * 5, 20)
        assert len(compiled) == 2  # the listener does listen: the two programs for eight rows
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def advances(monkeypatch) -> list[int]:
    """The `until` of every call of the compiled loop."""
    calls: list[int] = []
    original = generate_module.advance  # type: ignore

    def counted(params, config, state, controls, until, halt):
        calls.append(int(until))
        return original(params, config, state, controls, until, halt)

    monkeypatch.setattr(generate_module, "advance", counted)
    return calls


@pytest.mark.slow
def test_the_host_is_not_asked_between_tokens(params, advances) -> None:
    glm.generate(params, CONFIG, PROMPTS, NEW)
    assert advances == [NEW]
    glm.generate(params, CONFIG, [[1] * 16], 1)
    assert advances == [NEW]


def test_the_loop_stops_when_all_rows_have_ended(params, monkeypatch) -> None:
    states = []
    original = generate_module.advance  # type: ignore
    monkeypatch.setattr(generate_module, "advance", lambda *args: states.append(original(*args)) or states[-1])
    free = generate_detailed(params, CONFIG, PROMPTS, NEW, stop_ids=[])
    stops = [g.answer[2] for g in free]
    ended = generate_detailed(params, CONFIG, PROMPTS, NEW, stop_ids=stops)
    assert int(states[-1].step) == max(len(g.answer) for g in ended) <= 3
    assert dataclasses.asdict(ended[0])["finish_reason"] == "stop"


@pytest.mark.slow
def test_params_on_a_mesh_generate_the_same() -> None:
    code = """
import sys, numpy as np, glm45_jax as glm
from glm45_jax.parallel import make_mesh
path = sys.argv[1]
expected = np.load(path + "/oracle.npz")
for axes in ({"fsdp": 4}, {"tensor": 2, "expert": 2}):
    config, params = glm.load_checkpoint(path, dtype="float32", mesh=make_mesh(**axes))
    assert glm.generate(params, config, expected["gen_prompt"], 8) == expected["gen_full"].tolist(), axes
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(FIXTURES / "air")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
