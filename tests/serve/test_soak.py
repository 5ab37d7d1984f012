"""The short form of scripts/prove_soak.py: clients of every kind for half a minute."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_half_a_minute():
    command = [sys.executable, "scripts/prove_soak.py", "--minutes", "0.5", "--clients", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
