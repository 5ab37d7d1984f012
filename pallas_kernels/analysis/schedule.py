"""How well the TPU compiler's schedule fills the matrix unit, read from its final instruction bundles.

libtpu writes its schedule only where it is told to before it is loaded, so cases are compiled by a `Worker`, a process
of its own: `python -m pallas_kernels.analysis.schedule` reads one request a line and answers with one line of JSON.
A schedule is static: a loop's body counts once, and waiting for memory is not in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels.analysis.cases import Case, Source

# columns of the compiler's table of what each bundle does
_MATRIX, _FILLS, _SPILLS, _COLUMNS = 0, 7, 9, 11
_FEWEST = 64  # matrix instructions; what has fewer is no product worth speaking of


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel (or XLA fusion).

    Attributes:
      bundles: instructions, each of several operations side by side.
      matrix_slots: the share of the matrix unit's slots that are filled between its first instruction and its last.
      spills, fills: registers written to memory and read again for want of room.
    """

    name: str
    bundles: int
    matrix_slots: float
    spills: int
    fills: int


def read_schedule(path: str | Path) -> Schedule | None:
    """From a table of the compiler's; None where the matrix unit has next to nothing to do."""
    lines = Path(path).read_text().splitlines()
    rows = [list(map(int, line.split())) for line in lines if re.fullmatch(r"[\d\s]+", line) and line.strip()]
    rows = [row for row in rows if len(row) == _COLUMNS]
    used = [row[_MATRIX] for row in rows]
    if sum(used) < _FEWEST:
        return None
    busy = [i for i, n in enumerate(used) if n]
    slots = int(lines[2].split()[0])  # of one bundle
    name = re.sub(r"^\d+-|-\d+-final.*", "", os.path.basename(path))
    share = sum(used) / (busy[-1] - busy[0] + 1) / slots
    return Schedule(name, len(rows), share, sum(r[_SPILLS] for r in rows), sum(r[_FILLS] for r in rows))


# --- the process that asks -------------------------------------------------------------------------------------------


class Worker:
    """Compiles cases in a process of its own. What fails there is an answer with "error", a crash too."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the worker)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()
        self._errors.close()

    def analyse(self, source: Source, name: str, chip: str) -> dict[str, Any]:
        """{"seconds", "argument_bytes", ..., "schedules": [...]} of one case, or {"error": why}."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"source": dataclasses.astuple(source), "name": name, "chip": chip}) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = process.wait()
        self._process = None
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-3:]
        return {"error": f"the compiler's process ended with {code}: " + " | ".join(last)}

    def _start(self) -> subprocess.Popen[str]:
        folder = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        )

    def _stop(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None


# --- the process that answers ----------------------------------------------------------------------------------------


def _answer(case: Case, chip: str, dump: str) -> dict[str, Any]:
    from pallas_kernels.analysis.compile import compile_for

    compiled = compile_for(chip, case.function, *case.arguments)
    schedules = [read_schedule(f) for f in _tables(dump)]
    for file in glob.glob(f"{dump}/*"):
        os.unlink(file)
    return dataclasses.asdict(compiled) | {"schedules": [dataclasses.asdict(s) for s in schedules if s is not None]}


def _tables(dump: str) -> list[str]:
    return sorted(glob.glob(f"{dump}/*final_hlo-static-per-bundle-utilization*"))


def _requests() -> Iterator[tuple[Source, str, str]]:
    for line in sys.stdin:
        request = json.loads(line)
        where, function, options = request["source"]
        yield Source(where, function, tuple((k, v) for k, v in options)), request["name"], request["chip"]


def main() -> None:
    from pallas_kernels.analysis.compile import prepare_environment

    known: dict[Source, dict[str, Case]] = {}
    with tempfile.TemporaryDirectory(prefix="schedules_") as dump:
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump}".strip()
        prepare_environment()
        for source, name, chip in _requests():
            try:
                if source not in known:
                    known[source] = {case.name: case for case in source.cases()}
                answer = _answer(known[source][name], chip, dump)
            except Exception as e:  # whatever the compiler says is the answer
                answer = {"error": f"{type(e).__name__}: {str(e)[:500]}"}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
