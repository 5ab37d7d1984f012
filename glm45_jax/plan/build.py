"""Compiles a program for a slice that is not there, and what its compiler said."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from glm45_jax.errors import UserError
from glm45_jax.plan.hlo import Program as Hlo
from glm45_jax.plan.hlo import parse
from glm45_jax.plan.programs import Program
from glm45_jax.plan.slices import Slice
from pallas_kernels.analysis.compile import cuda_folder

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_TOO_LARGE = re.compile(r"Attempting to allocate ([\d.]+)([KMGT]?)|allocating (\d+)() bytes", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Built:
    """Bytes are one device's.

    Attributes:
      needed_bytes: where it does not fit, what the compiler said that it needs.
      hlo: the compiled program; None where it does not fit.
    """

    seconds: float
    argument_bytes: float = 0
    output_bytes: float = 0
    alias_bytes: float = 0
    temporary_bytes: float = 0
    code_bytes: float = 0
    needed_bytes: float | None = None
    hlo: Hlo | None = None


def build(program: Program, where: Slice, mesh: Mesh, traced: Any = None) -> Built:
    """Compiles. A program that does not fit the memory is an answer, not an error.

    Args:
      traced: of `program.trace()` under this mesh, if at hand.
    """
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = program.trace() if traced is None else traced
        lowered = traced.lower(lowering_platforms=(where.platform,))
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile(compiler_options=_options(where, folder))
        except jax.errors.JaxRuntimeError as e:
            needed = _needed(str(e))
            if needed is None:
                raise UserError(f"{where.name}: the compiler refuses this program: {str(e)[:800]}") from e
            return Built(time.perf_counter() - start, needed_bytes=needed)
        hlo = _dumped(Path(folder)) or parse(compiled.as_text())
    m: Any = compiled.memory_analysis()
    return Built(
        time.perf_counter() - start,
        m.argument_size_in_bytes,
        m.output_size_in_bytes,
        m.alias_size_in_bytes,
        m.temp_size_in_bytes,
        m.generated_code_size_in_bytes,
        hlo=hlo,
    )


def _options(where: Slice, folder: str) -> dict[str, Any]:
    # the compiler writes its program into the folder: `as_text` fails where a TPU's SparseCore runs collectives
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    gpu = {"xla_gpu_cuda_data_dir": cuda_folder(), "xla_gpu_autotune_level": "0"} if where.platform == "cuda" else {}
    return {**dump, **gpu}


def _dumped(folder: Path) -> Hlo | None:
    """The largest program that the compiler wrote as it will run."""
    files = [*folder.rglob("*after_optimizations.txt")]
    return parse(max(files, key=lambda f: f.stat().st_size).read_text()) if files else None


def _needed(message: str) -> float | None:
    """Bytes of a device's memory that a program which does not fit would need; None for another error."""
    found = _USED.search(message)
    if found:
        return float(found[1]) * _UNITS[found[2].upper()]
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    found = _TOO_LARGE.search(message)
    return float(found[1] or found[3]) * _UNITS[(found[2] or "").upper()] if found else float("inf")
