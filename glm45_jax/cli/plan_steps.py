"""`glm45 plan train`, `prefill` and `decode`: whole steps on slices that are not there."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glm45_jax.config import RematPolicy
from glm45_jax.errors import UserError

if TYPE_CHECKING:
    from glm45_jax.config import ModelConfig
    from glm45_jax.plan.report import Plan
    from glm45_jax.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Step:
    """What the three have in common."""

    model: str = "glm-4.5-air"
    """A preset."""
    slice: str = "v5p:4x4x4"
    """v5e:16x16, v5p:8x8x4, v6e:8x8, tpu7x:4x4x4 (chips along each side), h100:64 (how many)."""
    seq_len: int | None = None
    """Tokens of a sequence; of decoding, slots of the cache, all full. 4096 without."""
    batch_size: int | None = None
    """Sequences of a step, all devices together. One for each group of devices in training, else 64, without."""
    mesh: str | None = None
    """Sizes of mesh axes, as fsdp=16,expert=16; axes not named are 1, and fsdp what remains."""
    compile: bool = True
    """Compile, which takes minutes for a large model; else FLOPs, bytes and what the program itself sends are counted,
    in seconds, and only a part of the memory."""
    suggest: bool = False
    """Try meshes (in training, remat policies too): all by estimate, the best few compiled."""
    tries: int = 3
    """How many of them to compile."""
    json: Path | None = None
    """Write the plan to this file; `-` is standard output, with nothing else on it."""


@dataclasses.dataclass(frozen=True)
class Train(Step):
    """Plans a step of training: compiles it for the slice, and says whether it fits and what bounds it.

    The roofline is the time if everything overlapped, the serial time if nothing did. FLOPs and bytes are a device's.
    Memory and collectives are the compiler's; it needs the extra: pip install 'glm45-jax[aot]'.

    examples:
      glm45 plan train --model glm-4.5-air --slice v5p:4x4x4 --mesh fsdp=8,expert=8
      glm45 plan train --model glm-4.5 --slice v5p:8x8x4 --suggest
      glm45 plan train --recipe recipes/mini.yaml --slice v5e:2x2 --json plan.json
    """

    recipe: Path | None = None
    """A training run's YAML file: its model, optimizer, lengths; other options change them."""
    remat: RematPolicy | None = None
    """What the backward pass computes anew; "full" without, or the recipe's."""
    accumulation: int | None = None
    """Micro-batches of a step."""
    largest_batch: bool = False
    """Find the largest batch that fits too; compiles some more."""


@dataclasses.dataclass(frozen=True)
class Prefill(Step):
    """Plans reading prompts into the cache.

    examples:
      glm45 plan prefill --model glm-4.5-air --slice v6e:4x4 --seq-len 8192 --batch-size 8
    """


@dataclasses.dataclass(frozen=True)
class Decode(Step):
    """Plans one step of decoding, every row's cache full: `generate`'s, or with --engine that of `glm45 serve`.

    examples:
      glm45 plan decode --model glm-4.5 --slice v5p:2x4x4 --seq-len 32768 --batch-size 64
      glm45 plan decode --model glm-4.5 --slice tpu7x:2x2x2 --engine --quantize fp8 --cache-dtype fp8 --batch-size 128
    """

    engine: bool = False
    """The engine's step over pages, in which all devices have every row; sampling is in it."""
    quantize: Literal["int8", "fp8", "int8-block", "fp8-block"] | None = None
    """Weights in one byte, with a scale per output channel or per block of 128 x 128."""
    cache_dtype: Literal["int8", "fp8"] | None = None
    """Keys and values in one byte; the engine's."""
    page_size: int = 64
    """Tokens of a page of the engine's cache."""


def main(args: Train | Prefill | Decode) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: whatever devices are here are left alone
    from glm45_jax.plan.slices import parse_slice, resolved
    from pallas_kernels.analysis.compile import missing_compiler, prepare_environment

    where = parse_slice(args.slice)
    if args.compile and (why := missing_compiler(where.chip.name)):
        raise UserError(f"{why}; with --no-compile FLOPs and bytes are counted all the same")
    prepare_environment()
    from glm45_jax.plan.jobs import default_mesh, engine_mesh, parse_mesh
    from glm45_jax.plan.report import plan

    program = type(args).__name__.lower()
    name, model = _model(args)
    if args.mesh:
        mesh = parse_mesh(args.mesh)
    elif isinstance(args, Decode) and args.engine:
        mesh = engine_mesh(model, where.devices)
    else:
        mesh = default_mesh(program, model, where.devices)
    job = _job(args, name, model, resolved(mesh, where.devices))
    if args.suggest:
        best = _suggest(args, job, model)
    else:
        best = _with_status(f"{program} of {name} on {args.slice}", lambda: plan(job, args.slice, mesh, args.compile))
    if isinstance(args, Train) and args.largest_batch:
        best = _largest_batch(args, best)
    if args.json != Path("-"):
        _print(best)
    if args.json is not None:
        _write(args.json, best)
    return 0


def _model(args: Step) -> tuple[str, ModelConfig]:
    from glm45_jax.config import get_preset
    from glm45_jax.train.config import load_train_config

    if isinstance(args, Train) and args.recipe is not None:
        return args.recipe.stem, load_train_config(args.recipe).model
    return args.model, get_preset(args.model)


def _job(args: Step, name: str, model: ModelConfig, sizes: dict[str, int]) -> Any:
    from glm45_jax.plan.jobs import decode_job, prefill_job, rows_at_once, train_job
    from glm45_jax.plan.programs import Storage

    if isinstance(args, Train):
        return train_job(train_config(args, model, rows_at_once("train", sizes)), name)
    batch, length = args.batch_size or rows_at_once("serve", sizes), args.seq_len or 4096
    if isinstance(args, Prefill):
        return prefill_job(model, name, batch, length)
    assert isinstance(args, Decode)
    storage = Storage(args.quantize, args.cache_dtype, args.page_size)
    return decode_job(model, name, batch, length, storage, args.engine)


def train_config(args: Train, model: ModelConfig, batch_size: int) -> TrainConfig:
    """The run asked for: the recipe's, or the preset's with float32 parameters, with what the options change."""
    from glm45_jax.train.config import TrainConfig, load_train_config

    said = {"seq_len": args.seq_len, "batch_size": args.batch_size, "accumulation": args.accumulation}
    changes: dict[str, Any] = {k: v for k, v in said.items() if v is not None}
    if args.recipe is not None:
        config = load_train_config(args.recipe)
        model = config.model if args.remat is None else config.model.replace(remat=args.remat)
        return config.replace(model=model, **changes)
    model = model.replace(param_dtype="float32", remat=args.remat or "full")
    accumulation = args.accumulation or 1
    return TrainConfig(model=model, steps=1000, **{"seq_len": 4096, "batch_size": batch_size * accumulation, **changes})


def _with_status(what: str, run: Any) -> Any:
    from rich.console import Console

    with Console(stderr=True).status(what):
        return run()


def _suggest(args: Step, job: Any, model: ModelConfig) -> Plan:
    """The best plan of some that are compiled; a table of all of them goes to the terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from glm45_jax.plan.jobs import train_job, with_remat
    from glm45_jax.plan.report import plan
    from glm45_jax.plan.search import candidates

    remats = (args.remat,) if isinstance(args, Train) and args.remat else None
    found = candidates(job, model, args.slice, remats)
    if not found:
        raise UserError(f"no mesh of {args.slice} divides {job.batch} rows and the model's heads and experts")
    tried = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=min(args.tries, len(found)))
        for candidate in found[: args.tries]:
            progress.update(task, description=candidate.name)
            of_remat = job
            if isinstance(args, Train):
                of_remat = train_job(with_remat(train_config(args, model, job.batch), candidate.remat), job.model)
                of_remat = dataclasses.replace(of_remat, batch=job.batch)
            tried.append(plan(of_remat, args.slice, candidate.mesh, args.compile))
            progress.advance(task)
    if args.json != Path("-"):
        Console().print(_tried_table(tried, len(found)))
    return min(tried, key=lambda p: (p.fits is False, p.roofline_seconds))


def _largest_batch(args: Train, best: Plan) -> Plan:
    from glm45_jax.parallel import MeshConfig
    from glm45_jax.plan.jobs import train_job, with_remat
    from glm45_jax.plan.search import largest_batch

    name, model = _model(args)
    mesh = MeshConfig(**best.mesh)

    def fits(batch: int) -> Plan:
        from glm45_jax.plan.report import plan

        config = with_remat(train_config(args, model, batch), best.remat).replace(batch_size=batch)
        return plan(train_job(config, name), args.slice, mesh)

    found = _with_status("the largest batch that fits", lambda: largest_batch(best, fits))
    return dataclasses.replace(best, largest_batch=found)


def _write(file: Path, plan: Plan) -> None:
    text = json.dumps(plan.as_json(), indent=2, allow_nan=False) + "\n"
    if file == Path("-"):
        print(text, end="")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.rename(file)


# --- tables ----------------------------------------------------------------------------------------------------------


def _print(plan: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"{plan.program}, {plan.model} on {plan.slice}: {plan.batch} x {plan.seq_len} tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for row in _rows(plan):
        table.add_row(*row)
    Console().print(table)
    for note in plan.notes:
        Console().print(f"[dim]note: {note}[/dim]")


def _rows(plan: Plan) -> list[tuple[str, str, str]]:
    m = plan.memory
    mesh = ", ".join(f"{a}={n}" for a, n in plan.mesh.items() if n > 1) or "one device"
    rows = [("mesh", mesh, f"{plan.chips} chips, {plan.devices} devices; remat {plan.remat}")]
    parts = ("parameters", "optimizer", "cache", "batch", "activations", "temporaries", "outputs")
    rows += [(name, gib(getattr(m, name)), "") for name in parts if getattr(m, name)]
    verdict = {None: "not compiled", True: "[green]fits[/green]", False: "[red]does not fit[/red]"}[plan.fits]
    rows.append(("peak of a device", gib(m.peak), f"of {gib(m.limit)}: {verdict}"))
    if plan.largest_batch is not None:
        rows.append(("largest batch", str(plan.largest_batch), "sequences that fit"))
    rows.append(("compute", seconds(plan.compute_seconds), f"{plan.flops / 1e12:.4g} TFLOP of a device"))
    rows.append(("memory", seconds(plan.memory_seconds), f"{plan.bytes / 1e9:.4g} GB read and written"))
    for axis, time in plan.collective_seconds.items():
        speed = (plan.link_bytes_per_s or {})[axis]
        sent = plan.collective_bytes[axis]
        rows.append((f"axis {axis}", seconds(time), f"{sent / 1e9:.4g} GB at {speed / 1e9:.4g} GB/s"))
    rows.append(("all overlapped", seconds(plan.roofline_seconds), f"bound by {plan.bound_by}"))
    rows.append(("nothing overlapped", seconds(plan.serial_seconds), ""))
    rows.append(("MFU at the roofline", f"{plan.mfu:.1%}", f"{plan.model_flops / 1e12:.4g} model TFLOP of all devices"))
    rows.append(("tokens/s", f"{plan.tokens / plan.roofline_seconds:,.0f}", "at the roofline"))
    return rows


def _tried_table(tried: list[Plan], of: int) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=f"{len(tried)} of {of} candidates compiled", title_justify="left", box=box.SIMPLE)
    for name in ("mesh", "remat", "peak", "fits", "roofline", "serial", "bound by", "MFU"):
        table.add_column(name, no_wrap=True)
    for p in tried:
        mesh = ", ".join(f"{a}={n}" for a, n in p.mesh.items() if n > 1)
        fits = {None: "–", True: "yes", False: "no"}[p.fits]
        times = (seconds(p.roofline_seconds), seconds(p.serial_seconds))
        table.add_row(mesh, p.remat, gib(p.memory.peak), fits, *times, p.bound_by, f"{p.mfu:.1%}")
    return table


def gib(nbytes: float | None) -> str:
    return "–" if nbytes is None else f"{nbytes / 2**30:.2f} GiB"


def seconds(time: float) -> str:
    return f"{time:.3g} s" if time >= 1 else f"{time * 1e3:.3g} ms" if time >= 1e-3 else f"{time * 1e6:.3g} µs"
