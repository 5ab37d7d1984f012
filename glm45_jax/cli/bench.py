"""`glm45 bench`: times of kernels on the device at hand, and of a server under load (`bench_serve.py`)."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from glm45_jax.cli import bench_serve
from glm45_jax.cli.plan import Op
from glm45_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Times each kernel on the device at hand: its implementations by turns, and other libraries' where installed.

    "of the bound" is the share of the device's peak: the least time that its peak of products, or of memory, allows for
    the work, over the time taken. A known chip's peaks are those of its data sheet; on other devices, such as CPUs,
    they are measured on a dense product and on reading a matrix.

    examples:
      glm45 bench kernels
      glm45 bench kernels --op grouped_matmul fused_moe --json
      glm45 bench kernels --model glm-4.5-air --rows 8192 --tokens 8192 --sequence 4096
    """

    op: tuple[Op, ...] = ()
    """Only these ops; all without."""
    model: str | None = None
    """A preset, whose widths the kernels have; without, "small" on a CPU and glm-4.5-air elsewhere."""
    dtype: str | None = None
    """Of arrays; without, float32 on a CPU and bfloat16 elsewhere."""
    experts: int = 16
    """Experts that the device holds."""
    rows: int | None = None
    """Routed rows in training; without, 1024 on a CPU and 8192 elsewhere."""
    tokens: int | None = None
    """Tokens in training; without, 512 on a CPU and 8192 elsewhere."""
    sequence: int | None = None
    """Length of a sequence, and of what is cached in decoding; without, 512 on a CPU and 4096 elsewhere."""
    implementation: tuple[str, ...] = ()
    """Of ours only these, such as cpu and gpu; without, all that the device can run."""
    seconds: float = 0.3
    """About how long each implementation is called for."""
    json: Annotated[bool, tyro.conf.arg(aliases=["-j"])] = False
    """Print JSON, for machines."""


_ON_CPU = {"model": "small", "dtype": "float32", "rows": 1024, "tokens": 512, "sequence": 512}
_ELSEWHERE = {"model": "glm-4.5-air", "dtype": "bfloat16", "rows": 8192, "tokens": 8192, "sequence": 4096}


def _sizes(args: Kernels, platform: str) -> dict[str, Any]:
    defaults = _ON_CPU if platform == "cpu" else _ELSEWHERE
    chosen = {name: given if (given := getattr(args, name)) is not None else value for name, value in defaults.items()}
    return chosen | {"experts": args.experts, "decoded": (1, 8) if platform == "cpu" else (1, 8, 64)}


def _benched(args: Kernels, platform: str) -> Iterator[dict[str, Any]]:
    """One row for each implementation of each call."""
    import jax.numpy as jnp

    from glm45_jax.plan.kernels import kernel_cases
    from glm45_jax.plan.peers import peers, prepared
    from pallas_kernels.analysis.timing import device_peak, random_arrays, time_by_turns

    sizes = _sizes(args, platform)
    peak = device_peak(jnp.dtype(sizes["dtype"]))
    names = {"cpu": ("reference", "cpu"), "tpu": ("reference", "cpu", "tpu"), "gpu": ("reference", "cpu", "gpu")}
    on_cpu = {"cpu": ("native", "cpu")} if platform == "cpu" else {}  # what a CPU takes left to choose
    for op in args.op or (None,):
        chosen = args.implementation or names.get(platform, ("reference",))
        by_name = {name: kernel_cases(op=op, implementation=on_cpu.get(name, name), **sizes) for name in chosen}
        for cases in zip(*by_name.values()):
            case = cases[0]
            arguments, others = random_arrays(case.arguments), peers(case, platform)
            functions = {name: c.function for name, c in zip(by_name, cases)} | others
            layouts = {name: prepared(case, name, arguments) for name in others}
            times = time_by_turns(functions, arguments, args.seconds, layouts)
            yield from _rows(case, times, peak)


def _rows(case: Any, times: dict[str, Any], peak: Any) -> Iterator[dict[str, Any]]:
    reference = times.get("reference", "not timed")
    for name, taken in times.items():
        row = {"case": case.name, "implementation": name, "device": peak.device, "peak_measured": peak.measured}
        if isinstance(taken, str):
            yield {**row, "error": taken}
            continue
        seconds = statistics.median(taken)
        products, memory = case.flops / peak.flops, case.least_bytes / peak.bytes
        yield {
            **row,
            "seconds": seconds,
            "fastest_seconds": min(taken),
            "calls": len(taken),
            "flops_per_second": case.flops / seconds,
            "least_bytes_per_second": case.least_bytes / seconds,
            "bound": "products" if products >= memory else "memory",
            "share_of_bound": max(products, memory) / seconds,
            "times_the_reference": None if isinstance(reference, str) else statistics.median(reference) / seconds,
        }


def _table(op: str, rows: list[dict[str, Any]]) -> Any:
    """One op's figures."""
    from rich import box
    from rich.table import Table

    table = Table(title=op, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("", "implementation"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "GFLOP/s", "GB/s", "of the bound", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        name = r["case"].partition("/")[2].partition(", ")[0]
        if "error" in r:
            table.add_row(name, r["implementation"], "[red]cannot run[/red]")
            continue
        times = r["times_the_reference"]
        table.add_row(
            name,
            r["implementation"],
            f"{r['seconds'] * 1e3:.2f}",
            f"{r['flops_per_second'] / 1e9:.1f}",
            f"{r['least_bytes_per_second'] / 1e9:.1f}",
            f"{r['share_of_bound']:.0%} ({r['bound']})",
            "–" if times is None else f"{times:.2f}",
        )
    return table


def main(argv: list[str]) -> int:
    commands = {"kernels": Kernels, "serve": bench_serve.Serve}
    args = tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="glm45 bench")
    if isinstance(args, bench_serve.Serve):
        return bench_serve.main(args)
    import jax
    from rich.console import Console

    from glm45_jax.config import PRESETS

    if args.model is not None and args.model not in PRESETS:
        raise UserError(f"no preset is called {args.model!r}; presets: {', '.join(PRESETS)}")
    progress, rows = Console(stderr=True), []
    with progress.status("measuring the device's peak") as status:
        for row in _benched(args, jax.default_backend()):
            rows.append(row)
            status.update(f"timed {row['case']}")
    if args.json:
        print(json.dumps({"jax": jax.__version__, "rows": rows}, indent=2))
        return 0
    for op in dict.fromkeys(r["case"].partition("/")[0] for r in rows):
        Console().print(_table(op, [r for r in rows if r["case"].startswith(f"{op}/")]))
    for r in rows:
        if "error" in r:
            progress.print(f"{r['case']}, {r['implementation']}: {r['error']}", markup=False)
    return 0
