"""`glm45 serve`: answers over HTTP."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from glm45_jax.cli.loading import QuantizeForm
from glm45_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serves a model over HTTP, as OpenAI's and Anthropic's clients ask: POST /v1/chat/completions, /v1/completions,
    /v1/responses and /v1/messages; with a page to chat at /.

    Only this machine can ask, unless --host says otherwise. SIGTERM or Ctrl-C end it when running requests have
    finished. Each request is one line of JSON on standard error, without its contents.

    examples:
      glm45 serve ./air
      glm45 serve ./air --host 0.0.0.0 --port 8080 --api-key "$KEY"
      glm45 serve ./air --slots 64 --cache-tokens 262144 --drafts 1
    """

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint directory, Hugging Face's or our own, with its tokenizer."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 for all."""
    port: Annotated[int, tyro.conf.arg(aliases=["-p"])] = 8000
    """The port to listen at; 0: any that is free."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A key that clients must bring; given several times, one of them. Also from GLM45_API_KEY, where no list of
    processes shows it. Without a key everyone may ask."""
    name: str | None = None
    """What the model is called; without it as its directory."""
    slots: int = 32
    """Answers at work at the same time."""
    cache_tokens: int = 32768
    """Tokens for which the cache has room, of all answers together."""
    step_tokens: int = 256
    """Tokens that a step reads at most: longer prompts take several steps."""
    drafts: int = 0
    """Tokens that the MTP layer drafts ahead, where it pays."""
    queue: int = 128
    """Answers that may wait; more requests are told to come again (status 429)."""
    max_tokens: int = 131072
    """The most that a request may ask for."""
    max_n: int = 16
    """The most answers of one request."""
    store_bytes: int = 64 << 20
    """Memory for answers that clients ask to be kept (`store` of POST /v1/responses); 0: none are."""
    drain_seconds: float = 300.0
    """How long running requests may go on after SIGTERM."""
    warm_up: bool = True
    """Compile everything before the first request."""
    dtype: str | None = None
    """Load and compute in float32, bfloat16 or float16; without it as stored."""
    quantize: QuantizeForm | None = None
    """Weights in one byte: keep those of an FP8 checkpoint as they lie, or make them int8 or fp8 while loading, with a
    scale per output channel or per block of 128 x 128."""
    cache_dtype: Literal["int8", "fp8"] | None = None
    """Keys and values of the cache in one byte, with scales measured at the start."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Serve, args=argv, prog="glm45 serve")
    try:
        from glm45_jax.serve import App, ServeOptions, bind, run
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'glm45-jax[serve]'") from error
    from glm45_jax.cli.loading import load_model
    from glm45_jax.infer import Engine, EngineOptions

    keys = (*args.api_key, *filter(None, [os.environ.get("GLM45_API_KEY")]))
    options = ServeOptions(
        api_keys=keys, queue=args.queue, max_tokens=args.max_tokens, max_n=args.max_n, store_bytes=args.store_bytes,
        drain_seconds=args.drain_seconds,
    )  # fmt: skip
    sizes = EngineOptions(
        slots=args.slots, cache_tokens=args.cache_tokens, step_tokens=args.step_tokens, drafts=args.drafts,
        cache_dtype=args.cache_dtype, warm_up=args.warm_up,
    )  # fmt: skip
    with bind(args.host, args.port) as listener:
        config, params, tokenizer = load_model(args.checkpoint, args.dtype, args.quantize)
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("glm45_jax.serve").setLevel(logging.INFO)
        notes = Console(stderr=True, soft_wrap=True)
        with notes.status("starting; the first time, compiling"):
            engine = Engine(params, config, tokenizer=tokenizer, options=sizes)
        with engine:
            name = args.name or Path(args.checkpoint).resolve().name
            host, port = listener.getsockname()[:2]
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
            notes.print(f"{name} at {where}" + ("" if keys else ", for everyone who reaches it"), highlight=False)
            run(App(engine, name, options), listener)
    return 0
