"""`glm45 convert`: checkpoints between Hugging Face's format and our own directory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@dataclasses.dataclass(frozen=True)
class FromHf:
    """A Hugging Face checkpoint (safetensors or PyTorch files) into a directory of our own, which Orbax restores.

    Interrupted, the same command goes on where it was.

    examples:
      glm45 convert from-hf ./GLM-4.5-Air ./air
      glm45 convert from-hf ./GLM-4.5-Air-FP8 ./air-fp8 --keep-fp8
    """

    source: tyro.conf.Positional[Path]
    """A directory with config.json and weights, or one weights file beside its config.json."""
    target: tyro.conf.Positional[Path]
    """The directory to make."""
    keep_fp8: bool = False
    """Store FP8 codes and scales as they are; without it they become bfloat16."""
    overwrite: bool = False
    """Replace a checkpoint that stands at the target."""
    json: Annotated[bool, tyro.conf.arg(aliases=["-j"])] = False
    """Print a JSON summary instead of a progress bar."""


@dataclasses.dataclass(frozen=True)
class ToHf:
    """A directory of our own into Hugging Face's format, every tensor as it came in.

    Interrupted, the same command goes on where it was.

    examples:
      glm45 convert to-hf ./air ./GLM-4.5-Air-copy
    """

    source: tyro.conf.Positional[Path]
    """A directory that `from-hf` made."""
    target: tyro.conf.Positional[Path]
    """The directory to make."""
    max_shard_size: str = "5GB"
    """The most bytes in one safetensors file, like 5GB or 500MB."""
    overwrite: bool = False
    """Replace a checkpoint that stands at the target."""
    json: Annotated[bool, tyro.conf.arg(aliases=["-j"])] = False
    """Print a JSON summary instead of a progress bar."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Reads a converted checkpoint whole and compares every array, or tensor, with the digest written with it.

    examples:
      glm45 convert verify ./air
    """

    path: tyro.conf.Positional[Path]
    """A directory that `from-hf` or `to-hf` made."""


Command = (
    Annotated[FromHf, tyro.conf.subcommand("from-hf")]
    | Annotated[ToHf, tyro.conf.subcommand("to-hf")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


@contextlib.contextmanager
def _bar(text: str, hidden: bool) -> Iterator[Any]:
    """A progress bar with bytes, rate and time left; yields what the conversions report to."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:
        task = progress.add_task(text, total=None)

        def show(done: int, total: int) -> None:
            if not progress.tasks[task].total:
                progress.reset(task, total=total, completed=done)  # what an earlier run did is no part of the rate
            else:
                progress.update(task, completed=done)

        yield show


def _report(summary: Any, as_json: bool) -> None:
    facts = dataclasses.asdict(summary)
    digests = facts.pop("digests")
    rate = (summary.bytes - summary.resumed_bytes) / max(summary.seconds, 1e-9)
    if as_json:
        print(json.dumps({**facts, "bytes_per_second": round(rate), "digests": digests}))
        return
    if not summary.bytes:
        print(f"{summary.target}: this conversion has been done already")
        return
    resumed = f", {summary.resumed_bytes / 1e9:.2f} GB of them done before" if summary.resumed_bytes else ""
    print(
        f"{summary.target}: {summary.tensors:,} tensors, {summary.bytes / 1e9:.2f} GB in {summary.seconds:.1f} s "
        f"({rate / 1e9:.2f} GB/s){resumed}"
    )


def main(argv: list[str]) -> int:
    command = tyro.cli(Command, args=argv, prog="glm45 convert")  # pyright: ignore
    from glm45_jax import convert

    if isinstance(command, Verify):
        print(f"{command.path}: {len(convert.verify(command.path))} arrays as they were written")
        return 0
    with _bar(f"{command.source.name} → {command.target.name}", command.json) as show:
        common = {"overwrite": command.overwrite, "progress": show}
        if isinstance(command, FromHf):
            summary = convert.from_hf(command.source, command.target, keep_fp8=command.keep_fp8, **common)
        else:
            summary = convert.to_hf(command.source, command.target, max_shard_size=command.max_shard_size, **common)
    _report(summary, command.json)
    return 0
