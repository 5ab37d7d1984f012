"""Compiles the full matrix of kernels for chips that are not there, and counts their bytes.

    python scripts/prove_kernels.py                            # what has changed since docs/proofs/kernels.json
    python scripts/prove_kernels.py --op grouped_matmul --chip v5p v6e
    python scripts/prove_kernels.py --check                    # only names the rows that are stale
    python scripts/prove_kernels.py --only-cases               # one shape per direction, not the full matrix

Several may run side by side, as with `--chip v5e v5p` and `--chip v6e tpu7x`: about ten processor seconds a row.
A row is a case of tests/pallas_kernels/aot_cases on a chip, under the version of jax. It keeps a hash of the lowered
program: a row whose program is the same is left as it is, so an interrupted run goes on where it was.
"""

# ruff: noqa: E402  (the environment, and where the tests are, come before what depends on them)
from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pallas_kernels.analysis.cases import Case, Source
from pallas_kernels.analysis.compile import missing_compiler, prepare_environment, program_hash
from pallas_kernels.analysis.report import examine
from pallas_kernels.analysis.schedule import Worker
from tests.pallas_kernels.aot_cases import EVERY_SHAPE, ONE_SHAPE, gather

COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
)  # fmt: skip
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- figures: written by scripts/prove_kernels.py -->", "<!-- end of figures -->"
CHIPS = {"tpu": ("v5e", "v5p", "v6e", "tpu7x"), "gpu": ("h100",)}


@dataclasses.dataclass(frozen=True)
class Options:
    json: Path = ROOT / "docs" / "proofs" / "kernels.json"
    """Where the rows are kept."""
    op: tuple[str, ...] = ()
    """Only these ops."""
    chip: tuple[str, ...] = ()
    """Only these chips."""
    only_cases: bool = False
    """One shape per direction, as the tests compile them."""
    check: bool = False
    """Compile nothing; name the stale rows, and end with 1 if there are any."""


def version() -> str:
    return f"jax {importlib.metadata.version('jax')}"


def key(case: Case, chip: str) -> str:
    return f"{case.name} @ {chip}"


def wanted(options: Options) -> Iterator[tuple[Source, Case, str]]:
    for source, case in gather(ONE_SHAPE if options.only_cases else EVERY_SHAPE):
        for chip in CHIPS[case.platform]:
            if (not options.op or case.op in options.op) and (not options.chip or chip in options.chip):
                yield source, case, chip


def read(file: Path) -> dict[str, Any]:
    """The rows of this version of jax."""
    return json.loads(file.read_text()).get(version(), {}) if file.exists() else {}


def change(file: Path, rows: dict[str, Any], gone: Collection[str] = ()) -> dict[str, Any]:
    """Puts rows in, takes some out; another run may be doing the same. Returns all of this version of jax."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        proofs = json.loads(file.read_text()) if file.exists() else {}
        kept = {name: row for name, row in proofs.get(version(), {}).items() if name not in gone}
        proofs[version()] = kept | rows
        partial = file.with_suffix(".partial")
        partial.write_text(one_row_a_line(proofs))
        partial.rename(file)
    finally:
        os.close(folder)
    return proofs[version()]


def one_row_a_line(proofs: dict[str, Any]) -> str:
    """JSON of which a changed row is a changed line."""
    versions = []
    for version, rows in sorted(proofs.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in sorted(rows.items())]
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def hash_of(case: Case, chip: str) -> str:
    """Of the lowered program; of the error where it cannot be lowered."""
    try:
        return program_hash(chip, case.function, *case.arguments)
    except Exception as e:
        return f"cannot be lowered: {type(e).__name__}"


def compiled_before(rows: dict[str, Any], program: str, chip: str) -> dict[str, Any] | None:
    """The compiler's answer to the same program: cases may differ only in what steers the kernel."""
    same = (row for name, row in rows.items() if name.endswith(f"@ {chip}") and row["program"] == program)
    row = next((row for row in same if "memory" in row), None)
    return None if row is None else {"schedules": row.get("schedules", []), **row["memory"]}


def main(options: Options) -> int:
    prepare_environment()
    rows, everything = read(options.json), list(wanted(options))
    stale, failed = [], 0
    with Progress(*COLUMNS, disable=not sys.stderr.isatty()) as progress, Worker() as worker:
        task = progress.add_task("kernels", total=len(everything))
        for source, case, chip in everything:
            name, program = key(case, chip), hash_of(case, chip)
            progress.update(task, advance=1, description=name[:60])
            if rows.get(name, {}).get("program") == program and not rows[name].get("error"):
                continue
            stale.append(name)
            if options.check:
                continue
            if why := missing_compiler(chip):
                sys.exit(why)
            answer = compiled_before(rows, program, chip)
            row = {"program": program, **compact(examine(case, source, chip, worker, answer).as_json())}
            failed += "error" in row
            print(line(name, row), flush=True)
            rows = change(options.json, {name: row})
    if options.check:
        print("\n".join(stale) or "every row is of the program as it is")
        return bool(stale)
    rows = change(options.json, {}, set(rows) - {key(case, chip) for _, case, chip in wanted(Options())})
    if options.json == Options.json:
        PAGE.write_text(with_figures(PAGE.read_text(), rows))
    return bool(failed)


def figures(rows: dict[str, Any]) -> str:
    """The table of docs/kernels.md: one shape per direction."""
    lines = ["| kernel | " + " | ".join(CHIPS["tpu"]) + " |", "|---|" + "---|" * len(CHIPS["tpu"])]
    cases = [case for _, case in gather(ONE_SHAPE)]
    for case in (case for case in cases if case.platform == "tpu"):
        cells = [cell(rows.get(key(case, chip))) for chip in CHIPS["tpu"]]
        lines.append(f"| {case.name} | " + " | ".join(cells) + " |")
    compiled = [case.name for case in cases if case.platform == "gpu" and "memory" in rows.get(key(case, "h100"), {})]
    if compiled:
        lines += ["", "Compiled for an H100: " + "; ".join(compiled) + "."]
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "error" in row:
        return "does not compile"
    ratio, slots = row.get("bytes_over_least"), row.get("matrix_slots")
    parts = [f"{ratio:.2f}x" if ratio else "", f"{slots:.1%}" if slots else ""]
    return ", ".join(filter(None, parts)) or "compiles"


def with_figures(page: str, rows: dict[str, Any]) -> str:
    """The page with its table made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{figures(rows)}\n\n{END}{rest.split(END)[1]}"


def compact(report: dict[str, Any]) -> dict[str, Any]:
    """Rounded, without what is empty, and without what the key says."""

    def short(x: Any) -> Any:
        if isinstance(x, float):
            return round(x, 4) if abs(x) < 1000 else round(x)
        if isinstance(x, dict):
            return {k: short(v) for k, v in x.items()}
        return [short(v) for v in x] if isinstance(x, list | tuple) else x

    empty = lambda v: v is None or (isinstance(v, tuple | list | dict) and not v)  # noqa: E731
    return {k: short(v) for k, v in report.items() if k not in ("case", "chip") and not empty(v)}


def line(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name}: DOES NOT COMPILE: {row['error'][:200]}"
    ratio, slots = row.get("bytes_over_least"), row.get("matrix_slots")
    return (
        f"{name}: {f'{ratio:.3f}x the least bytes' if ratio else 'bytes not compared'}, "
        f"{f'{slots:.1%} of slots' if slots else 'no matrix slots'}, "
        f"temporary {row['memory']['temporary_bytes'] / 1e6:.1f} MB, {row['memory']['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
