"""Cases, reports and the script that proves the kernels: what they make of what the counter and the compiler say."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import prove_kernels
import pytest

from pallas_kernels.analysis.cases import Case, Source, as_case, shapes_of
from pallas_kernels.analysis.compile import missing_compiler
from pallas_kernels.analysis.report import Report, examine
from pallas_kernels.analysis.schedule import read_schedule
from tests.pallas_kernels.test_analysis import gather_rows, shape

ANSWER = {
    "seconds": 1.0, "argument_bytes": 10, "output_bytes": 20, "temporary_bytes": 30,
    "schedules": [
        {"name": "small", "bundles": 10, "matrix_slots": 0.1, "spills": 0, "fills": 0},
        {"name": "large", "bundles": 99, "matrix_slots": 0.5, "spills": 1, "fills": 2},
    ],
}  # fmt: skip


class FakeWorker:
    """Answers as the compiler's process does, and remembers what it was asked."""

    def __init__(self, answer: dict | None = None) -> None:
        self.answer = answer or ANSWER
        self.asked: list[tuple[str, str]] = []

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_) -> None: ...

    def analyse(self, source: Source, name: str, chip: str) -> dict:
        self.asked.append((name, chip))
        return dict(self.answer)


IDS = np.array([3, 3, 0], np.int32)
CASE = Case("gather/forward, small", gather_rows, (IDS, shape(32, 128)), least_bytes=2 * 2 * 4096 + 12, flops=1e6)
SOURCE = Source("nowhere")


# --- cases -----------------------------------------------------------------------------------------------------------


def test_a_tuple_is_a_case() -> None:
    case = as_case(("op/forward, [8]", abs, (1,), 5.0))
    assert (case.op, case.least_bytes, case.flops, case.platform) == ("op", 5.0, None, "tpu")
    assert as_case(case) is case


def test_compiled_only_shapes_count() -> None:
    got = shapes_of((np.arange(3), jnp.ones(2), np.int32(1), shape(4, dtype=jnp.bfloat16)))
    assert [x.shape for x in got] == [(3,), (2,), (), (4,)]
    assert [x.dtype for x in got] == [jnp.int32, jnp.float32, jnp.int32, jnp.bfloat16]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in got)


def test_cases_from_a_file_with_options(tmp_path) -> None:
    file = tmp_path / "made.py"
    file.write_text("def cases(n=1):\n    return [(f'op/{i}', abs, (i,)) for i in range(n)]\n")
    assert [c.name for c in Source(str(file), options=(("n", 2),)).cases()] == ["op/0", "op/1"]
    assert Source(str(file), "matrix").cases() == []


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_says_what_its_figures_mean() -> None:
    report = examine(CASE, SOURCE, "v5p", FakeWorker())
    moved = 2 * 4096 + 3 * 4096 + 12  # two blocks fetched, three written, the ids
    assert report.counted_bytes == moved and report.bytes_over_least == pytest.approx(moved / CASE.least_bytes)
    assert report.matrix_slots == 0.5  # of the largest
    assert report.memory_us == pytest.approx(moved / 2.77e12 * 1e6)
    assert report.matrix_us == pytest.approx(1e6 / (459e12 * 0.5) * 1e6)
    assert report.memory["temporary_bytes"] == 30 and report.error is None
    json.dumps(report.as_json())


def test_what_cannot_be_counted_is_compiled_all_the_same() -> None:
    case = dataclasses.replace(CASE, arguments=(shape(3, dtype=jnp.int32), shape(32, 128)))
    report = examine(case, SOURCE, "v5p", FakeWorker())
    assert report.counted_bytes is None and report.bytes_over_least is None and report.memory_us is None
    assert "were not given" in report.notes[0] and report.matrix_slots == 0.5


def test_errors_are_in_the_report() -> None:
    def broken(*_):
        raise ValueError("no such shape")

    worker = FakeWorker()
    assert "no such shape" in (examine(dataclasses.replace(CASE, function=broken), SOURCE, "v5p", worker).error or "")
    assert not worker.asked  # what cannot be traced is not sent to the compiler
    assert examine(CASE, SOURCE, "v5p", FakeWorker({"error": "too much VMEM"})).error == "too much VMEM"


def test_without_figures_there_are_no_times() -> None:
    report = Report("op/forward", "v6e")
    assert (report.bytes_over_least, report.matrix_slots, report.memory_us, report.matrix_us) == (None,) * 4


def test_slots_are_counted_between_the_first_and_the_last_matrix_instruction(tmp_path) -> None:
    """64 bundles with one of two slots each, idle before, between and after."""
    row = lambda matrix, spills=0: " ".join(map(str, [matrix, 0, 0, 0, 0, 0, 0, 2, 0, spills, 0]))  # noqa: E731
    busy = [row(1) for _ in range(32)]
    lines = ["title", "names", "2 slots", row(0), *busy, row(0, 3), row(0), *busy, row(0)]
    file = tmp_path / "123-some_kernel.1-45-final_hlo-static-per-bundle-utilization.txt"
    file.write_text("\n".join(lines))
    schedule = read_schedule(file)
    assert schedule is not None and schedule.name == "some_kernel.1"
    assert schedule.matrix_slots == pytest.approx(64 / 66 / 2)
    assert (schedule.bundles, schedule.spills, schedule.fills) == (68, 3, 2 * 68)
    file.write_text("\n".join([*lines[:3], row(1), row(1)]))
    assert read_schedule(file) is None


def test_a_missing_compiler_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "libtpu" in (missing_compiler("v5p") or "") and "jax-cuda13-plugin" in (missing_compiler("h100") or "")


# --- the proof -------------------------------------------------------------------------------------------------------


@pytest.fixture
def proving(monkeypatch, tmp_path):
    """Runs the script on cases of one program; gives its exit code, what it compiled, and the rows."""

    def prove(program: str = "a", answer: dict | None = None, cases=(CASE,), **options):
        worker = FakeWorker(answer)
        monkeypatch.setattr(prove_kernels, "gather", lambda functions: [(SOURCE, case) for case in cases])
        monkeypatch.setattr(prove_kernels, "Worker", lambda: worker)
        monkeypatch.setattr(prove_kernels, "hash_of", lambda case, chip: program)
        monkeypatch.setattr(prove_kernels, "missing_compiler", lambda chip: None)
        file = tmp_path / "kernels.json"
        code = prove_kernels.main(prove_kernels.Options(json=file, **options))
        rows = json.loads(file.read_text())[prove_kernels.version()] if file.exists() else {}
        return code, [chip for _, chip in worker.asked], rows

    return prove


def test_only_rows_whose_program_changed_are_done_again(proving, capsys) -> None:
    code, asked, rows = proving()
    assert (code, asked) == (0, ["v5e", "v5p", "v6e", "tpu7x"])
    row = rows[f"{CASE.name} @ v5p"]
    assert row["program"] == "a" and row["matrix_slots"] == 0.5 and row["bytes_over_least"] > 1
    assert proving()[:2] == (0, [])
    assert proving("b", chip=("v6e",))[:2] == (0, ["v6e"])
    capsys.readouterr()
    assert proving("b", check=True)[:2] == (1, [])
    stale = capsys.readouterr().out.split("\n")
    assert f"{CASE.name} @ v5e" in stale and f"{CASE.name} @ v6e" not in stale
    assert proving("b")[1] == ["v5e", "v5p", "tpu7x"] and proving("b", check=True)[0] == 0


def test_a_program_that_two_cases_share_is_compiled_once(proving) -> None:
    other = dataclasses.replace(CASE, name=CASE.name + ", zipf")
    code, asked, rows = proving(cases=(CASE, other))
    assert code == 0 and len(asked) == 4 and len(rows) == 8
    assert rows[f"{CASE.name} @ v5p"] == rows[f"{other.name} @ v5p"]


def test_what_does_not_compile_is_a_row_and_tried_again(proving) -> None:
    code, _, rows = proving(answer={"error": "too much VMEM"})
    assert code == 1 and all(row["error"] == "too much VMEM" for row in rows.values())
    assert len(proving()[1]) == 4


def test_the_pages_table_is_replaced(monkeypatch) -> None:
    monkeypatch.setattr(prove_kernels, "gather", lambda functions: [(SOURCE, CASE)])
    rows = {f"{CASE.name} @ v5p": {"bytes_over_least": 1.084, "matrix_slots": 0.951, "memory": {}}}
    page = f"above\n{prove_kernels.BEGIN}\nold\n{prove_kernels.END}\nbelow\n"
    new = prove_kernels.with_figures(page, rows)
    assert f"| {CASE.name} | – | 1.08x, 95.1% | – | – |" in new and "old" not in new
    assert new.startswith("above\n") and new.endswith("\nbelow\n") and prove_kernels.with_figures(new, rows) == new
