"""`glm45 generate`: continues a prompt."""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
import time
from typing import Annotated, Any

import tyro
from rich.console import Console

from glm45_jax.cli.loading import QuantizeForm


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues a prompt, as it stands (`glm45 chat` talks in a chat format). Prints the answer as it comes.

    examples:
      glm45 generate ./air "The capital of France is" --max-new-tokens 8
      glm45 generate ./air - --temperature 0.8 --top-p 0.95 --json < prompt.txt
    """

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint directory, Hugging Face's or our own, with its tokenizer."""
    prompt: tyro.conf.Positional[str]
    """The text to continue; control tokens in it (<|user|>) are read as such. `-` reads standard input."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 256
    """The most tokens to add."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.0
    """0: always the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that hold this much probability."""
    min_p: float = 0.0
    """Draw from tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of prompt and answer become less likely."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer holds."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the answer."""
    seed: int | None = None
    """Of the draws; without it each run differs."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, before them."""
    dtype: str | None = None
    """Load and compute in float32, bfloat16 or float16; without it as stored."""
    quantize: QuantizeForm | None = None
    """Weights in one byte: keep those of an FP8 checkpoint as they lie, or make them int8 or fp8 while loading, with a
    scale per output channel or per block of 128 x 128."""
    json: Annotated[bool, tyro.conf.arg(aliases=["-j"])] = False
    """Print JSON when done: text, tokens, log-probabilities, why it ended, time."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Generate, args=argv, prog="glm45 generate")
    from glm45_jax.cli.loading import load_model
    from glm45_jax.errors import UserError
    from glm45_jax.infer import generate_detailed

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    config, params, tokenizer = load_model(args.checkpoint, args.dtype, args.quantize)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty; at least one token is needed to go on from")
    seed = secrets.randbits(32) if args.seed is None else args.seed
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "stop_ids": config.eos_token_id or tokenizer.eos_ids,
        "stop_strings": args.stop,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "seed": seed,
    }
    if not args.json:
        _stream(params, config, ids, tokenizer, options)
        return 0
    begin = time.monotonic()
    (found,) = generate_detailed(params, config, [ids], tokenizer=tokenizer, **options)
    report = {
        "prompt": prompt,
        "text": found.text,
        "finish_reason": found.finish_reason,
        "prompt_tokens": found.prompt,
        "tokens": found.answer,
        "logprobs": found.logprobs,
        "seed": seed,
        "seconds": round(time.monotonic() - begin, 3),
    }
    print(json.dumps(report, ensure_ascii=False, indent=2))
    return 0


def _stream(params: Any, config: Any, ids: list[int], tokenizer: Any, options: dict[str, Any]) -> None:
    from glm45_jax.infer import stream

    notes = Console(stderr=True)
    answer = stream(params, config, ids, tokenizer, **options)
    with notes.status("reading the prompt (the first time, compiling)"):
        first = next(answer, "")
    begin = time.monotonic()
    print(first, end="", flush=True)
    for piece in answer:
        print(piece, end="", flush=True)
    print()
    if notes.is_terminal and answer.result:
        count, seconds = len(answer.result.answer), time.monotonic() - begin
        why = "stopped" if answer.result.finish_reason == "stop" else "--max-new-tokens or the context reached"
        notes.print(f"{count} tokens, {(count - 1) / max(seconds, 1e-9):.1f} per second; {why}", style="dim")
