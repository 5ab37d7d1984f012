"""`glm45 plan`: what programs cost on chips that are not there."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from glm45_jax.errors import UserError

if TYPE_CHECKING:
    from pallas_kernels.analysis.report import Report

Op = Literal[
    "grouped_matmul", "grouped_swiglu", "fused_moe", "flash_attention", "paged_attention", "linear_cross_entropy"
]
TpuChip = Literal["v5e", "v5p", "v6e", "tpu7x"]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Compiles the TPU kernels of a model for named chips, without them, and counts the bytes that they move.

    Bytes are counted from the index maps and the copies; "least" is every operand read once and
    every result written once. Slots are the share of the matrix unit's that the compiler's static schedule fills; it
    knows no waiting for memory, so the time of the counted bytes at the memory's speed stands beside it. XLA's own
    operations around a kernel (MB, rough) come on top. Needs the extra: pip install 'glm45-jax[aot]'.

    examples:
      glm45 plan kernels --op grouped_matmul
      glm45 plan kernels --model glm-4.5 --chip v5p v6e --json
      glm45 plan kernels --op fused_moe --experts 128 --no-compile
    """

    model: str = "glm-4.5-air"
    """A preset, whose widths the kernels have."""
    chip: tuple[TpuChip, ...] = ("v5p",)
    """Chips to compile for."""
    op: tuple[Op, ...] = ()
    """Only these ops; all without."""
    experts: int = 16
    """Experts that a device holds."""
    rows: int = 8192
    """Rows that are routed to them in training."""
    groups: Literal["balanced", "zipf", "one"] = "balanced"
    """How they are spread over the experts: evenly, the i-th expert's share as 1 / i, or all on one."""
    tokens: int = 8192
    """Tokens of a device in training."""
    sequence: int = 4096
    """Length of a sequence in training, and of what is cached in decoding."""
    compile: bool = True
    """Compile too, which takes up to a minute for each kernel; else only bytes are counted."""
    json: Annotated[bool, tyro.conf.arg(aliases=["-j"])] = False
    """Print JSON, for machines."""


def _reports(args: Kernels) -> list[Report]:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pallas_kernels.analysis.cases import Source
    from pallas_kernels.analysis.report import examine
    from pallas_kernels.analysis.schedule import Worker

    sizes = {name: getattr(args, name) for name in ("model", "rows", "experts", "groups", "tokens", "sequence")}
    options = [tuple({**sizes, "op": op}.items()) for op in args.op or get_args(Op)]
    sources = [Source("glm45_jax.plan.kernels", "kernel_cases", o) for o in options]
    work = [(case, source, chip) for source in sources for case in source.cases() for chip in args.chip]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    reports = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress, Worker() as worker:
        task = progress.add_task("", total=len(work))
        for case, source, chip in work:
            progress.update(task, description=f"{case.name} on {chip}"[:70])
            reports.append(examine(case, source, chip, worker if args.compile else None))
            progress.advance(task)
    return reports


def _table(op: str, reports: list[Report]) -> Any:
    """One op's figures."""
    from rich import box
    from rich.table import Table

    what = dict.fromkeys(r.case.partition(", ")[2] for r in reports)
    table = Table(
        title=op,
        caption="; ".join(what),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("", "chip"):
        table.add_column(name, no_wrap=True)
    for name in (
        "kernels\nMB",
        "over\nleast",
        "memory\nµs",
        "filled\nslots",
        "products\nµs",
        "XLA\nMB",
        "temporary\nMB",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    number = lambda x, scale=1.0, form=".1f": "–" if x is None else f"{x * scale:{form}}"  # noqa: E731
    for r in reports:
        figures = (
            number(r.counted_bytes, 1e-6),
            number(r.bytes_over_least, form=".3f"),
            number(r.memory_us),
            number(r.matrix_slots, form=".1%"),
            number(r.matrix_us),
            number(r.xla_bytes, 1e-6),
            number(r.memory.get("temporary_bytes"), 1e-6),
        )
        name = r.case.partition("/")[2].partition(", ")[0]
        table.add_row(name, r.chip, *(figures if r.error is None else ("[red]no[/red]",)))
    return table


def main(argv: list[str]) -> int:
    from glm45_jax.cli import plan_steps

    commands = {
        "train": plan_steps.Train,
        "prefill": plan_steps.Prefill,
        "decode": plan_steps.Decode,
        "kernels": Kernels,
    }
    args = tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="glm45 plan")
    return _kernels(args) if isinstance(args, Kernels) else plan_steps.main(args)


def _kernels(args: Kernels) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: whatever devices are here are left alone
    from glm45_jax.config import PRESETS
    from pallas_kernels.analysis.compile import missing_compiler, prepare_environment

    if args.model not in PRESETS:
        raise UserError(f"no preset is called {args.model!r}; presets: {', '.join(PRESETS)}")
    if args.compile and (why := next(filter(None, map(missing_compiler, args.chip)), None)):
        raise UserError(f"{why}; with --no-compile bytes are counted all the same")
    prepare_environment()
    reports = _reports(args)
    if args.json:
        print(json.dumps([r.as_json() for r in reports], indent=2))
    else:
        from rich.console import Console

        for op in dict.fromkeys(r.case.partition("/")[0] for r in reports):
            Console().print(_table(op, [r for r in reports if r.case.startswith(f"{op}/")]))
    for r in reports:
        if r.error:
            print(f"{r.case} on {r.chip}: {r.error}", file=sys.stderr)
    return int(any(r.error for r in reports))
