"""Runs the tests on the CPU, leaves live comparisons out where they cannot run, loads each oracle once."""

from __future__ import annotations

import collections
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the tolerances are those of float32 on a CPU
if os.environ["JAX_PLATFORMS"] != "cpu":  # asked for another device: what is compared with is exact there too
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax
import pytest

from tests.support import GOLDEN, Oracle, load_oracle


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _mark_all_but_a_few(items)
    _leave_live_comparisons_out(items)


def _mark_all_but_a_few(items: list[pytest.Item]) -> None:
    """Of tests marked `few(n)` all cases are slow but n, the last of each nth part."""
    cases: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            cases[item.nodeid.split("[")[0]].append(item)
    for several in cases.values():
        marker = several[0].get_closest_marker("few")
        n = marker.args[0] if marker else 0
        kept = {(i + 1) * len(several) // n - 1 for i in range(n)}
        for i, item in enumerate(several):
            if i not in kept:
                item.add_marker(pytest.mark.slow)


def _leave_live_comparisons_out(items: list[pytest.Item]) -> None:
    """Without transformers; asked for by PARITY=1 they must be able to run."""
    wanted = os.environ.get("PARITY")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if wanted == "1" and missing:
        raise pytest.UsageError(f"PARITY=1, but {' and '.join(missing)} cannot be imported: pip install -e '.[parity]'")
    if missing or wanted == "0":
        skip = pytest.mark.skip(reason="compares with live transformers: PARITY=1 bash scripts/test.sh")
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file() -> Iterator[None]:
    """Each compiled program has a dozen memory maps, of which Linux gives a process 65,530: then compiling crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def oracles() -> Callable[[Path], Oracle]:
    """Loads the oracle of a folder, once per run."""
    loaded: dict[Path, Oracle] = {}

    def get(path: Path) -> Oracle:
        if path not in loaded:
            loaded[path] = load_oracle(path)
        return loaded[path]

    return get


@pytest.fixture(scope="session")
def golden() -> Path:
    if not GOLDEN.is_dir():
        pytest.skip("the golden data, ../shared/golden, is not on this machine")
    return GOLDEN
