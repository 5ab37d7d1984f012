"""What the tests of scripts/tpu_vm share: a small checkout with the scripts in it, and a cloud that is played."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import ROOT

STUB_GCLOUD = Path(__file__).with_name("stub_gcloud.py")
SETTINGS = {"PROJECT": "my-project", "ZONE": "us-east5-a", "NAME": "glm", "ACCELERATOR_TYPE": "v5p-16"}
WHERE = ["--project=my-project", "--zone=us-east5-a"]


class Cloud:
    """A user's machine: a checkout, a folder with tpu.env in it, and a gcloud on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.stub = folder / "stub"
        self.checkout = folder / "checkout"
        self.cwd = folder / "work"
        programs = folder / "programs"
        for made in (self.stub, self.cwd, programs):
            made.mkdir(parents=True)
        self._program(programs / "gcloud", f'exec "{sys.executable}" -S -E "{STUB_GCLOUD}" "$@"')
        self._program(programs / "hostname", 'echo "${STUB_HOST:-laptop}"')
        self.state = folder / "state"
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "STUB": str(self.stub),
            "GLM45_TPU_STATE": str(self.state),
            "GLM45_STOP_GRACE": "5",
        }
        self.write_settings(**SETTINGS)
        self.set_world()
        self._make_checkout()

    def _program(self, path: Path, body: str) -> None:
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def _make_checkout(self) -> None:
        shutil.copytree(ROOT / "scripts" / "tpu_vm", self.checkout / "scripts" / "tpu_vm")
        shutil.copy(ROOT / "scripts" / "setup_env.sh", self.checkout / "scripts")
        (self.checkout / "recipes").mkdir()
        (self.checkout / "recipes" / "big.yaml").write_text("output_dir: gs://bucket/runs/big\n")
        subprocess.run(["git", "init", "-q", str(self.checkout)], check=True)

    def write_settings(self, **settings: str) -> None:
        (self.cwd / "tpu.env").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    # --- the cloud ---------------------------------------------------------------------------------------------------

    def set_world(self, **changes: Any) -> None:
        file = self.stub / "world.json"
        with open(self.stub / "lock", "w") as lock:  # the stub's own, for it may be at work
            fcntl.flock(lock, fcntl.LOCK_EX)
            world = json.loads(file.read_text()) if file.exists() else FRESH
            file.with_suffix(".new").write_text(json.dumps({**world, **changes}))
            file.with_suffix(".new").replace(file)

    def world(self) -> dict[str, Any]:
        return json.loads((self.stub / "world.json").read_text())

    def calls(self) -> list[list[str]]:
        file = self.stub / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def forget_calls(self) -> None:
        (self.stub / "calls.jsonl").unlink(missing_ok=True)

    def steps(self) -> list[str]:
        """The calls that change something, in short: create, delete, setup, start, stop."""
        names = {
            "queued-resources create": "create",
            "queued-resources delete": "delete",
            "worker.sh install": "setup",
            "worker.sh start": "start",
            "worker.sh stop": "stop",
        }
        lines = [" ".join(call) for call in self.calls()]
        return [step for line in lines for words, step in names.items() if words in line]

    def glm45_calls(self) -> dict[str, list[dict[str, Any]]]:
        """What each worker's `glm45` was called with, by worker."""
        files = sorted(self.stub.glob("hosts/*/glm45-calls.jsonl"))
        return {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}

    # --- the user ----------------------------------------------------------------------------------------------------

    def start(self, command: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        script = self.checkout / "scripts" / "tpu_vm" / f"{command}.sh"
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            cwd=self.cwd,
            env=self.environment,
            stdin=options.get("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(command, *arguments)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == code, f"{command} ended with {process.returncode}\n{out}\n{errors}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    def launched(self, *arguments: str, behaviour: str = "run", **settings: str) -> None:
        """A TPU that is created and set up, with a run in it; no calls are remembered."""
        self.write_settings(**{**SETTINGS, **settings})
        self.set_world(behaviour=behaviour)
        self.run("create")
        self.run("setup")
        self.run("launch", *(arguments or ("recipes/big.yaml",)))
        self.forget_calls()

    def states(self) -> list[str]:
        """What each worker does."""
        lines = self.run("status").stdout.splitlines()
        return [line.split(" ", 2)[2] for line in lines if line.startswith("glm45-worker")]


FRESH: dict[str, Any] = {
    "states": [],  # of the queued resource, one for each look; the last stays; none: there is no such resource
    "created": [],  # the states after each creation; then ["ACTIVE"]
    "nodes": {},
    "failures": [],
    "behaviour": "run",  # of glm45: run until it is stopped, or an exit code
    "behaviours": [],  # of it after each launch
}


def wait_for(what: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)
