"""`glm45 quickstart`: the whole way in minutes: train a small GLM-4.5, convert it, question it."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape

from glm45_jax.errors import UserError

_SUMS, _CALLS = 200, 100  # held-out problems of the examination
_STEPS, _ROWS, _ROW_TOKENS = 235, 4, 256


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Trains `mini`, a GLM-4.5 of 9 M parameters, on data that every machine has, converts it both ways, examines it.

    The data: the installed Python standard library (source and documentation), generated sums worked out in steps, and
    generated tool calls. Nothing is downloaded. Interrupted, the same command goes on.

    examples:
      glm45 quickstart
      glm45 quickstart --output runs/longer --steps 1000 --minutes 60
    """

    output: Path = Path("runs/quickstart")
    """Where everything is written."""
    steps: int = _STEPS
    """Of training, 1024 tokens each."""
    minutes: float = 6.0
    """Training ends here at the latest."""
    seed: int = 0
    """Of the data, the weights and the examination."""
    json: bool = False
    """Print the figures as JSON at the end."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Quickstart, args=argv, prog="glm45 quickstart")
    console = Console(stderr=args.json)
    started = time.monotonic()
    trained = _train(args, console)
    picture = plot_loss(args.output)
    if picture:
        console.print(f"  loss curve: {picture}")
    agreement = _convert(trained.model_dir, args.output, console)
    scores = _examine(trained.model_dir, args.seed, console)
    figures = {
        **scores,
        "logits_difference_after_round_trip": agreement,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    if args.json:
        print(json.dumps(figures, indent=2))
    _next_steps(args.output, figures, console)
    return 0


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{escape(text)}[/bold]")


# --- 1 training ----------------------------------------------------------------------------------------------------


def train_config(output: Path, *, steps: int = _STEPS, minutes: float | None = None, seed: int = 0) -> Any:
    """The quickstart's training run, its data written to `output`/data."""
    from glm45_jax.config import get_preset
    from glm45_jax.data import DataConfig, SourceConfig
    from glm45_jax.data.generated import write_quickstart_data
    from glm45_jax.train import TokenizerConfig, TrainConfig
    from glm45_jax.train.optimizer import OptimizerConfig

    files = write_quickstart_data(
        output / "data", seed=seed, sums=20_000, calls=4_000, repeats=20_000, text_bytes=6_000_000
    )
    shares = {"library": 0.03, "tables": 0.07, "sums": 0.31, "calls": 0.16, "bare_calls": 0.23, "repeats": 0.2}
    sources = tuple(
        SourceConfig(path=(str(files[name]),), weight=share, packing="concat" if name == "library" else "best_fit")
        for name, share in shares.items()
    )
    return TrainConfig(
        model=get_preset("mini"),
        data=DataConfig(sources=sources),
        tokenizer=TokenizerConfig(sample_bytes=1_000_000),
        steps=steps,
        batch_size=_ROWS,
        seq_len=_ROW_TOKENS,
        optimizer=OptimizerConfig(
            learning_rate=8e-3,
            min_learning_rate=2e-4,
            warmup_steps=min(10, steps // 4),
            weight_decay=0.02,
            momentum=0.85,
        ),
        bias_update_rate=1e-2,  # the run is short: the published 1e-3 would hardly move the biases
        max_minutes=minutes,
        seed=seed,
        log_every=3,
        save_every=100,
        keep=1,
        output_dir=str(output),
    )


def _train(args: Quickstart, console: Console) -> Any:
    from glm45_jax.train import train

    _heading(console, "1. Training: a GLM-4.5 of 9 M parameters, on the standard library, sums and tool calls")
    config = train_config(args.output, steps=args.steps, minutes=args.minutes, seed=args.seed)
    result = train(config, console=console)
    if result.model_dir is None:
        raise UserError(f"training was stopped; the same command goes on from {args.output}")
    return result


def plot_loss(folder: Path) -> Path | None:
    """Draws metrics.jsonl as loss.png; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("cross_entropy", "next token"), ("mtp_cross_entropy", "token after next (MTP layer)")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points), label=label)
    axes.set(xlabel="step", ylabel="cross-entropy (nats)", title="glm45 quickstart", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)
    return folder / "loss.png"


# --- 2 conversion --------------------------------------------------------------------------------------------------


def _convert(model_dir: Path, output: Path, console: Console) -> float:
    """To Hugging Face's format and back: the largest difference of the logits, which must be none."""
    import jax
    import numpy as np

    import glm45_jax as glm

    _heading(console, "2. Conversion: to Hugging Face's format and back")
    hf, back = output / "hf", output / "model-back"
    for target in (hf, back):
        shutil.rmtree(target, ignore_errors=True)
    glm.convert.to_hf(model_dir, hf)
    glm.convert.from_hf(hf, back)
    tokens = np.random.default_rng(0).integers(0, 2000, (2, 64))
    forward = jax.jit(glm.forward, static_argnums=1)
    logits = []
    for path in (model_dir, hf, back):
        config, params = glm.load_checkpoint(path)
        logits.append(np.asarray(forward(params, config, tokens).logits))
    difference = float(max(np.abs(other - logits[0]).max() for other in logits[1:]))
    verdict = "the logits agree exactly" if difference == 0 else f"[red]the logits differ by {difference:.3g}[/red]"
    console.print(f"  {model_dir} -> {hf} -> {back}: {verdict}")
    return difference


# --- 3 examination -------------------------------------------------------------------------------------------------

_CALL = re.compile(r"<tool_call>([^\n<]+)(.*?)</tool_call>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def is_right_sum(problem: Any, answer: str) -> bool:
    """Whether what follows the thought is the sum and nothing else."""
    return answer.split("</think>")[-1].strip() == str(problem.a + problem.b)


def is_right_call(call: Any, answer: str) -> bool:
    """Whether the answer holds one call, of the right name with exactly the right arguments."""
    found = _CALL.findall(answer)
    if len(found) != 1:
        return False
    name, rest = found[0]
    want = {key: str(value) for key, value in call.arguments.items()}
    return name.strip() == call.name and dict(_ARGUMENT.findall(rest)) == want


def _examine(model_dir: Path, seed: int, console: Console) -> dict[str, float]:
    import glm45_jax as glm
    from glm45_jax.data.generated import call_conversation, draw_sum, sum_conversation

    config, params = glm.load_checkpoint(model_dir)
    tokenizer = glm.text.Tokenizer.load(model_dir)

    def ask(conversations: Sequence[dict[str, Any]], thinking: bool = True, room: int = 64) -> list[str]:
        prompts = [
            tokenizer.encode_chat(c["messages"][:1], c.get("tools"), enable_thinking=thinking) for c in conversations
        ]
        answers = glm.generate(params, config, prompts, max_new_tokens=room, tokenizer=tokenizer)
        return [tokenizer.decode(a[len(p) :]) for a, p in zip(answers, prompts)]

    _heading(console, "3. Examination, on problems that are not in the training data")
    rng = random.Random(seed + 1)
    sums = [draw_sum(rng, test=True) for _ in range(_SUMS)]
    sum_talks = [sum_conversation(s, rng) for s in sums]
    call_talks, calls = zip(*(call_conversation(rng, test=True) for _ in range(_CALLS)))
    thought, at_once, called = ask(sum_talks), ask(sum_talks, thinking=False, room=8), ask(call_talks)
    clean = [_without_end(text) for text in (*thought, *at_once, *called)]
    thought, at_once, called = clean[:_SUMS], clean[_SUMS : 2 * _SUMS], clean[2 * _SUMS :]
    for title, talk, answer in (
        ("thinking on", sum_talks[0], thought[0]),
        ("thinking off", sum_talks[0], at_once[0]),
        ("a tool call", call_talks[0], called[0]),
    ):
        console.print(f"  [cyan]{title}[/cyan]: {escape(talk['messages'][0]['content'])}")
        console.print("    " + escape(answer.strip()).replace("\n", "\n    "), style="dim")
    share = lambda right: round(sum(right) / len(right), 4)  # noqa: E731
    scores = {
        "sums_right": share([is_right_sum(s, a) for s, a in zip(sums, thought)]),
        "sums_right_without_thinking": share([is_right_sum(s, a) for s, a in zip(sums, at_once)]),
        "steps_right": share([s.steps in a for s, a in zip(sums, thought)]),
        "calls_right": share([is_right_call(c, a) for c, a in zip(calls, called)]),
    }
    console.print(
        f"  sums right: [bold]{scores['sums_right']:.0%}[/bold] of {_SUMS} with thinking "
        f"(its steps: {scores['steps_right']:.0%}), {scores['sums_right_without_thinking']:.0%} without; "
        f"tool calls right: [bold]{scores['calls_right']:.0%}[/bold] of {_CALLS}"
    )
    return scores


def _without_end(text: str) -> str:
    """An answer without the role token that ends the model's turn."""
    return re.sub(r"<\|(user|observation|endoftext)\|>$", "", text)


# --- 4 what next ---------------------------------------------------------------------------------------------------


def _next_steps(output: Path, figures: dict[str, Any], console: Console) -> None:
    _heading(console, f"Done in {figures['seconds'] / 60:.1f} minutes, {figures['peak_memory_gb']} GB at most. Next:")
    for command, what in (
        (f"glm45 chat {output}/model", "talk with it"),
        (f"glm45 generate {output}/model 'import os'", "let it write Python"),
        (f"glm45 quickstart --output {output} --steps 1000 --minutes 60", "train longer"),
        ("glm45 train recipes/mini.yaml", "train on your own text"),
        ("glm45 info glm-4.5-air", "what the real ones weigh"),
        ("glm45 convert from-hf GLM-4.5-Air ./air", "convert a real one"),
    ):
        console.print(f"  {escape(command):60s} [dim]{what}[/dim]", soft_wrap=True)
