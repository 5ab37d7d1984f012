"""scripts/tpu_vm/worker.sh: a process that is detached, watched and ended."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.scripts.tpu_vm import wait_for
from tests.support import ROOT


class Worker:
    """A home with a checkout in it, whose environment has no more than a mark that it is installed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.script = home / "glm45-jax" / "scripts" / "tpu_vm" / "worker.sh"
        self.script.parent.mkdir(parents=True)
        self.script.write_text((ROOT / "scripts/tpu_vm/worker.sh").read_text())
        (home / "glm45-jax" / ".venv").mkdir()
        (home / "glm45-jax" / ".venv" / ".ready").touch()
        self.environment = {**os.environ, "HOME": str(home), "GLM45_STOP_GRACE": "1"}

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            ["bash", str(self.script), *arguments], env=self.environment, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def state(self) -> str:
        return self("status", "run").split(" ", 2)[2].strip()

    def log(self) -> str:
        return (self.home / "glm45-runs" / "run" / "log").read_text()


@pytest.fixture
def worker(tmp_path: Path):
    made = Worker(tmp_path)
    yield made
    made("stop", "run")


def test_states(worker: Worker) -> None:
    assert worker.state() == "idle"
    worker("start", "run", "--", "bash", "-c", "echo out; echo err >&2; exit 3")
    wait_for(lambda: worker.state() != "running")
    assert worker.state() == "exited 3"
    assert "\nout\nerr\n" in worker.log() and "exit code 3" in worker.log()
    worker("start", "run", "--", "true")  # the next run of the name
    wait_for(lambda: worker.state() == "exited 0")
    assert "exit code 3" in worker.log()  # the log goes on


def test_starting_does_not_wait(worker: Worker) -> None:
    before = time.monotonic()
    worker("start", "run", "--", "sleep", "20")
    assert time.monotonic() - before < 5
    assert worker.state() == "running"
    assert "is running already" in worker("start", "run", "--", "true", code=1)
    assert worker.state() == "running"


def test_stop_hands_sigterm_on_and_waits(worker: Worker) -> None:
    """The command has its time to save, and its own exit code counts."""
    save = "trap 'sleep 0.4; echo saved; exit 130' TERM; echo ready; while :; do sleep 0.1; done"
    worker("start", "run", "--", "bash", "-c", save)
    wait_for(lambda: "ready" in worker.log())
    worker("stop", "run")
    assert "saved" in worker.log() and worker.state() == "exited 130"


def test_stop_kills_what_does_not_end(worker: Worker) -> None:
    worker("start", "run", "--", "bash", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done")
    wait_for(lambda: "ready" in worker.log())
    worker("stop", "run")
    wait_for(lambda: worker.state() == "lost")


def test_a_command_whose_supervisor_is_gone_still_runs(worker: Worker) -> None:
    """A second one beside it would be two on one TPU."""
    worker("start", "run", "--", "sleep", "30")
    pid = int((worker.home / "glm45-runs" / "run" / "pid").read_text())
    os.kill(pid, 9)
    wait_for(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_text())
    assert worker.state() == "running"
    worker("stop", "run")
    wait_for(lambda: worker.state() == "lost")


def test_not_installed(worker: Worker) -> None:
    (worker.home / "glm45-jax" / ".venv" / ".ready").unlink()
    assert "the project is not installed; run setup.sh" in worker("start", "run", "--", "true", code=1)


def test_a_command_that_is_not_there(worker: Worker) -> None:
    worker("start", "run", "--", "no-such-program")
    wait_for(lambda: worker.state() == "exited 127")


def test_install_brings_a_newer_python_where_there_is_none(worker: Worker, tmp_path: Path) -> None:
    """Images of TPU VMs have Python 3.10: uv brings one, and setup_env makes the environment with it."""
    programs = tmp_path / "programs"
    programs.mkdir()
    fetched = tmp_path / "fetched"
    says_old = (
        'case "$*" in *version_info*) exit 1 ;; *"uv python find"*) echo "$FETCHED" ;; esac\necho "$*" >>"$CALLS"'
    )
    for name in ("python3", "python", "python3.11", "python3.12", "python3.13", "python3.14"):
        (programs / name).write_text(f"#!/bin/sh\n{says_old}\n")
        (programs / name).chmod(0o755)
    fetched.write_text(
        "#!/bin/sh\n"
        'echo "fetched $*" >>"$CALLS"\n'
        'case "$*" in "-m venv"*) mkdir -p .venv/bin && cp "$FETCHED" .venv/bin/python ;; esac\n'
    )
    fetched.chmod(0o755)
    checkout = worker.home / "glm45-jax"
    (checkout / ".venv" / ".ready").unlink()
    (checkout / ".venv").rmdir()
    (checkout / "scripts" / "setup_env.sh").write_text((ROOT / "scripts/setup_env.sh").read_text())
    for name in ("pyproject.toml", "scripts/constraints.txt"):
        (checkout / name).write_text("")
    calls = tmp_path / "calls"
    worker.environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "FETCHED": str(fetched), "CALLS": str(calls)}
    worker("install", "tpu,data")
    lines = calls.read_text().splitlines()
    assert "-m pip install --quiet --user uv" in lines and "-m uv python install --quiet 3.12" in lines
    assert "fetched -m venv --without-pip .venv" in lines
    assert any(line.startswith("fetched -m pip install") and line.endswith("--editable .[tpu,data]") for line in lines)
    assert (checkout / ".venv" / ".ready").exists()
