"""Every shell script of the repository is clean by shellcheck."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def scripts() -> list[Path]:
    return sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch")])


def shellcheck() -> str:
    beside = Path(sys.executable).parent / "shellcheck"
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed here; the test extra brings it")
    return found


def test_shell_scripts_are_clean() -> None:
    program = shellcheck()
    done = subprocess.run([program, "-x", "-P", ".", *map(str, scripts())], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_sees_a_mistake(tmp_path: Path) -> None:
    """That the check above can fail."""
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    assert subprocess.run([shellcheck(), str(tmp_path / "bad.sh")], capture_output=True).returncode == 1


@pytest.mark.parametrize("script", scripts(), ids=lambda script: script.name)
def test_scripts_stop_at_errors(script: Path) -> None:
    text = script.read_text()
    sourced = text.startswith("# shellcheck shell=bash")
    assert sourced or (text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text)
