"""Kills `glm45 train` at random moments, saves included, and shows that every run goes on and ends the same.

    python scripts/prove_resume.py --json docs/proofs/resume.json
    python scripts/prove_resume.py --kills 10 --seed 3

A tiny model with every part of the family (dense and MoE layers, MTP layer), two micro-batches, packing both ways, a
checkpoint every other step. First one undisturbed run; then runs that are killed (SIGKILL) and started again until so
many kills are done: a third at a moment drawn from the whole life of a process, a third while a checkpoint is being
written, a third a moment after the process began to train. Whenever a run reaches its end, digest and losses are
compared with the undisturbed one's, and a new one begins. A run that fails or ends otherwise ends the proof.
"""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances
from rich.progress import track
from training_runs import TINY, Run, checkpoints, losses, write_recipe

MODEL = {"preset": "tiny", "hidden_size": 32, "num_attention_heads": 2, "n_routed_experts": 4}
STEPS = 30


@dataclasses.dataclass(frozen=True)
class Proof:
    """Fifty kills, the same end."""

    json: Path | None = None
    """Where to write the figures."""
    kills: int = 50
    seed: int = 0


def last_step(out: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    steps = losses(out) if (out / "metrics.jsonl").exists() else []
    return steps[-1][0] if steps else 0


def moment(kind: str, run: Run, length: float, rng: random.Random) -> Callable[[], bool]:
    """The condition at which this kill comes."""
    if kind == "any":
        end = run.began + rng.uniform(0, length)
        return lambda: time.monotonic() > end
    if kind == "saving":
        which, seen = rng.randrange(1, 4), set()

        def saving() -> bool:
            """The first, second or third checkpoint of this process stands there unfinished."""
            seen.update(unfinished := set(run.unfinished()))
            return bool(unfinished) and len(seen) >= which

        return saving
    start = last_step(run.out)
    step = start + rng.randrange(1, 6)
    return lambda: any(run.logged(s) for s in range(step, STEPS))


def kill_once(recipe: Path, out: Path, kind: str, length: float, rng: random.Random) -> dict[str, Any] | str:
    """One process, killed; what stood there then. Its digest where it ended before."""
    run = Run(recipe, out)
    killed = run.signal_when(moment(kind, run, length, rng))
    codes = run.wait()
    if not killed or codes != [-signal.SIGKILL]:
        return run.digest()
    return {
        "kind": kind,
        "seconds": round(time.monotonic() - run.began, 2),
        "at_step": last_step(out),
        "newest_whole_checkpoint": max(checkpoints(out), default=0),
        "left_unfinished": run.unfinished(),
    }


def prove(folder: Path, proof: Proof) -> dict[str, Any]:
    recipe = write_recipe(folder, model=MODEL, steps=STEPS, accumulation=2)
    Run(recipe, folder / "compiled").digest()
    began = time.monotonic()
    digest = Run(recipe, folder / "whole").digest()
    length, curve = time.monotonic() - began, losses(folder / "whole")
    rng, kills, runs, ends = random.Random(proof.seed), [], 0, []

    def ended(found: str, out: Path) -> None:
        assert found == digest, f"{out}: {found} instead of {digest}"
        assert losses(out) == curve, f"{out}: the losses differ"
        ends.append({"kills": sum(kill["run"] == runs for kill in kills), "digest": found})

    kinds = ["any", "saving", "training"]
    for number in track(range(proof.kills), description="kills"):
        result: dict[str, Any] | str = ""
        while isinstance(result, str):
            out = folder / f"run{runs}"
            result = kill_once(recipe, out, kinds[number % 3], length, rng)
            if isinstance(result, str):
                ended(result, out)
                runs += 1
        kills.append({"run": runs, **result})
    out = folder / f"run{runs}"
    ended(Run(recipe, out).digest(), out)
    return {
        "steps": STEPS,
        "checkpoint_every": TINY["save_every"],
        "undisturbed": {"digest": digest, "seconds": round(length, 2)},
        "kills": len(kills),
        "while_a_checkpoint_was_unfinished": sum(bool(kill["left_unfinished"]) for kill in kills),
        "most_steps_lost": max(kill["at_step"] - kill["newest_whole_checkpoint"] for kill in kills),
        "runs_that_reached_the_end": ends,
        "all_bit_identical": all(end["digest"] == digest for end in ends),
        "each": kills,
    }


def main() -> None:
    proof = tyro.cli(Proof, description=__doc__)
    figures: dict[str, Any] = circumstances("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "grain")
    with tempfile.TemporaryDirectory(prefix="prove_resume") as folder:
        figures |= prove(Path(folder), proof)
    text = json.dumps(figures, indent=1)
    if proof.json is not None:
        proof.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
