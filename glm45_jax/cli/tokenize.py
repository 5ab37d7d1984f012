"""`glm45 tokenize`: text, JSONL and Parquet to ArrayRecord files of tokens, once for many runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from glm45_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Writes records as tokens to ArrayRecord files, which training then reads without a tokenizer's work.

    Each of several sources of a CONFIG gets a directory of its own below --out. Interrupted or killed, the same
    command goes on where it was. A directory is there under its name only when it is whole.

    examples:
      glm45 tokenize --source 'texts/**/*.jsonl' --tokenizer ./GLM-4.5-Air --out ./tokens
      glm45 tokenize --source gs://bucket/corpus --tokenizer ./GLM-4.5-Air --out ./tokens --on-error skip
      glm45 tokenize recipes/mini.yaml --tokenizer runs/mini/tokenizer --out ./tokens --json
    """

    config: tyro.conf.Positional[str | None] = None
    """The YAML file of a training run, whose sources and settings are taken; or give --source."""
    source: tuple[str, ...] = ()
    """Files, directories or globs, local or remote (gs://), of one kind."""
    out: Path = Path("tokens")
    """The directory to make."""
    tokenizer: str | None = None
    """A checkpoint's directory or a tokenizer.json; by default what CONFIG names."""
    kind: Literal["auto", "text", "jsonl", "parquet", "array_record"] = "auto"
    """Of --source: what the files are; auto goes by their suffix."""
    on_error: Literal["fatal", "skip"] | None = None
    """Unusable records: stop with the place of the first, or count them. Default: what CONFIG says, else fatal."""
    workers: int | None = None
    """Processes; one for each processor by default."""
    megabytes_per_file: float = 64.0
    """Input that makes one file, about; what a killed run repeats of each worker's work at the most."""
    overwrite: bool = False
    """Replace what stands at --out."""
    json: Annotated[bool, tyro.conf.arg(aliases=["-j"])] = False
    """Print a JSON report instead of a progress bar."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Tokenize, args=argv, prog="glm45 tokenize")
    from glm45_jax.data.tokenize import tokenize

    sources, tokenizer, how = _what(args)
    if tokenizer is None:
        raise UserError("name the tokenizer: --tokenizer DIR, a checkpoint's directory or a tokenizer.json")
    reports = []
    for number, source in enumerate(sources):
        if args.on_error is not None:
            source = dataclasses.replace(source, on_error=args.on_error)
        out = args.out if len(sources) == 1 else args.out / f"{number:02d}"
        out.parent.mkdir(parents=True, exist_ok=True)
        with _bar(source.name, args.json) as show:
            report = tokenize(
                source,
                tokenizer,
                out,
                workers=args.workers,
                input_bytes=int(args.megabytes_per_file * 2**20),
                overwrite=args.overwrite,
                progress=show,
                **how,
            )
        reports.append({**dataclasses.asdict(report), "tokens_per_second": round(report.tokens_per_second)})
        if not args.json:
            _say(report)
    if args.json:
        print(json.dumps(reports[0] if len(reports) == 1 else reports))
    return 0


def _what(args: Tokenize) -> tuple[tuple[Any, ...], str | None, dict[str, Any]]:
    """Sources, tokenizer, and how records become tokens."""
    from glm45_jax.data import SourceConfig

    if (args.config is None) == (not args.source):
        raise UserError("give the YAML file of a run, or --source with files: one of the two")
    if args.config is None:
        return (SourceConfig(path=args.source, kind=args.kind),), args.tokenizer, {}
    from glm45_jax.train import load_train_config

    config = load_train_config(args.config)
    if config.data is None:
        raise UserError(f"{args.config}: it has no data")
    how = {"append_eos": config.data.append_eos, "loss_on": config.data.loss_on}
    return config.data.sources, args.tokenizer or config.tokenizer.path, how


def _say(report: Any) -> None:
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in report.skipped.items())
    print(
        f"{report.out}: {report.records:,} documents, {report.tokens:,} tokens, {report.bytes / 1e6:,.1f} MB in "
        f"{report.files:,} files; {report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s"
        + (f"; left out: {skipped}" if skipped else "")
    )


@contextlib.contextmanager
def _bar(text: str, hidden: bool) -> Iterator[Any]:
    """A progress bar by records; yields what `tokenize` reports to."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=hidden) as progress:
        task = progress.add_task(text, total=None)

        def show(done: int, total: int) -> None:
            if not progress.tasks[task].total:
                progress.reset(task, total=total, completed=done)  # what an earlier run did is no part of the rate
            else:
                progress.update(task, completed=done)

        yield show
