"""A gcloud that reaches no cloud: it writes down how it is called, and plays queued resources and their workers.

Everything lies in the folder $STUB: `calls.jsonl` (a list of arguments per line), `world.json` (what the cloud looks
like) and `hosts/NODE.WORKER/`, the home of each worker. A command over ssh runs in that home, by a shell, as sshd
would run it; so quoting, detaching and states are the real thing. Installing alone is played: it leaves an environment
whose `glm45` writes down its arguments (`glm45-calls.jsonl`) and then does what the world's next behaviour says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STUB = Path(os.environ["STUB"])
WORKERS = 2  # of a slice

FAKE_GLM45 = f"""#!{sys.executable} -SE
import json, os, sys, time
with open(os.environ["STUB"] + "/world.json") as file:
    behaviour = json.load(file)["behaviour"]
with open(os.path.expanduser("~/glm45-calls.jsonl"), "a") as file:
    print(json.dumps(dict(argv=sys.argv[1:], cwd=os.getcwd(), env=dict(os.environ))), file=file)
print("behaviour", behaviour, flush=True)
if behaviour == "run":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    time.sleep(60)
sys.exit(int(behaviour))
"""


@contextlib.contextmanager
def world() -> Iterator[dict[str, Any]]:
    """The world, to be read and changed; slices are served side by side, so under a lock."""
    with open(STUB / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads((STUB / "world.json").read_text())
        yield state
        new = STUB / "world.json.partial"
        new.write_text(json.dumps(state))
        new.replace(STUB / "world.json")


def flag(argv: list[str], name: str) -> str | None:
    return next((a.split("=", 1)[1] for a in argv if a.startswith(name + "=")), None)


def fail(message: str, code: int = 1) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return code


def main(argv: list[str]) -> int:
    with world() as state:
        with open(STUB / "calls.jsonl", "a") as file:
            print(json.dumps(argv), file=file)
        for failure in state["failures"]:  # [words that the call must hold, message, how often]
            if failure[2] and all(word in " ".join(argv) for word in failure[0]):
                failure[2] -= 1
                return fail(failure[1])
    words = [a for a in argv if not a.startswith("-")]
    if words[:2] == ["storage", "cp"]:
        target = STUB / "bucket" / words[3].removeprefix("gs://")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(words[2], target)
        return 0
    words = words[words.index("tpus") + 1 :]
    return {
        ("queued-resources", "create"): create,
        ("queued-resources", "describe"): describe,
        ("queued-resources", "delete"): delete,
        ("tpu-vm", "describe"): describe_node,
        ("tpu-vm", "ssh"): ssh,
        ("tpu-vm", "scp"): scp,
    }[words[0], words[1]](words[2:], argv)


def create(words: list[str], argv: list[str]) -> int:
    count = int(flag(argv, "--node-count") or 1)
    prefix = flag(argv, "--node-prefix")
    names = [f"{prefix}-{i}" for i in range(count)] if prefix else [flag(argv, "--node-id")]
    with world() as state:
        state["states"] = state["created"].pop(0) if state["created"] else ["ACTIVE"]
        state["nodes"] = dict.fromkeys(names, "READY")
    return 0


def describe(words: list[str], argv: list[str]) -> int:
    with world() as state:
        if not state["states"]:
            return fail(f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{words[0]}' was not found")
        current = state["states"][0]
        if len(state["states"]) > 1:
            state["states"].pop(0)
    print(current)
    return 0


def describe_node(words: list[str], argv: list[str]) -> int:
    with world() as state:
        print(state["nodes"][words[0]])
    return 0


def delete(words: list[str], argv: list[str]) -> int:
    with world() as state:
        state["states"], state["nodes"] = [], {}
    end_all()
    shutil.rmtree(STUB / "hosts", ignore_errors=True)
    return 0


def end_all() -> None:
    """The workers' processes end with them."""
    for pid in STUB.glob("hosts/*/glm45-runs/*/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def homes(node: str, worker: str) -> list[Path]:
    numbers = range(WORKERS) if worker == "all" else [int(worker)]
    found = [STUB / "hosts" / f"{node}.{number}" for number in numbers]
    for home in found:
        home.mkdir(parents=True, exist_ok=True)
    return found


def reachable(node: str) -> bool:
    with world() as state:
        return state["nodes"].get(node) == "READY"


def ssh(words: list[str], argv: list[str]) -> int:
    node, command = words[0], flag(argv, "--command")
    if not reachable(node):
        return fail(f"{node} is in an unusable state")
    if "worker.sh start" in command:
        with world() as state:
            if state["behaviours"]:
                state["behaviour"] = state["behaviours"].pop(0)
    # As gcloud and ssh pass it on: cut at spaces, and joined by them again.
    command = " ".join(command.split(" "))
    codes = [run(home, command) for home in homes(node, flag(argv, "--worker") or "0")]
    return next((code for code in codes if code), 0)


def run(home: Path, command: str) -> int:
    if "worker.sh install" in command:
        return install(home / "glm45-jax" / ".venv")
    environment = {**os.environ, "HOME": str(home), "STUB_HOST": home.name}
    return subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode


def install(venv: Path) -> int:
    program = venv / "bin" / "glm45"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(FAKE_GLM45)
    program.chmod(0o755)
    (venv / ".ready").touch()
    return 0


def scp(words: list[str], argv: list[str]) -> int:
    source, node = words[0], words[1].removesuffix(":")
    if not reachable(node):
        return fail(f"{node} is in an unusable state")
    for home in homes(node, flag(argv, "--worker") or "0"):
        shutil.copy(source, home)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
