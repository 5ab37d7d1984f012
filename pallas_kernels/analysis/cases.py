"""What is compiled and counted: functions with the shapes of their arguments."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call to look at.

    Attributes:
      name: op and what is done, as in "grouped_matmul/forward"; reports can be cut down to an op.
      function: is called with a mesh of the described chip in force.
      arguments: shapes; what steers a kernel (group sizes, indices, lengths) as NumPy arrays, so that bytes can be
        counted. Compiled, those too are arguments.
      least_bytes: the least that any implementation must move: every operand read once, every result written once.
      flops: of the products that the result needs.
      platform: "tpu" or "gpu", whose chips the case is for.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    least_bytes: float | None = None
    flops: float | None = None
    platform: str = "tpu"

    def __post_init__(self) -> None:
        for name in ("least_bytes", "flops"):  # computed with NumPy, as likely as not
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))

    @property
    def op(self) -> str:
        return self.name.split("/")[0]


def as_case(case: Case | Sequence[Any]) -> Case:
    """A case from a tuple (name, function, arguments, ...) in the order of the fields."""
    return case if isinstance(case, Case) else Case(*case)


def shapes_of(arguments: Any) -> Any:
    """Shapes and dtypes of a tree of arrays and shapes."""

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        x = x if hasattr(x, "dtype") else np.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))

    return jax.tree.map(shape, arguments)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where cases come from, so that another process can make them again.

    Attributes:
      where: a Python file, or a module's dotted name.
      function: what makes them, called with `options`; a module without it has none.
    """

    where: str
    function: str = "cases"
    options: tuple[tuple[str, Any], ...] = ()

    def cases(self) -> list[Case]:
        make: Callable[..., Iterable[Any]] | None = getattr(_module(self.where), self.function, None)
        return [as_case(case) for case in make(**dict(self.options))] if make is not None else []


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(f"cases_of_{Path(where).stem}", where)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
