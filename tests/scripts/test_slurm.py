"""scripts/slurm/train.sbatch, with a srun and a scontrol that write down how they are called."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.tpu_vm import wait_for
from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
HARD = ["recipes/mini.yaml", "a=two  words", "b='\"$HOME", "c="]

# Runs the rest of its arguments as Slurm does, one task; SIGTERM is handed on to it, as srun does.
SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$STUB/srun"
while [[ $1 == --* ]]; do shift; done
"$@" &
task=$!
trap 'kill -TERM $task' TERM
while code=0; wait $task || code=$?; kill -0 $task 2>/dev/null; do :; done
exit $code
"""
GLM45 = f"""#!{sys.executable} -SE
import os, signal, sys, time
def stop(*_):
    time.sleep(0.3)  # it saves
    open(os.environ["STUB"] + "/saved", "w").close()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
open(os.environ["STUB"] + "/running", "w").close()
time.sleep(float(os.environ["SECONDS_TO_RUN"]))
sys.exit(int(os.environ["CODE"]))
"""


class Job:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stub("programs/srun", SRUN)
        self.stub("programs/scontrol", '#!/bin/sh\necho "$@" >"$STUB/scontrol"\n')
        self.stub("checkout/.venv/bin/glm45", GLM45)
        self.environment = {
            "PATH": f"{folder / 'programs'}:{os.environ['PATH']}",
            "STUB": str(folder),
            "SLURM_JOB_ID": "77",
            "SLURM_SUBMIT_DIR": str(folder / "checkout"),
        }

    def stub(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def start(self, *arguments: str, seconds: float = 0, code: int = 0) -> subprocess.Popen[str]:
        environment = {**self.environment, "SECONDS_TO_RUN": str(seconds), "CODE": str(code)}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def requeued(self) -> bool:
        file = self.folder / "scontrol"
        return file.exists() and file.read_text() == "requeue 77\n"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_arguments_reach_every_task(job: Job) -> None:
    process = job.start(*HARD)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    given = (job.folder / "srun").read_text()[:-1].split("\0")
    program = str(job.folder / "checkout" / ".venv" / "bin" / "glm45")
    assert given == ["--kill-on-bad-exit=1", "--gpu-bind=none", program, "train", *HARD]
    assert not job.requeued()


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_signals(job: Job, number: int, requeued: bool) -> None:
    """At the time limit the run saves and is requeued; cancelled or preempted it saves, and the rest is Slurm's."""
    process = job.start("recipes/mini.yaml", seconds=30)
    wait_for((job.folder / "running").exists)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert (job.folder / "saved").exists()  # waited for
    assert job.requeued() == requeued


@pytest.mark.parametrize("code", [1, 2])
def test_a_failing_run_is_not_requeued(job: Job, code: int) -> None:
    process = job.start("recipes/mini.yaml", code=code)
    process.communicate(timeout=20)
    assert process.returncode == code and not job.requeued()


def test_it_tells_what_is_missing(job: Job) -> None:
    assert "no configuration" in job.start().communicate(timeout=20)[1]
    (job.folder / "checkout/.venv/bin/glm45").unlink()
    assert "pip install -e '.[cuda,data]'" in job.start("recipes/mini.yaml").communicate(timeout=20)[1]
    del job.environment["SLURM_JOB_ID"]
    assert "Submit it: sbatch scripts/slurm/train.sbatch" in job.start("recipes/mini.yaml").communicate(timeout=20)[1]


def test_directives() -> None:
    """Slurm reads directives up to the first command only, and JAX takes a task to be one GPU."""
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", "\n".join(lines[:first]), re.MULTILINE))
    assert len(given) == sum(line.startswith("#SBATCH") for line in lines)
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    assert given["signal"] == "B:USR1@600" and "requeue" in given and given["open-mode"] == "append"


def test_jax_takes_a_task_to_be_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the script rests on: from Slurm's variables JAX takes the task's number on its host as its device."""
    from jax._src.clusters import ClusterEnv

    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    coordinator, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, "slurm", 10
    )
    assert coordinator.startswith("gpu03:") and (processes, process, devices) == (16, 11, [3])
