"""What the proofs that fuzz share: atheris in a process of its own, and hypothesis for a stated time."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_MEGABYTES = 2048  # that fuzzing may take


def guided(
    folder: str, seeds: Iterable[bytes], check: Callable[[bytes], Any], seconds: float, *, longest: int, timeout: int
) -> None:
    """Coverage-guided: runs libFuzzer in this process, which ends with it.

    Args:
      folder: for what it keeps.
      longest: bytes of an input.
      timeout: seconds that one input may take.
    """
    import atheris  # pyright: ignore[reportMissingImports]

    for index, seed in enumerate(seeds):
        (Path(folder) / f"seed{index}").write_bytes(seed)
    # libFuzzer looks at the most memory there ever was, which begins with what this process's parent held
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + _MEGABYTES
    options = [f"-max_total_time={seconds:.0f}", f"-max_len={longest}", f"-timeout={timeout}", f"-rss_limit_mb={most}"]
    options += ["-print_final_stats=1", f"-artifact_prefix={folder}/", folder]
    atheris.Setup([sys.argv[0], *options], check)
    atheris.Fuzz()


def guided_apart(code: Callable[[str], str]) -> dict[str, Any]:
    """Runs `code(folder)`, which calls `guided`, in a process of its own; raises with its output if that found any."""
    with tempfile.TemporaryDirectory() as folder:
        command, here = [sys.executable, "-c", code(folder)], Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, errors="replace")
        output = done.stdout + done.stderr
        found = re.findall(r"cov: (\d+) ft: (\d+)", output)
        if done.returncode != 0 or not found:
            raise SystemExit(output[-5000:])
        kept = len(list(Path(folder).iterdir()))
    runs = re.findall(r"stat::number_of_executed_units: (\d+)", output)[-1]
    return {
        "engine": "atheris", "inputs": int(runs), "branches": int(found[-1][0]), "features": int(found[-1][1]),
        "kept": kept, "failures": 0,
    }  # fmt: skip


def examined(
    strategy: st.SearchStrategy[Any], test: Callable[[Any], Any], seconds: float, suppress: Collection[HealthCheck]
) -> int:
    """How many examples of `strategy` passed in that time; raises at the first that does not."""
    end, count = time.monotonic() + seconds, 0

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=suppress)
    @given(strategy)
    def run(example: Any) -> None:
        nonlocal count
        count += 1
        test(example)

    while time.monotonic() < end:
        run()
    return count
