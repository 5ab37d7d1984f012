"""What an engine compiles before its first request."""

from __future__ import annotations

import collections
from typing import Any

import jax
import pytest

from glm45_jax.infer import Engine, EngineOptions
from tests.support import random_params, small_config

CONFIG = small_config(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1)
STEPS = ("_read", "choose", "_draft", "likeliest", "_step")


def test_a_step_that_drafts_writes_the_pages_in_their_place() -> None:
    """A copy of the whole cache in each step changes no token: only the time, and with a large cache all of it."""
    options = EngineOptions(slots=2, cache_tokens=1 << 16, step_tokens=16, drafts=2, warm_up=False)
    with Engine(random_params(CONFIG), CONFIG, options=options) as engine:
        programs, most = engine._programs, 2
        reading, choice = engine._reading([], 2, 6), engine._choice([], [], 2, most, "plain", False)
        memory = next(programs._step(reading, most, choice.sampling)).lowered().compile().memory_analysis()
        pages = sum(x.nbytes for x in jax.tree.leaves(programs._pages))
    new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert memory.alias_size_in_bytes >= pages and new < pages // 4


@pytest.mark.slow
def test_each_program_is_compiled_once_and_before_the_first_request() -> None:
    """What is compiled ahead is what steps call: else all would be compiled twice, and nobody would notice."""
    params, compiled = random_params(CONFIG), collections.Counter[str]()

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled[about["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

    options = EngineOptions(slots=2, cache_tokens=64, page_size=4, step_tokens=16, drafts=2, cache_dtype="float32")
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with Engine(params, CONFIG, options=options) as engine:
            programs, begun = engine._programs.compiled(), compiled.total()
            engine.generate_batch([[1, 2, 3], [4] * 20, [5]], 6, temperature=[0.0, 1.0, 0.0], presence_penalty=0.5)
            assert compiled.total() == begun and engine.stats()["compiled_in_service"] == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert programs == sum(compiled[name] for name in STEPS)
    plain, drafting = len([*options.sizes(0)]), len([*options.sizes(2)])
    assert compiled["_read"] == plain + drafting and compiled["_draft"] == drafting
    assert compiled["choose"] == 2 * 2 * 3  # rows, with and without drafts, kinds
    assert compiled["_step"] == 2 * 2
