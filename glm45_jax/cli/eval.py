"""`glm45 eval`: how well a model predicts a text, answers questions, and does in lm-evaluation-harness."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from glm45_jax.cli.loading import QuantizeForm
from glm45_jax.errors import UserError

Json = Annotated[bool, tyro.conf.arg(aliases=["-j"])]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity and bits per byte of a text; with --against, what quantised weights lose.

    examples:
      glm45 eval perplexity ./GLM-4.5-Air book.txt
      glm45 eval perplexity ./GLM-4.5-Air book.txt --against int8 --json
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A model and its tokenizer."""
    file: Annotated[Path, tyro.conf.Positional]
    """Text, in UTF-8."""
    against: QuantizeForm | None = None
    """Compare with the same weights quantised so: nats, KL, agreement on the likeliest token."""
    dtype: str | None = None
    """Of weights and computation; without, the checkpoint's."""
    window: int = 2048
    """Tokens that are read at once."""
    batch_size: int = 4
    """Windows of one step."""
    most_tokens: int | None = None
    """Only so many of the text's first tokens."""
    json: Json = False
    """Print JSON, for machines."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """Questions with known answers, put to a running server.

    A line of the file is {"prompt": "12 + 5?", "answer": "17"}; "messages" may stand for the prompt, and a list of
    answers for one.

    examples:
      glm45 eval exact sums.jsonl --match number
      glm45 eval exact facts.jsonl --match contains --no-thinking --output answers.jsonl
    """

    file: Annotated[Path, tyro.conf.Positional]
    """JSONL."""
    match: Literal["exact", "number", "contains"] = "exact"
    """What is right: the same text; its last number the same; the wanted text anywhere in it."""
    url: str = "http://127.0.0.1:8000"
    """The server's."""
    api_key: str | None = None
    """Its key; without, GLM45_API_KEY of the environment."""
    thinking: bool = True
    """Whether the model thinks first."""
    max_tokens: int = 1024
    """Of an answer, its thought included."""
    temperature: float = 0.0
    """Of sampling."""
    concurrency: int = 16
    """Questions on their way at a time."""
    limit: int | None = None
    """Only the first so many."""
    output: Path | None = None
    """Write each answer and whether it is right into this JSONL file."""
    json: Json = False
    """Print JSON, for machines."""


@dataclasses.dataclass(frozen=True)
class Harness:
    """Tasks of lm-evaluation-harness (pip install 'lm-eval[api]'), through a running server.

    Tasks that ask for text go to its chat, others, which compare the likelihoods of given answers, to its completions.
    What comes after the options goes to lm_eval as it stands.

    examples:
      glm45 eval harness gsm8k --limit 100
      glm45 eval harness hellaswag arc_easy --completions
    """

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Their names; `lm_eval ls tasks` lists them."""
    url: str = "http://127.0.0.1:8000"
    """The server's."""
    completions: bool = False
    """For tasks that compare likelihoods: through /v1/completions, without the chat's template."""
    tokenizer: str | None = None
    """Of those tasks: the checkpoint's folder, on this machine, read by transformers. Without it the server counts
    tokens, which takes a request for each text."""
    concurrency: int = 16
    """Requests on their way at a time."""
    limit: int | None = None
    """Only the first so many questions of each task."""
    include_path: Path | None = None
    """A folder of tasks of your own."""
    output: Path | None = None
    """Where lm_eval writes its results."""


def main(argv: list[str]) -> int:
    commands = {"perplexity": Perplexity, "exact": Exact, "harness": Harness}
    args = tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="glm45 eval")
    match args:
        case Perplexity():
            return _perplexity(args)
        case Exact():
            return _exact(args)
        case _:
            return _harness(args)


def _show(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print(json.dumps(figures, indent=2))
    from rich.console import Console

    for name, value in figures.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        Console().print(f"  {name.replace('_', ' '):28s} {shown}", markup=False)


# --- perplexity ----------------------------------------------------------------------------------------------------


def _perplexity(args: Perplexity) -> int:
    from rich.console import Console

    from glm45_jax.cli.loading import load_model
    from glm45_jax.infer.evaluate import compare, perplexity
    from glm45_jax.model.quantize import quantize_params

    if not args.file.exists():
        raise UserError(f"{args.file}: no such file")
    config, params, tokenizer = load_model(args.checkpoint, args.dtype)
    tokens = tokenizer.encode(args.file.read_text("utf-8"))[: args.most_tokens]
    how = {"window": args.window, "batch_size": args.batch_size}
    with Console(stderr=True).status(f"reading {len(tokens):,} tokens"):
        found = perplexity(params, config, tokens, **how)
    size = len(tokenizer.decode(tokens[1:]).encode())
    figures = {
        "tokens": found.tokens, "nats_per_token": found.nll, "perplexity": found.perplexity,
        "bits_per_byte": found.nll * found.tokens / math.log(2) / size,
    }  # fmt: skip
    if args.against is not None:
        if args.against == "keep":
            raise UserError(
                "--against takes a form to quantise to, such as int8; keep is for what is quantised already"
            )
        with Console(stderr=True).status(f"the same with {args.against} weights"):
            other = compare(params, quantize_params(params, config, args.against), config, tokens, **how)
        figures |= {
            f"nats_per_token_{args.against}": other.other_nll, f"perplexity_{args.against}": math.exp(other.other_nll),
            "kl_nats": other.kl, "same_likeliest_token": other.agreement,
        }  # fmt: skip
    _show(figures, args.json)
    return 0


# --- questions -----------------------------------------------------------------------------------------------------


def _exact(args: Exact) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from glm45_jax.serve.examine import examine, interval, read_questions

    questions = read_questions(args.file, args.limit)
    fields = {
        "max_tokens": args.max_tokens, "temperature": args.temperature,
        "chat_template_kwargs": {"enable_thinking": args.thinking},
    }  # fmt: skip
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("questions", total=len(questions))
        work = examine(
            questions, args.url, match=args.match, fields=fields, concurrency=args.concurrency,
            api_key=args.api_key or os.environ.get("GLM45_API_KEY"), on_end=lambda _: progress.advance(bar),
        )  # fmt: skip
        answers = asyncio.run(work)
    if args.output:
        rows = zip(questions, answers)
        lines = [json.dumps(dataclasses.asdict(q) | dataclasses.asdict(a), ensure_ascii=False) for q, a in rows]
        args.output.write_text("\n".join(lines) + "\n", "utf-8")
    right, failed = sum(a.right for a in answers), [a.error for a in answers if a.error]
    low, high = interval(right, len(answers))
    _show({
        "questions": len(answers), "right": right, "share": right / len(answers), "share_at_least": low,
        "share_at_most": high, "failed": len(failed),
    }, args.json)  # fmt: skip
    for error in sorted(set(failed))[:3]:
        print(error, file=sys.stderr)
    return 1 if failed else 0


# --- lm-evaluation-harness -----------------------------------------------------------------------------------------


def harness_command(args: Harness, key: str | None = None) -> list[str]:
    """The call of lm_eval. `key`: the server's, which lm_eval takes from the environment but for counting tokens."""
    kind = "local-completions" if args.completions else "local-chat-completions"
    route = "completions" if args.completions else "chat/completions"
    settings: dict[str, Any] = {
        "model": "default",
        "base_url": f"{args.url.rstrip('/').removesuffix('/v1')}/v1/{route}",
    }
    settings["num_concurrent"] = args.concurrency
    if args.completions and args.tokenizer is not None:
        settings |= {"tokenizer": args.tokenizer, "tokenizer_backend": "huggingface", "tokenized_requests": True}
    elif args.completions:
        settings |= {"tokenizer_backend": "remote", "tokenized_requests": True} | ({"auth_token": key} if key else {})
    command = [sys.executable, "-m", "lm_eval", "--model", kind, "--tasks", ",".join(args.tasks)]
    command += ["--model_args", ",".join(f"{k}={v}" for k, v in settings.items())]
    command += [] if args.completions else ["--apply_chat_template"]
    for name, value in (("limit", args.limit), ("include_path", args.include_path), ("output_path", args.output)):
        command += [f"--{name}", str(value)] if value is not None else []
    return command


def _harness(args: Harness) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'glm45-jax[eval]'")
    key = os.environ.get("GLM45_API_KEY")
    env = os.environ | {"OPENAI_API_KEY": key or "none"}
    return subprocess.run(harness_command(args, key), env=env, check=False).returncode
