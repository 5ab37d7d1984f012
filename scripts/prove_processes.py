"""Trains `mini` in one, two and four processes on this machine: one loss curve; kills one of them: the same end.

    python scripts/prove_processes.py --json docs/proofs/processes.json

Each process drives one CPU device, joined by gloo; the state is divided over all (fsdp). For two and for four: an
undisturbed run; one of which a process is killed (SIGKILL) in the middle, timed until the last of the others has ended,
and started again. Then a run of two that SIGTERM to its second process stops, and that four go on with.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances, write_figures
from training_runs import ROOT, Run, checkpoints, losses

HEARTBEAT = 20


@dataclasses.dataclass(frozen=True)
class Proof:
    """Several processes, one curve."""

    json: Path | None = None
    """Where to write the figures."""
    steps: int = 16


def start(folder: Path, name: str, processes: int, steps: int) -> Run:
    overrides = {
        "data.sources.0.path": f"{folder}/text/**/*", "data.sources.0.kind": "text", "steps": steps, "batch_size": 4,
        "seq_len": 128, "log_every": 1, "save_every": 4, "optimizer.warmup_steps": 4, "compilation_cache": "null",
        "distributed.heartbeat_timeout_seconds": HEARTBEAT, "tensorboard": "false",
    }  # fmt: skip
    changes = [f"{key}={value}" for key, value in overrides.items()]
    return Run(ROOT / "recipes" / "mini.yaml", folder / name, *changes, processes=processes, optimised=True)


def difference(a: Path, b: Path) -> float:
    """The largest between two loss curves of the same steps."""
    one, other = losses(a), losses(b)
    assert [step for step, _ in one] == [step for step, _ in other]
    return max(abs(x - y) for (_, x), (_, y) in zip(one, other))


def undisturbed(folder: Path, processes: int, steps: int) -> dict[str, Any]:
    run = start(folder, f"whole{processes}", processes, steps)
    digest = run.digest(1200)
    return {"digest": digest, "seconds": round(time.monotonic() - run.began, 1), "losses": losses(run.out)}


def killed(folder: Path, processes: int, victim: int, steps: int) -> dict[str, Any]:
    run = start(folder, f"killed{processes}_{victim}", processes, steps)
    assert run.signal_when(lambda: run.logged(steps // 2 + 1), victim, timeout=1200)
    began = time.monotonic()
    codes = run.wait(120)
    seconds = time.monotonic() - began
    survivors = [
        next((line[:300] for line in run.said(i).splitlines() if "glm45: " in line or "Terminating" in line), "")
        for i in range(processes)
        if i != victim
    ]
    saved = checkpoints(run.out)
    digest = start(folder, run.out.name, processes, steps).digest(1200)
    return {
        "processes": processes,
        "victim": victim,
        "exit_codes": codes,
        "seconds_until_all_had_ended": round(seconds, 1),
        "survivors_said": survivors,
        "checkpoints_then": saved,
        "digest_after_restart": digest,
        "losses_as_undisturbed": losses(run.out) == losses(folder / f"whole{processes}"),
    }


def stopped(folder: Path, steps: int) -> dict[str, Any]:
    run = start(folder, "stopped", 2, steps)
    assert run.signal_when(lambda: run.logged(steps // 4), 1, signal.SIGTERM, timeout=1200)
    codes, at = run.wait(300), checkpoints(run.out)[-1]
    digest = start(folder, "stopped", 4, steps).digest(1200)
    return {
        "exit_codes": codes,
        "after_step": at,
        "digest_of_four": digest,
        "largest_difference_of_losses": difference(run.out, folder / "whole1"),
    }


def main() -> None:
    proof = tyro.cli(Proof, description=__doc__)
    figures: dict[str, Any] = circumstances("jax", "jaxlib", "orbax-checkpoint", "grain")
    with tempfile.TemporaryDirectory(prefix="prove_processes") as name:
        folder = Path(name)
        shutil.copytree(ROOT / "glm45_jax", folder / "text", ignore=shutil.ignore_patterns("*.pyc", "__pycache__"))
        whole = {n: undisturbed(folder, n, proof.steps) for n in (1, 2, 4)}
        figures |= {"model": "mini", "steps": proof.steps, "batch": [4, 128], "heartbeat_timeout_seconds": HEARTBEAT}
        figures["undisturbed"] = whole
        figures["largest_difference_from_one_process"] = {
            n: difference(folder / f"whole{n}", folder / "whole1") for n in (2, 4)
        }
        figures["killed"] = [killed(folder, n, victim, proof.steps) for n, victim in ((2, 1), (2, 0), (4, 2))]
        for kill in figures["killed"]:
            assert kill["digest_after_restart"] == whole[kill["processes"]]["digest"], kill
            assert kill["losses_as_undisturbed"] and kill["seconds_until_all_had_ended"] < 60, kill
        figures["stopped_by_sigterm_to_one_of_two_and_gone_on_with_by_four"] = stopped(folder, proof.steps)
    write_figures(proof.json, figures, indent=1)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
