"""Measures what the training recipe promises, with `mini` on the installed standard library: 40 minutes on two cores.

    python scripts/prove_recipe.py --json docs/proofs/recipe.json --plot docs/images/recipe.png

  language   recipes/mini-chain.yaml as it stands but for its text, then held-out text in bits per byte, against an
             interpolated Kneser-Ney trigram over the same tokens of all the training text
  drafts     on held-out text: how often the MTP layer's choice for the token after the next is the main model's, which
             is how often speculative decoding, greedy, would accept it
  balance    the busiest expert's load over the mean, for each MoE layer over the last 100 steps, with the updates of
             the routers' biases and without
  muon       steps until the loss at which AdamW ends, at the best of three learning rates for each

Runs that are there already, in --work, are not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
import xxhash
import yaml
from circumstances import circumstances, write_figures
from kneser_ney import KneserNey
from rich.console import Console

from glm45_jax.config import ModelConfig
from glm45_jax.data.generated import standard_library
from glm45_jax.model.decoder import head_logits, head_weight, hidden_states, mtp_head_weight, mtp_hidden, rows_of
from glm45_jax.text import Tokenizer
from glm45_jax.train import load_recipe, read_metrics, run_recipe, train
from glm45_jax.train.config import TrainConfig
from glm45_jax.train.tokenizer import prepare_tokenizer

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "mini-chain.yaml"
CONSOLE = Console(stderr=True)
WINDOW, ROWS = 1024, 4  # of held-out text: as long as the recipe's last stage trains
LAST = 100  # steps over which loads are summed


@dataclasses.dataclass(frozen=True)
class Proof:
    """The recipe's promises, measured."""

    json: Path | None = None
    """Where to write the figures."""
    plot: Path | None = None
    """Where to draw Muon beside AdamW."""
    work: Path = Path("runs/prove-recipe")
    """Where runs are kept."""
    steps: int = 200
    """Of each of the short runs: Muon, AdamW, without balance."""
    rates: tuple[float, ...] = (2e-3, 5e-3, 1e-2)
    """Learning rates that Muon and AdamW are tried with."""
    overrides: tuple[str, ...] = ()
    """Of the recipe, as for `glm45 train`; to try things out."""


# --- data ------------------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> dict[str, Path]:
    """The standard library as training text and, a twentieth of it, chosen by a hash, as held-out text."""
    files = {name: folder / f"{name}.jsonl" for name in ("train", "code", "held_out")}
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {name: [] for name in files}
    for text in standard_library(10**9):
        held_out = xxhash.xxh3_64_intdigest(text.encode()) % 20 == 0
        texts["held_out" if held_out else "train"].append(text)
        if not held_out and "\nimport " in text:
            texts["code"].append(text)
    for name, file in files.items():
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[name]), "utf-8")
            os.replace(partial, file)
    return files


def documents(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]


# --- language and drafts ---------------------------------------------------------------------------------------------


def train_chain(proof: Proof, files: dict[str, Path]) -> tuple[Any, dict[str, Any]]:
    """The recipe's last result, and what it took."""
    place = lambda name, **more: yaml.safe_dump([{"path": str(files[name]), **more}], default_flow_style=True)  # noqa: E731
    stages = load_recipe(
        RECIPE,
        [
            f"output_dir={proof.work / 'chain'}",
            f"data.sources={place('train')}",
            f"stages.1.data.sources={place('code')}",
            f"stages.2.data.sources={place('train', packing='best_fit', overlong='split')}",
            *proof.overrides,
        ],
    )
    started = time.monotonic()
    result = run_recipe(stages, console=CONSOLE)
    if not result.finished:
        sys.exit("stopped; the same command goes on from there")
    seconds = [sum_of_seconds(str(stage.config.output_dir)) for stage in stages]
    return result, {
        "stages": [
            {"name": s.name, "tokens": s.tokens, "seq_len": s.config.seq_len, "rope_theta": s.config.model.rope_theta}
            for s in stages
        ],
        "training_seconds": [round(s, 1) for s in seconds],
        "seconds_of_this_call": round(time.monotonic() - started, 1),
        "skipped_steps": int(result.state.skipped),
    }


def sum_of_seconds(folder: str) -> float:
    """From the first logged step to the last; of the newest process, where a run was stopped."""
    return max(row["seconds"] for row in read_metrics(folder) if "seconds" in row)


@jax.jit
def _agreement(main: jax.Array, draft: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    same = (jnp.argmax(main, -1) == jnp.argmax(draft, -1)) & counted
    return same.sum(), counted.sum()


def score(params: Any, config: ModelConfig, tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Losses of the model on `texts` in windows, and how often drafts agree."""
    windows = [
        tokens[at : at + WINDOW] for tokens in map(tokenizer.encode, texts) for at in range(0, len(tokens), WINDOW)
    ]
    windows = [window for window in windows if len(window) > 3]

    @jax.jit
    def measure(params: Any, tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
        rows = rows_of(tokens, None, segments, None)
        hidden, _, _ = hidden_states(params, config, tokens, rows)
        logits = head_logits(hidden[:, :-1], head_weight(params, config))
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[..., 0]
        counted = segments[:, 1:] != 0
        out, _ = mtp_hidden(params, config, hidden[:, :-1], tokens[:, 1:], type(rows)(*(x[:, :-1] for x in rows)))
        draft = head_logits(out[:, :-1], mtp_head_weight(params, config))
        return jnp.where(counted, loss, 0).sum(), counted.sum(), *_agreement(logits[:, 1:], draft, counted[:, 1:])

    totals = np.zeros(4)
    for first in range(0, len(windows), ROWS):
        tokens, segments = np.zeros((2, ROWS, WINDOW), np.int32)
        for row, window in enumerate(windows[first : first + ROWS]):
            tokens[row, : len(window)], segments[row, : len(window)] = window, 1
        totals += [float(x) for x in measure(params, tokens, segments)]
    loss, count, agreed, drafts = totals
    return {"nats_per_token": loss / count, "tokens": int(count), "mtp_acceptance": agreed / drafts}


def language(proof: Proof, files: dict[str, Path]) -> dict[str, Any]:
    """The chain's model and the trigram on the same held-out tokens."""
    result, about = train_chain(proof, files)
    tokenizer, held_out = result.tokenizer, documents(files["held_out"])
    found = score(result.params, result.config.model, tokenizer, held_out)
    encoded = [np.array(tokenizer.encode(text)) for text in documents(files["train"])]
    trigram = KneserNey(encoded, tokenizer.vocab_size)
    losses = []
    for text in held_out:
        tokens = np.array(tokenizer.encode(text))
        loss = -trigram.log_probabilities(tokens)
        for at in range(0, len(tokens), WINDOW):  # the places that the model is asked for
            window = loss[at : at + WINDOW]
            losses += [window[1:]] if len(window) > 3 else []
    theirs = float(np.concatenate(losses).mean())
    total_bytes = sum(len(text.encode()) for text in held_out)
    per_token = total_bytes / sum(len(tokenizer.encode(text)) for text in held_out)
    bits = lambda nats: round(nats / np.log(2) / per_token, 4)  # noqa: E731
    assert sum(map(len, losses)) == found["tokens"], "both score the same tokens"
    return about | {
        "held_out_bytes": total_bytes,
        "held_out_tokens": found["tokens"],
        "bytes_per_token": round(per_token, 3),
        "trigram_training_tokens": sum(map(len, encoded)),
        "bits_per_byte": {"model": bits(found["nats_per_token"]), "kneser_ney_trigram": bits(theirs)},
        "mtp_acceptance": round(found["mtp_acceptance"], 4),
    }


# --- short runs ------------------------------------------------------------------------------------------------------


def short_run(proof: Proof, files: dict[str, Path], run: str, **changes: Any) -> dict[str, Any]:
    """A run of the recipe's first stage with another setting: its losses, and the last steps' loads of each layer."""
    folder = proof.work / run
    kept = folder / "kept.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))
    config = short_config(proof, files, folder)
    rules = {k: v for k, v in changes.items() if k in ("name", "learning_rate")}
    others = {k: v for k, v in changes.items() if k not in rules}
    config = config.replace(optimizer=dataclasses.replace(config.optimizer, **rules), **others)
    losses, loads = [], []

    def on_metrics(step: int, metrics: dict[str, Any]) -> None:
        losses.append(float(metrics["cross_entropy"]))
        loads.append(np.asarray(metrics["expert_load"], np.int64))

    train(config, tokenizer=prepare_tokenizer(config, proof.work), on_metrics=on_metrics, console=CONSOLE)
    if len(losses) < proof.steps:
        sys.exit(f"{folder}: an unfinished run; remove the folder")
    last = np.sum(loads[-LAST:], axis=0)
    found = {"losses": losses, "load_max_over_mean": [round(float(x), 3) for x in last.max(1) / last.mean(1)]}
    kept.write_text(json.dumps(found), "utf-8")
    return found


def short_config(proof: Proof, files: dict[str, Path], folder: Path) -> TrainConfig:
    source = yaml.safe_dump([{"path": str(files["train"])}], default_flow_style=True)
    (config, *_) = load_recipe(RECIPE, [f"data.sources={source}", *proof.overrides])
    rules = dataclasses.replace(config.config.optimizer, decay_tokens=None)
    return config.config.replace(
        steps=proof.steps, output_dir=str(folder), optimizer=rules, batch_warmup=None, accumulation=1, changes=(),
        log_every=1, save_every=10**6, keep=1,
    )  # fmt: skip


def smooth(losses: Sequence[float], over: int = 20) -> np.ndarray:
    """Mean of the last `over` steps, at every step."""
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - over, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def muon(proof: Proof, runs: dict[str, dict[float, list[float]]]) -> dict[str, Any]:
    """At each one's best rate: the steps that Muon takes to AdamW's last loss."""
    best = {name: min(tried, key=lambda rate: smooth(tried[rate])[-1]) for name, tried in runs.items()}
    curves = {name: smooth(tried[best[name]]) for name, tried in runs.items()}
    goal = curves["adamw"][-1]
    reached = int(np.argmax(curves["muon"] <= goal)) + 1 if (curves["muon"] <= goal).any() else None
    if proof.plot is not None:
        draw(proof.plot, curves, best, goal)
    return {
        "last_loss": {
            name: {f"{r:g}": round(float(smooth(x)[-1]), 4) for r, x in t.items()} for name, t in runs.items()
        },
        "best_rate": best,
        "steps": proof.steps,
        "muon_reaches_adamws_last_loss_at_step": reached,
    }


def draw(file: Path, curves: dict[str, np.ndarray], best: dict[str, float], goal: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("adamw", "AdamW"), ("muon", "Muon")):
        axes.plot(np.arange(1, len(curves[name]) + 1), curves[name], label=f"{label}, rate {best[name]:g}")
    axes.axhline(goal, color="gray", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="step", ylabel="cross-entropy (nats a token, mean of 20 steps)", title="mini on the standard library"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


# --- all -------------------------------------------------------------------------------------------------------------


def main(proof: Proof) -> None:
    results = circumstances("jax", "optax", "numpy")
    files = write_data(proof.work / "data")
    runs: dict[str, dict[float, list[float]]] = {"muon": {}, "adamw": {}}
    balanced: dict[float, list[float]] = {}
    for name, tried in runs.items():
        for rate in proof.rates:
            found = short_run(proof, files, f"{name}-{rate:g}", name=name, learning_rate=rate)
            tried[rate] = found["losses"]
            if name == "muon":
                balanced[rate] = found["load_max_over_mean"]
    results["muon"] = muon(proof, runs)
    rate = results["muon"]["best_rate"]["muon"]
    without = short_run(proof, files, "without-balance", learning_rate=rate, bias_update_rate=0.0)
    results["balance"] = {
        "busiest_over_mean_of_each_layer": {"with": balanced[rate], "without": without["load_max_over_mean"]},
        "steps": LAST,
    }
    print(json.dumps({key: results[key] for key in ("muon", "balance")}, indent=2), flush=True)
    write_figures(proof.json, results)
    results["language"] = language(proof, files)
    print(json.dumps(results["language"], indent=2), flush=True)
    bits, loads = results["language"]["bits_per_byte"], results["balance"]["busiest_over_mean_of_each_layer"]
    promises = {
        "fewer bits than a Kneser-Ney trigram": bits["model"] < bits["kneser_ney_trigram"],
        "busiest expert below 1.5 of the mean": max(loads["with"]) < 1.5,
        "not so without the biases": max(loads["without"]) > 1.5,
        "muon in fewer steps": (results["muon"]["muon_reaches_adamws_last_loss_at_step"] or proof.steps) < proof.steps,
    }
    results["promises_kept"] = promises = {name: bool(kept) for name, kept in promises.items()}
    print(json.dumps(promises, indent=2))
    write_figures(proof.json, results)
    sys.exit(0 if all(promises.values()) else 1)


if __name__ == "__main__":
    main(tyro.cli(Proof, description=__doc__))
