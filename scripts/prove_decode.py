"""Decoding steps compiled for slices that are not there: docs/proofs/decode.json, and their tables in docs/engine.md.

    python scripts/prove_decode.py                 # what is not there yet: one to three minutes each
    python scripts/prove_decode.py --only air      # entries whose names have these words
    python scripts/prove_decode.py --again         # anew
    python scripts/prove_decode.py --page          # only the tables

Each entry is the engine's own step, sampling included, with every sequence decoding; it is compiled by the TPU's
compiler in a process of its own. Beside the bytes that are counted in it stand the least: each weight that some token
meets and each sequence's keys and values, once, in equal shares of the devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances, write_figures

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "engine.md"
BATCHES, ACCEPTANCES, MOST_DRAFTS, SPECULATED_LENGTH = (1, 8, 32, 128), (0.6, 0.8, 0.9), 3, 1536


@dataclasses.dataclass(frozen=True)
class Options:
    json: Path = ROOT / "docs" / "proofs" / "decode.json"
    """Where the entries are kept."""
    only: tuple[str, ...] = ()
    """Words that an entry's name must have, all of them."""
    again: bool = False
    """Make entries anew that are there."""
    page: bool = False
    """Compile nothing, write the tables."""


@dataclasses.dataclass(frozen=True)
class Entry:
    model: str
    slice: str
    weights: str | None
    cache: str | None
    seq_len: int
    batch: int = 128

    @property
    def name(self) -> str:
        kept = f"weights {self.weights or 'bfloat16'}, cache {self.cache or 'bfloat16'}"
        return f"{self.model} on {self.slice}, {kept}, {self.batch} x {self.seq_len}"

    def arguments(self) -> list[str]:
        sizes = ["--batch-size", str(self.batch), "--seq-len", str(self.seq_len)]
        kept = ["--quantize", self.weights] if self.weights else []
        kept += ["--cache-dtype", self.cache] if self.cache else []
        return ["decode", "--engine", "--model", self.model, "--slice", self.slice, *sizes, *kept]


AIR, FULL = ("glm-4.5-air", "tpu7x:2x2x1"), ("glm-4.5", "tpu7x:2x2x2")
# a prompt of 1K and an answer of 1K: 1536 tokens on average, 2048 at the end
ENTRIES = (
    Entry(*AIR, None, None, 1536),
    Entry(*AIR, None, None, 2048),
    Entry(*AIR, "fp8", "fp8", 1536),
    Entry(*AIR, "int8", "int8", 1536),
    Entry(*FULL, "fp8", None, 1536),
    Entry(*FULL, "fp8", "fp8", 1536),
    Entry(*FULL, "fp8", "fp8", 2048),
)


def main(options: Options) -> int:
    rows = json.loads(options.json.read_text())["steps"] if options.json.exists() else {}
    rows = {entry.name: rows[entry.name] for entry in ENTRIES if entry.name in rows}
    failed = 0
    for entry in ENTRIES:
        wanted = all(word in entry.name for word in options.only) and not options.page
        if wanted and (options.again or "error" in rows.get(entry.name, {"error": ""})):
            rows[entry.name] = row = planned(entry)
            failed += "error" in row
            said = row["error"] if "error" in row else f"{row['over_least']:.3f} of the least bytes"
            print(f"{entry.name}: {said}", flush=True)
            write_figures(options.json, {"steps": rows, "speculation": speculation()})
    if rows and options.page:
        write_figures(options.json, {"steps": rows, "speculation": speculation()})
    if options.json == Options.json:
        written(PAGE, {"decode": steps_table(rows), "speculation": speculation_tables()})
    return int(failed > 0)


def planned(entry: Entry) -> dict[str, Any]:
    """The plan's figures and what is made of them; or the error."""
    from glm45_jax.config import get_preset
    from glm45_jax.plan.decode_bytes import least_bytes
    from glm45_jax.plan.programs import Storage

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "glm45_jax", "plan", *entry.arguments(), "--json", str(file)]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode or not file.exists():
            return {"error": done.stderr.strip()[-600:], **circumstances("jax", "libtpu")}
        plan = json.loads(file.read_text())
    config = get_preset(entry.model)
    least = least_bytes(config, entry.batch, entry.seq_len, Storage(entry.weights, entry.cache)) / plan["devices"]
    return {
        **dataclasses.asdict(entry),
        "least_bytes": least,
        "over_least": plan["bytes"] / least,
        "least_seconds": least / plan["device_bytes_per_s"],
        "plan": plan,
        **circumstances("jax", "libtpu"),
    }


def speculation() -> list[dict[str, Any]]:
    """The ceiling for one to three drafts."""
    from glm45_jax.config import get_preset
    from glm45_jax.plan.decode_bytes import experts_met, speculation_ceiling
    from glm45_jax.plan.programs import Storage

    found = []
    for model, storage in (("glm-4.5-air", Storage()), ("glm-4.5", Storage("fp8", "fp8"))):
        config = get_preset(model)
        for batch in BATCHES:
            for acceptance in ACCEPTANCES:
                of = lambda n, c=config, b=batch, a=acceptance, s=storage: speculation_ceiling(  # noqa: E731
                    c, b, SPECULATED_LENGTH, n, a, s
                )
                found.append({
                    "model": model, "storage": dataclasses.asdict(storage), "batch": batch, "acceptance": acceptance,
                    "seq_len": SPECULATED_LENGTH, "experts_met": experts_met(config, batch),
                    "experts_met_with_one_draft": experts_met(config, 2 * batch),
                    "ceiling": {n: of(n) for n in range(1, MOST_DRAFTS + 1)},
                })  # fmt: skip
    return found


# --- the tables ------------------------------------------------------------------------------------------------------


def steps_table(rows: dict[str, Any]) -> str:
    head = ("model, slice", "weights", "cache", "tokens of each", "GB counted", "GB least", "ratio", "memory", "links")
    lines = ["| " + " | ".join((*head, "one after the other", "peak")) + " |", "|" + "---|" * 11]
    for entry in ENTRIES:
        row = rows.get(entry.name)
        if row is None or "error" in row:
            continue
        plan, ms = row["plan"], lambda seconds: f"{seconds * 1e3:.2f} ms"
        links = max(plan["collective_seconds"].values(), default=0)
        lines.append(
            f"| {entry.model} on {entry.slice} | {entry.weights or 'bfloat16'} | {entry.cache or 'bfloat16'} | "
            f"{entry.seq_len} | {plan['bytes'] / 1e9:.2f} | {row['least_bytes'] / 1e9:.2f} | {row['over_least']:.3f} | "
            f"{ms(plan['memory_seconds'])} | {ms(links)} | {ms(plan['serial_seconds'])} | "
            f"{plan['memory']['peak'] / 2**30:.1f} GiB |"
        )
    return "\n".join(lines)


def speculation_tables() -> str:
    found = speculation()
    head = ["model", "batch", "experts met: one token, two", *(f"acceptance {a}" for a in ACCEPTANCES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model in dict.fromkeys(row["model"] for row in found):
        for batch in BATCHES:
            same = [row for row in found if (row["model"], row["batch"]) == (model, batch)]
            met = f"{same[0]['experts_met']:.0f}, {same[0]['experts_met_with_one_draft']:.0f}"
            cells = []
            for row in same:
                best = max(row["ceiling"], key=lambda n, row=row: row["ceiling"][n])
                one = f"{row['ceiling'][1]:.2f}"
                cells.append(one if best == 1 else f"{one} ({row['ceiling'][best]:.2f} with {best})")
            lines.append(f"| {model} | {batch} | {met} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(page: Path, tables: dict[str, str]) -> None:
    """Each table between its marks."""
    text = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name}: written by scripts/prove_decode.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    page.write_text(text)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
