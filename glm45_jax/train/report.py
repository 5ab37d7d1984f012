"""What a run tells while it trains: a progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

METRICS_FILE = "metrics.jsonl"


class Reporter:
    """Writes metrics of steps to `folder` and shows them. Use as a context."""

    def __init__(self, folder: Path, steps: int, start: int, *, tensorboard: bool, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._steps, self._start, self._begin = steps, start, time.monotonic()
        self._last = (start, self._begin)
        _forget_after(folder / METRICS_FILE, start)
        self._file = open(folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self._board = _tensorboard(folder / "tensorboard", start) if tensorboard else None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=steps, completed=start, shown="compiling the step …")

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self._console.print(text, highlight=False)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, Any], tokens: int) -> None:
        """Scalars of `metrics` at `step`; `tokens` were trained on since the last call."""
        now = time.monotonic()
        since, then = self._last
        self._last = (step, now)
        values = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        values |= {"tokens_per_second": tokens / max(now - then, 1e-9), "seconds": now - self._begin}
        self.write(step, values)
        left = (self._steps - step) * (now - then) / max(step - since, 1)
        shown = (
            f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s  {_duration(left)} left"
            + f"  {values['skipped']:.0f} skipped" * (values.get("skipped", 0) > 0)
        )
        self._progress.update(self._task, completed=step, shown=shown)
        if not self._console.is_terminal:
            self.say(f"step {step}/{self._steps}  {shown}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and TensorBoard's points."""
        # JSON has no NaN: what is not finite becomes null
        line = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, one dict per logged step; a last line cut short by a kill is left out."""
    lines = (Path(folder) / METRICS_FILE).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _forget_after(file: Path, step: int) -> None:
    """Drops what was logged after the checkpoint from which the run goes on: those steps are about to come again."""
    if not file.exists():
        return
    kept = [metrics for metrics in read_metrics(file.parent) if metrics["step"] <= step]
    new = file.with_suffix(".partial")
    new.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept), "utf-8")
    os.replace(new, file)


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
