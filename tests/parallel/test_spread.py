"""On every mesh the model computes what it computes on one device, with the collectives that it is meant to have."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.on_devices import CASES, OTHERS
from tests.support import ROOT

# What each program asks for, of each kind over each set of axes: one line a case. If a change of it is meant, put the
# case's new line in; it is in the failure's message.
COLLECTIVES = json.loads((Path(__file__).parent / "collectives.json").read_text())
QUICK = ("decode",)
TOLERANCE = 2e-5  # float32, sums in another order
_TOGETHER = 6  # cases of one process


@functools.cache
def results(names: tuple[str, ...]) -> dict[str, Any]:
    """Of several cases, by one process with eight devices."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.parallel.on_devices", *names]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    found = {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}
    return {name: found.get(name, {"failed": done.stderr[-3000:]}) for name in names}


def cases(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


def result(name: str) -> Any:
    others = [n for n in (*CASES, *OTHERS) if n not in QUICK]
    groups = [QUICK, *(tuple(others[at : at + _TOGETHER]) for at in range(0, len(others), _TOGETHER))]
    found = results(next(group for group in groups if name in group))[name]
    assert "failed" not in found, found["failed"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", cases([*CASES, *OTHERS]))
def test_values_are_those_of_one_device(name: str) -> None:
    wrong = {leaf: error for leaf, error in result(name)["errors"].items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.parametrize("name", cases(CASES))
def test_gradients_lie_as_parameters(name: str) -> None:
    assert result(name)["gradients_lie_as_params"]


@pytest.mark.parametrize("name", cases(COLLECTIVES))
def test_collectives_are_those_that_are_meant(name: str) -> None:
    found = result(name)["collectives"]
    assert found == COLLECTIVES[name], json.dumps({name: found})


@pytest.mark.slow
def test_what_finds_no_room_is_dropped_and_counted() -> None:
    found = result("dropping")
    assert found["dropped"] == found["expected"] and sum(found["dropped"]) > 0
