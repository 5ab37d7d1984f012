"""`glm45 convert`: what it prints and how it ends (its errors are in test_bad_input.py)."""

from __future__ import annotations

import json

from glm45_jax.cli import main
from tests.convert.support import make


def test_both_ways_with_a_summary_for_machines(tmp_path, capsys) -> None:
    source = make(tmp_path / "hf")
    assert main(["convert", "from-hf", str(source), str(tmp_path / "own"), "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    assert there["tensors"] == 143 and there["resumed_bytes"] == 0 and there["bytes"] > 100_000
    assert len(there["digests"]) == there["arrays"]
    assert main(["convert", "to-hf", str(tmp_path / "own"), str(tmp_path / "back"), "-j"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 143
    assert main(["convert", "verify", str(tmp_path / "back")]) == 0


def test_progress_for_people(tmp_path, capsys) -> None:
    source = make(tmp_path / "hf")
    args = ["convert", "from-hf", str(source), str(tmp_path / "own")]
    assert main(args) == 0
    captured = capsys.readouterr()
    assert "143 tensors, 0.00 GB in" in captured.out
    assert "100%" in captured.err and "kB" in captured.err and "/s" in captured.err
    assert main(args) == 0
    assert "done already" in capsys.readouterr().out
