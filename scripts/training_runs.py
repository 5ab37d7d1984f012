"""Runs of `glm45 train` in processes of their own, one or several, to be watched and killed by tests and proofs."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from glm45_jax.train import read_metrics

ROOT = Path(__file__).parents[1]
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
TINY: dict[str, Any] = {
    "model": {
        "preset": "tiny", "hidden_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 0,
        "num_attention_heads": 2, "num_nextn_predict_layers": 0,
    },
    "steps": 40, "batch_size": 4, "seq_len": 64, "log_every": 1, "save_every": 2, "keep": 2, "tensorboard": False,
    "optimizer": {"learning_rate": "1e-2", "min_learning_rate": 1e-3, "warmup_steps": 2},
    "distributed": {"heartbeat_timeout_seconds": 10},
}  # fmt: skip


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of a tiny model and text for it, with packing both ways; returns the YAML file."""
    rng = random.Random(0)
    words = [rng.choice("abcdefg") * rng.randrange(1, 4) for _ in range(4000)]
    (folder / "text.txt").write_text(" ".join(words))
    chats = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w * 2}]} for w in words[:40]
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    sources: list[dict[str, Any]] = [{"path": str(folder / "text.txt"), "chunk_bytes": 1000}]
    sources += [{"path": str(folder / "chats.jsonl"), "packing": "best_fit", "weight": 0.5}]
    tree = {**TINY, "data": {"sources": sources}, "compilation_cache": str(folder / "cache"), **changes}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


class Run:
    """`glm45 train RECIPE output_dir=OUT --digest`, in `processes` processes that find each other on this machine."""

    def __init__(
        self, recipe: Path, out: Path, *overrides: str, processes: int = 1, optimised: bool = False,
        each: Sequence[Sequence[str]] = (),
    ):  # fmt: skip
        """`each`: more overrides, for one process after another."""
        self.out, self.began = out, time.monotonic()
        command = [sys.executable, "-m", "glm45_jax", "train", str(recipe), f"output_dir={out}", "--digest", *overrides]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if not optimised:  # compiling is most of a tiny run's time
            environment["XLA_FLAGS"] = QUICK
        if processes > 1:
            environment["GLM45_COORDINATOR_ADDRESS"] = f"localhost:{_free_port()}"
            environment["GLM45_NUM_PROCESSES"] = str(processes)
        self.processes, self._logs = [], []
        out.parent.mkdir(parents=True, exist_ok=True)
        for i in range(processes):
            own = {**environment, "GLM45_PROCESS_ID": str(i)} if processes > 1 else environment
            log = out.with_name(f"{out.name}.{i}.log")
            more = each[i] if i < len(each) else ()
            with open(log, "wb") as stderr:
                process = subprocess.Popen(
                    [*command, *more], stdout=subprocess.PIPE, stderr=stderr, text=True, env=own, cwd=ROOT
                )
            self.processes.append(process)
            self._logs.append(log)

    def said(self, process: int = 0) -> str:
        """What it wrote to standard error."""
        return self._logs[process].read_text("utf-8", "replace")

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit codes, once all have ended; all are killed at the end of the time."""
        end = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(end - time.monotonic(), 0.01))
        finally:
            self.kill()
        return [process.returncode for process in self.processes]

    def digest(self, timeout: float = 300) -> str:
        """Of the final parameters; the run must end well."""
        codes = self.wait(timeout)
        assert not any(codes), (codes, [self.said(i)[-2000:] for i in range(len(codes))])
        stdout = self.processes[0].stdout
        assert stdout is not None
        return stdout.read().strip().splitlines()[-1]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def signal_when(
        self, condition: Callable[[], bool], process: int = 0, number: int = signal.SIGKILL, timeout: float = 300
    ) -> bool:
        """Sends the signal to one process at the first moment at which `condition` holds; False if it ended before."""
        end = time.monotonic() + timeout
        while self.processes[process].poll() is None:
            if condition():
                self.processes[process].send_signal(number)
                return True
            assert time.monotonic() < end, self.said(process)[-2000:]
            time.sleep(0.0005)
        return False

    def logged(self, step: int) -> bool:
        """Whether metrics.jsonl tells of the step."""
        file = self.out / "metrics.jsonl"
        return file.exists() and f'"step": {step},' in file.read_text()

    def unfinished(self) -> list[str]:
        """The checkpoints that stand there unfinished."""
        folder = self.out / "checkpoints"
        return sorted(p.name for p in folder.glob("*tmp*")) if folder.is_dir() else []

    def being_saved(self, after: int = 0) -> bool:
        """A checkpoint stands there unfinished, and `after` whole ones before it."""
        return bool(self.unfinished()) and len(checkpoints(self.out)) >= after


def checkpoints(out: Path) -> list[int]:
    """The steps of the whole checkpoints of a run."""
    folder = out / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []


def losses(out: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["cross_entropy"]) for m in read_metrics(out) if "cross_entropy" in m]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
