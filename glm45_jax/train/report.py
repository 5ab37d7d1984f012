"""What a run tells while it trains: a progress bar, metrics.jsonl, TensorBoard, goodput, traces."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

METRICS_FILE = "metrics.jsonl"


class Reporter:
    """Writes metrics of steps to `folder` and shows them. Use as a context.

    `seconds` is the run's time so far, of all its processes one after another; `goodput` the share of it in steps that
    count: not in starting, restoring, compiling, waiting for data, evaluating, saving, nor in steps that a kill undid.

    Args:
      folder: None for a process that reports nothing.
      began: `time.monotonic()` when this process began.
    """

    def __init__(
        self, folder: Path | None, steps: int, start: int, *, began: float, tensorboard: bool,
        console: Console | None = None,
    ):  # fmt: skip
        self._console = (console or Console(stderr=True)) if folder is not None else Console(quiet=True)
        self._steps = steps
        self.clock = Clock(began, *((0.0, 0.0) if folder is None else _forget_after(folder / METRICS_FILE, start)))
        self._last, self.tokens = (start, time.monotonic()), 0  # tokens trained on since the last log
        self._file = None if folder is None else open(folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._board = _tensorboard(folder / "tensorboard", start) if tensorboard and folder is not None else None
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
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self._console.print(text, highlight=False)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Scalars of `metrics` at `step`, and the speed since the last call."""
        now = time.monotonic()
        (since, then), tokens = self._last, self.tokens
        self._last, self.tokens = (step, now), 0
        values = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        values |= {"tokens_per_second": tokens / max(now - then, 1e-9)}
        values |= {"seconds": self.clock.seconds, "goodput": self.clock.goodput}
        self.write(step, values)
        left = (self._steps - step) * (now - then) / max(step - since, 1)
        shown = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s  {_duration(left)} left"
        if values.get("skipped"):
            shown += f"  {values['skipped']:.0f} skipped"
        self._progress.update(self._task, completed=step, shown=shown)
        if not self._console.is_terminal:
            self.say(f"step {step}/{self._steps}  {shown}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and TensorBoard's points."""
        if self._file is None:
            return
        # JSON has no NaN: what is not finite becomes null
        line = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


class Clock:
    """How much of a run's time went into steps that count, those of its earlier processes included."""

    def __init__(self, began: float, seconds: float = 0.0, useful: float = 0.0):
        self._began, self._before, self._useful = began, seconds, useful
        self._lap = began

    def lap(self, *, useful: bool) -> None:
        """The time since the last call was spent in steps, or was not."""
        now = time.monotonic()
        self._useful += (now - self._lap) * useful
        self._lap = now

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    @property
    def goodput(self) -> float:
        return self._useful / max(self.seconds, 1e-9)


class Profiler:
    """A trace of the steps `first` to `last`, for TensorBoard or Perfetto; the parts of it that this process runs.

    A process that would not survive it says so and goes on without.
    """

    def __init__(self, steps: Sequence[int] | None, folder: Path):
        self._first, self._last = steps or (1, 0)
        self._folder, self._running = folder, False

    def before(self, step: int) -> None:
        if self._running or not self._first <= step <= self._last:
            return
        if why := cannot_trace():
            print(f"no trace of step {step} on: {why}", file=sys.stderr)
            self._last = 0
            return
        jax.profiler.start_trace(self._folder)
        self._running = True

    def after(self, step: int, results: Any) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def cannot_trace() -> str | None:
    """Why jax's profiler would crash this process, or None.

    A loaded libtpu of another release than the one that jax asks for has another profiler interface, and starting a
    trace is a segmentation fault (seen with libtpu 0.0.52 under jax 0.10.2). It is loaded to compile for a TPU without
    one, and where JAX_PLATFORMS lets jax look for one.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libtpu.so" not in maps.read_text(errors="replace"):
        return None
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # a machine's own
        return None
    asked = [re.match(r"libtpu==([\d.]+)", need) for need in importlib.metadata.requires("jax") or ()]
    wanted = next((match[1].strip(".") for match in asked if match), found)
    if f"{found}.".startswith(f"{wanted}."):
        return None
    return (
        f"libtpu {found} is loaded, jax {jax.__version__} traces with libtpu {wanted} alone and would crash; "
        "pip install 'jax[tpu]', or JAX_PLATFORMS=cpu where there is no TPU"
    )


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, one dict per logged step; a last line cut short by a kill is left out."""
    lines = (Path(folder) / METRICS_FILE).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _forget_after(file: Path, step: int) -> tuple[float, float]:
    """Drops what was logged after the checkpoint from which the run goes on: those steps are about to come again.

    Returns the seconds that the run has taken, the dropped steps included, and those of them in steps that remain.
    """
    if not file.exists():
        return 0.0, 0.0
    metrics = read_metrics(file.parent)
    kept = [line for line in metrics if line["step"] <= step]
    new = file.with_suffix(".partial")
    new.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
    os.replace(new, file)
    timed = [line for line in metrics if "goodput" in line]
    useful = [line["seconds"] * line["goodput"] for line in timed if line["step"] <= step]
    return (timed[-1]["seconds"] if timed else 0.0), (useful[-1] if useful else 0.0)


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
