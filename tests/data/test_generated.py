"""The generated data are right, and test problems never appear in training."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from glm45_jax.data.generated import (
    Sum,
    addition_table,
    call_conversation,
    draw_sum,
    held_out,
    standard_library,
    sum_conversation,
    write_quickstart_data,
)


def test_steps_of_sums() -> None:
    assert Sum(47, 38).steps == "7+8=15, carry 1. 4+3=7, 7+1=8"
    assert Sum(3, 4).steps == "3+4=7"
    assert Sum(99, 99).steps == "9+9=18, carry 1. 9+9=18, 18+1=19"


def test_every_line_of_a_table_is_right() -> None:
    for line in addition_table(random.Random(0)).splitlines():
        a, b, total = map(int, re.split("[+=]", line))
        assert a + b == total and max(a, b) < 10


def test_training_and_test_problems_are_apart() -> None:
    rng = random.Random(0)
    train = {draw_sum(rng, test=False) for _ in range(3000)}
    test = {draw_sum(rng, test=True) for _ in range(300)}
    assert len(test) > 100 and not train & test
    calls = {json.dumps(call_conversation(rng, test=False, turns=4)[1]) for _ in range(500)}
    tested = {json.dumps(call_conversation(rng, test=True)[1]) for _ in range(100)}
    assert len(tested) > 20 and not calls & tested


def test_no_turn_of_a_training_conversation_is_held_out() -> None:
    rng = random.Random(1)
    for _ in range(50):
        conversation, _ = call_conversation(rng, test=False, turns=4)
        for message in conversation["messages"]:
            for call in message.get("tool_calls", ()):
                assert not held_out(call["function"]["name"], call["function"]["arguments"])


def test_sum_without_thinking_has_no_steps() -> None:
    conversation = sum_conversation(Sum(1, 2), random.Random(0), thinking=False)
    assert conversation["enable_thinking"] is False and "reasoning_content" not in conversation["messages"][1]


def test_standard_library_is_bounded() -> None:
    texts = list(standard_library(200_000))
    assert 150_000 < sum(map(len, texts)) <= 200_000


def test_files_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    sizes = {"sums": 50, "calls": 10, "repeats": 10, "text_bytes": 10_000}
    first = write_quickstart_data(tmp_path / "a", seed=3, **sizes)
    second = write_quickstart_data(tmp_path / "b", seed=3, **sizes)
    other = write_quickstart_data(tmp_path / "c", seed=4, **sizes)
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes()
    assert first["sums"].read_bytes() != other["sums"].read_bytes()
    assert not list(tmp_path.rglob("*.partial"))
