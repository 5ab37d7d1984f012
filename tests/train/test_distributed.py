"""How a process finds the others, and what goodput counts."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import types

import pytest

from glm45_jax.errors import UserError
from glm45_jax.train import DistributedConfig, distributed, report
from glm45_jax.train.distributed import _address, _others_in, gather, initialize
from glm45_jax.train.report import Reporter, read_metrics
from tests.support import ROOT

THREE = {"GLM45_COORDINATOR_ADDRESS": "host:1", "GLM45_NUM_PROCESSES": "4", "GLM45_PROCESS_ID": "3"}


def test_a_process_by_itself():
    assert _address(DistributedConfig(), {}) is None
    assert _address(DistributedConfig(num_processes=1, process_id=0), {}) is None
    assert not _others_in(DistributedConfig(), {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "JAX_PLATFORMS": "cpu"})
    assert not _others_in(DistributedConfig(auto=False), {"TPU_WORKER_HOSTNAMES": "a,b"})
    assert gather({"a": (1, 2)}) == [{"a": (1, 2)}]


def test_addresses_by_the_environment_and_by_the_configuration():
    expected = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
    assert _address(DistributedConfig(), THREE) == expected
    assert _address(DistributedConfig(process_id=2), THREE) == {**expected, "process_id": 2}
    assert _address(DistributedConfig(**expected), {}) == expected


def test_environments_that_jax_knows():
    assert _others_in(DistributedConfig(), {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"})
    assert not _others_in(
        DistributedConfig(), {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1", "JAX_PLATFORMS": "cpu"}
    )
    assert _others_in(DistributedConfig(), {"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not _others_in(DistributedConfig(), {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"})
    assert _others_in(DistributedConfig(auto=True), {})


def test_tpu_vms_are_asked_for_their_number(monkeypatch):
    asked = []

    def answer(request, timeout):
        asked.append((request.full_url, request.headers))
        return io.BytesIO(workers.encode())

    monkeypatch.setattr(distributed.urllib.request, "urlopen", answer)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
    assert not _others_in(DistributedConfig(), {}) and not asked, "no TPU here"
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"])
    workers = "10.0.0.1"
    assert not _others_in(DistributedConfig(), {})
    workers = "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2"
    assert _others_in(DistributedConfig(), {})
    assert asked[0][0].endswith("worker-network-endpoints") and asked[0][1] == {"Metadata-flavor": "Google"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "message"),
    [(1, "no answer within 2 s"), (0, "Is every process started, each with its own process_id")],
)
def test_processes_that_do_not_find_each_other(process, message):
    """In a process of its own, whose jax is in no use yet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = f"""
from glm45_jax.train.distributed import DistributedConfig, initialize
initialize(DistributedConfig(coordinator_address="localhost:{port}", num_processes=2, process_id={process},
                             initialization_timeout_seconds=2))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode != 0
    assert f"the run's processes cannot join (this one: {process} of 2, localhost:{port}" in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"process_id": 1}, {}, "coordinator_address, num_processes missing"),
        ({"coordinator_address": "host", "num_processes": 2, "process_id": 1}, {}, "expected HOST:PORT"),
        ({"coordinator_address": "host:1", "num_processes": 2, "process_id": 2}, {}, r"must lie in 0\.\.1"),
        ({}, {**THREE, "GLM45_PROCESS_ID": "x"}, "GLM45_PROCESS_ID is 'x'"),
    ],
)
def test_bad_addresses_are_named(changes, environment, message):
    with pytest.raises(UserError, match=message):
        _address(DistributedConfig(**changes), environment)


def test_too_late_to_join():
    import jax

    jax.devices()
    late = DistributedConfig(coordinator_address="localhost:1", num_processes=2, process_id=0)
    with pytest.raises(UserError, match="before"):
        initialize(late)
    with pytest.raises(UserError, match="heartbeat_timeout_seconds is 0"):
        DistributedConfig(heartbeat_timeout_seconds=0)


def test_goodput_counts_the_steps_that_remain(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(report, "time", clock)

    def logged(start, laps):
        """Runs from `start`, at 100 in this clock, and logs after every (seconds, useful, step)."""
        clock.now = 100.0
        with Reporter(tmp_path, 100, start, began=90.0, tensorboard=False) as reporter:
            for seconds, useful, step in laps:
                clock.now += seconds
                reporter.clock.lap(useful=useful)
                reporter.log(step, {"loss": 1.0})
        return [(m["step"], m["seconds"], round(m["goodput"], 6)) for m in read_metrics(tmp_path)]

    # ten seconds before the clock's first lap, which is the start: of no use
    first = logged(0, [(0, False, 0), (20, True, 10), (5, False, 11), (25, True, 20)])
    assert first[-1] == (20, 60, round(45 / 60, 6))
    # killed and gone on from step 10: what came after counts as time, its steps as nothing
    second = logged(10, [(0, False, 10), (30, True, 20)])
    assert [step for step, *_ in second] == [0, 10, 10, 20]
    assert second[-1] == (20, 60 + 40, round((20 + 30) / 100, 6))


def test_a_process_that_reports_nothing(tmp_path, capfd):
    with Reporter(None, 10, 0, began=0.0, tensorboard=True) as reporter:
        reporter.say("a word")
        reporter.log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_metrics_of_an_older_run_have_no_goodput(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "seconds": 2.0}) + "\n")
    with Reporter(tmp_path, 10, 1, began=0.0, tensorboard=False) as reporter:
        assert reporter.clock.goodput == 0
