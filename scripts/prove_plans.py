"""Plans the whole matrix of models, programs and slices: docs/proofs/plans.json, and docs/plans.md from it.

    python scripts/prove_plans.py                        # what is not there yet
    python scripts/prove_plans.py --only glm-4.5-air v5p # entries whose names have all of these words
    python scripts/prove_plans.py --again --only decode  # made anew
    python scripts/prove_plans.py --no-compile           # count what is not there yet: half a minute each
    python scripts/prove_plans.py --page                 # only the page

Each entry is a process of its own that compiles the program for the slice: minutes of a core, hours for all of them. It
is written as soon as it is done, so that a stopped run goes on where it was. One that fails, or takes longer than the
timeout, is written with its error, and tried again the next time; one that was only counted is compiled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plans.md"
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclasses.dataclass(frozen=True)
class Options:
    json: Path = ROOT / "docs" / "proofs" / "plans.json"
    """Where the entries are kept."""
    only: tuple[str, ...] = ()
    """Words that an entry's name must have, all of them."""
    again: bool = False
    """Make entries anew that are there."""
    compile: bool = True
    """Compile; else count, without the compiler's figure for the memory."""
    page: bool = False
    """Plan nothing, write the page."""
    timeout: float = 3600
    """Seconds of an entry."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One plan: a program of a model on a slice."""

    title: str
    program: str
    model: str
    slice: str
    mesh: str
    seq_len: int
    batch: int
    largest: bool = False  # find the largest batch too

    @property
    def name(self) -> str:
        return f"{self.title}, {self.model} on {self.slice}"

    def arguments(self, compiled: bool) -> list[str]:
        sizes = ["--seq-len", str(self.seq_len), "--batch-size", str(self.batch)]
        sizes += ["--largest-batch"] if self.largest and compiled else []
        return [self.program, "--model", self.model, "--slice", self.slice, "--mesh", self.mesh, *sizes]


# slice -> devices
TRAINING = {
    "glm-4.5-air": {
        "v5e:16x16": 256, "v5p:4x4x4": 64, "v5p:8x8x4": 256, "v6e:16x16": 256, "tpu7x:4x4x4": 128, "h100:64": 64,
    },
    "glm-4.5": {
        "v5e:16x16": 256, "v5p:4x4x8": 128, "v5p:8x8x4": 256, "v6e:16x16": 256, "tpu7x:4x4x4": 128, "h100:256": 256,
    },
}  # fmt: skip
# slice -> (data, expert, tensor); experts lie over the last two
SERVING = {
    "glm-4.5-air": {
        "v5e:4x8": (1, 4, 8), "v5p:2x2x1": (1, 1, 4), "v5p:2x2x2": (1, 2, 4), "v6e:4x4": (1, 2, 8),
        "tpu7x:2x2x1": (1, 2, 4), "h100:8": (1, 1, 8),
    },
    "glm-4.5": {
        "v5e:8x8": (2, 4, 8), "v5p:2x2x4": (1, 2, 8), "v5p:2x4x4": (1, 4, 8), "v6e:8x8": (2, 4, 8),
        "tpu7x:2x2x2": (1, 2, 8), "h100:16": (1, 2, 8),
    },
}  # fmt: skip
_TOKENS = 16384  # of a device in training: as many as hide the gathering of weights
# title -> tokens of a sequence, pieces that a context axis cuts it into
STAGES = {"pre-training 4K": (4096, 1), "mid-training 32K": (32768, 4), "mid-training 128K": (131072, 16)}


LARGEST = ("pre-training 4K", "glm-4.5", "v5p:8x8x4")  # whose largest batch is looked for


def entries() -> Iterator[Entry]:
    for model, slices in TRAINING.items():
        for title, (seq_len, context) in STAGES.items():
            for name, devices in slices.items():
                rows = devices // context
                expert = min(4, rows)  # more make an all-to-all longer, and cost more than they save of fsdp's gathers
                mesh = f"fsdp={rows // expert},expert={expert},context={context}"
                batch, largest = rows * max(1, _TOKENS * context // seq_len), (title, model, name) == LARGEST
                yield Entry(title, "train", model, name, mesh, seq_len, batch, largest)
    for model, slices in SERVING.items():
        for name, (data, expert, tensor) in slices.items():
            mesh = f"data={data},fsdp=1,expert={expert},tensor={tensor}"
            yield Entry("prefill 8K", "prefill", model, name, mesh, 8192, 2 * data * expert)
            yield Entry("decode at 32K", "decode", model, name, mesh, 32768, 16 * data * expert)


def main(options: Options) -> int:
    rows = json.loads(options.json.read_text()) if options.json.exists() else {}
    wanted = [e for e in entries() if all(word in e.name for word in options.only)]
    missing = [e for e in wanted if options.again or is_missing(rows.get(e.name), options.compile)]
    failed = 0
    if not options.page:
        with Progress(*COLUMNS, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("plans", total=len(missing))
            for entry in missing:
                progress.update(task, description=entry.name)
                row = planned(entry, options)
                failed += "error" in row
                print(f"{entry.name}: {summary(row)}", flush=True)
                rows = put(options.json, entry.name, row)
                progress.advance(task)
    if options.json == Options.json:
        written(PAGE, page(rows))
    return int(failed > 0)


def is_missing(row: dict[str, Any] | None, compiled: bool) -> bool:
    return row is None or "error" in row or (compiled and row["fits"] is None)


def planned(entry: Entry, options: Options) -> dict[str, Any]:
    """The plan, made by the command in a process of its own; or what went wrong."""
    told = circumstances("jax", "jaxlib", "libtpu")
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "glm45_jax", "plan", *entry.arguments(options.compile), "--json", str(file)]
        command += [] if options.compile else ["--no-compile"]
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=options.timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"not done within {options.timeout:.0f} s", **told}
        if done.returncode or not file.exists():
            return {"error": (done.stderr.strip().splitlines() or ["no answer"])[-1][:500], **told}
        return {**json.loads(file.read_text()), "title": entry.title, **told}


def put(file: Path, name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Puts one entry in, in the matrix's order; another run may have written others since."""
    rows = json.loads(file.read_text()) if file.exists() else {}
    rows[name] = row
    order = {entry.name: i for i, entry in enumerate(entries())}
    rows = dict(sorted(rows.items(), key=lambda item: order.get(item[0], len(order))))
    lines = [f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in rows.items()]
    written(file, "{\n" + ",\n".join(lines) + "\n}\n")
    return rows


def written(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.rename(file)


# --- the page --------------------------------------------------------------------------------------------------------

HEAD = """# Plans

What a step needs of one device, and the time that it cannot beat: programs compiled, or counted, for slices that were
not there, by `scripts/prove_plans.py` (`docs/proofs/plans.json` has all figures and the circumstances).
`glm45 plan train`, `prefill` and `decode` make one.

- *Peak* is the compiler's, of a device; *limit* its memory less what the runtime keeps. Where a peak is given as "more
  than", nothing was compiled (or, beside "no", it was refused without a figure): parameters, optimizer, cache and saved
  activations, without the step's temporaries. The times of such a row are counted from the program that would be
  compiled; XLA's own copies and collectives are missing (of the step of GLM-4.5 on v5p:8x8x4, 4 % of the memory's time
  and 2 % of the links').
- *Compute*: executed FLOPs (recomputation and padding included) at the bf16 peak. *Memory*: bytes read and written at
  the memory's speed (on GPUs a kernel's operands once, as if the L2 cache kept them). *Links*: the busiest mesh
  axis, its bytes at the speed of the links that it lies on.
- *Roofline* is the longest of them, as if all else hid behind it; *serial* their sum. Nothing here was clocked.
- *MFU* is model FLOPs (no recomputation) over what all chips could do in the roofline's time: an upper bound.
"""


def page(rows: dict[str, Any]) -> str:
    parts = [HEAD]
    for title in dict.fromkeys(entry.title for entry in entries()):
        for model in TRAINING:
            found = [e for e in entries() if (e.title, e.model) == (title, model) and e.name in rows]
            if found:
                parts.append(f"## {title[0].upper()}{title[1:]}: {model}\n\n{table(found, rows)}\n")
    return "\n".join(parts)


def table(found: list[Entry], rows: dict[str, Any]) -> str:
    names = ("slice", "mesh", "batch", "peak", "limit", "fits", "compute", "memory", "links", "roofline", "serial",
             "bound by", "MFU", "tokens/s")  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for entry in found:
        cells = figures(rows[entry.name])
        mesh = ", ".join(part for part in entry.mesh.split(",") if not part.endswith("=1"))
        lines.append("| " + " | ".join((entry.slice, mesh, str(entry.batch), *cells)) + " |")
    most = {e.slice: rows[e.name].get("largest_batch") for e in found}
    lines += [f"\nThe largest batch that fits {name}: {n} sequences." for name, n in most.items() if n]
    return "\n".join(lines)


def figures(row: dict[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return (f"no plan: {row['error'][:120].replace('|', '/')}", *[""] * 10)
    links = row["collective_seconds"] or {}
    times = (row["compute_seconds"], row["memory_seconds"], max(links.values(), default=0.0))
    return (
        *memory(row),
        *(f"{t * 1e3:.4g} ms" for t in (*times, row["roofline_seconds"], row["serial_seconds"])),
        row["bound_by"],
        f"{row['mfu']:.1%}",
        f"{row['tokens'] / row['roofline_seconds']:,.0f}",
    )


def memory(row: dict[str, Any]) -> tuple[str, str, str]:
    """The peak, or what there is at least where nothing was compiled; the limit; and whether it fits."""
    m = row["memory"]
    known = sum(m[part] or 0 for part in ("parameters", "optimizer", "cache", "batch", "activations"))
    peak = f"> {known / 2**30:.1f} GiB" if m["peak"] is None else f"{m['peak'] / 2**30:.1f} GiB"
    fits = known <= m["limit"] if row["fits"] is None else row["fits"]
    return peak, f"{m['limit'] / 2**30:.1f} GiB", "no" if not fits else "?" if row["fits"] is None else "yes"


def summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"NO PLAN: {row['error'][:200]}"
    peak, limit, fits = memory(row)
    return (
        f"{peak} of {limit}, fits: {fits}, {row['roofline_seconds']:.4g} s by {row['bound_by']}, MFU {row['mfu']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
