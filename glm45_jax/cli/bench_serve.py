"""`glm45 bench serve`: load on a running server, and what its clients see."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import tyro

from glm45_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Serve:
    """Puts load on a running server: tokens a second, time to the first token and for each further one.

    Without --rate so many requests as --concurrency says are always on their way; with it they come at random moments,
    so many a second in the mean, whether the server keeps up or not.

    examples:
      glm45 bench serve --requests 128 --concurrency 32
      glm45 bench serve --rate 4 --prompt-tokens 32-2048 --new-tokens 16-256 --plot load.png
      glm45 bench serve --shared-tokens 512 --prompt-tokens 600 --first-limit 0.5 --token-limit 0.05 --json
    """

    url: str = "http://127.0.0.1:8000"
    """The server's, any that has OpenAI's /v1/completions."""
    api_key: str | None = None
    """Its key; without, GLM45_API_KEY of the environment."""
    requests: int = 64
    """How many in all."""
    concurrency: int = 32
    """On their way at a time, without --rate."""
    rate: float | None = None
    """Requests a second."""
    prompt_tokens: str = "64"
    """Of a prompt, such as 64, or evenly drawn from a range such as 32-2048."""
    new_tokens: str = "128"
    """Of an answer, likewise."""
    shared_tokens: int = 0
    """Of each prompt's beginning that others share."""
    shared_groups: int = 1
    """How many different beginnings there are."""
    first_limit: float | None = None
    """Seconds to the first token that a request may take to count in the goodput."""
    token_limit: float | None = None
    """Seconds for each further token, likewise."""
    seed: int = 0
    """Of lengths, prompts and moments."""
    plot: Path | None = None
    """Draw what requests saw into this file."""
    json: Annotated[bool, tyro.conf.arg(aliases=["-j"])] = False
    """Print JSON, for machines."""


def main(args: Serve) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from glm45_jax.serve import load as loads

    load = loads.Load(
        requests=_at_least(args.requests, "requests"),
        concurrency=_at_least(args.concurrency, "concurrency"),
        rate=args.rate,
        prompt_tokens=_range(args.prompt_tokens, "--prompt-tokens"),
        new_tokens=_range(args.new_tokens, "--new-tokens"),
        shared_tokens=args.shared_tokens,
        shared_groups=_at_least(args.shared_groups, "shared-groups"),
        seed=args.seed,
    )
    key = args.api_key or os.environ.get("GLM45_API_KEY")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("requests", total=load.requests)
        seen, seconds = asyncio.run(loads.run(load, args.url, api_key=key, on_end=lambda _: progress.advance(bar)))
    figures = loads.summary(seen, seconds, first_limit=args.first_limit, token_limit=args.token_limit)
    if args.plot:
        _plot(seen, args.plot)
    if args.json:
        print(json.dumps({"load": dataclasses.asdict(load)} | figures, indent=2))
    else:
        Console().print(_table(figures, args))
    return 1 if figures["failed"] else 0


def _at_least(value: int, name: str, least: int = 1) -> int:
    if value < least:
        raise UserError(f"--{name} is {value}; it must be {least} or more")
    return value


def _range(text: str, name: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise UserError(f"{name} is {text!r}; expected a number such as 64, or a range such as 32-2048")
    least, most = int(low), int(high or low)
    if not 1 <= least <= most:
        raise UserError(f"{name} is {text!r}; the least must be 1 or more, and not above the most")
    return least, most


def _table(figures: dict[str, Any], args: Serve) -> Any:
    from rich import box
    from rich.table import Table

    title = (
        f"{figures['requests']} requests in {figures['seconds']:.1f} s, {figures['failed']} failed: "
        f"{figures['generated_tokens_per_second']:.1f} tokens/s, {figures['requests_per_second']:.2f} requests/s"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("milliseconds")
    for name in ("p50", "p90", "p99"):
        table.add_column(name, justify="right")
    names = {
        "to_first_token": "to the first token",
        "per_token": "for each further token",
        "whole": "for a whole answer",
    }
    for key, name in names.items():
        if figures[key]:
            table.add_row(name, *(f"{1e3 * value:.1f}" for value in figures[key].values()))
    notes = [f"{figures['cached_tokens']} of {figures['prompt_tokens']} tokens of prompts were in the cache"]
    if args.first_limit or args.token_limit:
        notes.append(f"within the limits: {figures['goodput']:.2f} requests/s, {figures['kept']:.0%} of all")
    table.caption, table.caption_justify = "\n".join(notes + figures["errors"]), "left"
    return table


def _plot(seen: list[Any], file: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'glm45-jax[viz]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [one for one in seen if one.error is None]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for plot, name, values in (
        (axes[0], "to the first token", [one.to_first for one in good]),
        (axes[1], "for each further token", [one.per_token for one in good]),
    ):
        plot.plot(sorted(1e3 * v for v in values), [100 * (i + 1) / len(values) for i in range(len(values))])
        plot.set(xlabel=f"milliseconds {name}", ylabel="% of requests", xlim=(0, None), ylim=(0, 100))
        plot.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)
