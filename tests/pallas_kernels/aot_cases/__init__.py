"""What is compiled for chips that are not there: a module per op, with one shape per direction, and the full matrix.

A module has `cases()`, compiled for TPUs, and, where the op has a kernel for GPUs, `gpu_cases()`; a full matrix, for
the script that proves it (scripts/prove_kernels.py), is `matrix()` and `gpu_matrix()`. Each gives a list of
`pallas_kernels.analysis.cases.Case`s, or of tuples in the order of its fields: (name, function, arguments, least_bytes,
flops), of which the last two may be left out. `case.function(*case.arguments)` is traced with a mesh of the chip in
force.

Arguments are `jax.ShapeDtypeStruct`s; what steers a kernel (group sizes, indices, lengths) is given as a NumPy array,
so that the kernel's bytes can be counted. Names are "op/direction, shape".
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Iterator

from pallas_kernels.analysis.cases import Case, Source

# which function of a module makes cases for which platform
ONE_SHAPE = {"cases": "tpu", "gpu_cases": "gpu"}
EVERY_SHAPE = {"cases": "tpu", "matrix": "tpu", "gpu_cases": "gpu", "gpu_matrix": "gpu"}


def gather(functions: dict[str, str]) -> Iterator[tuple[Source, Case]]:
    """Every case that these functions of the modules here make, each with where it comes from."""
    for module in pkgutil.iter_modules(__path__):
        where = f"{__name__}.{module.name}"
        seen: set[str] = set()
        for function, platform in functions.items():
            source = Source(where, function)
            for case in source.cases():
                if case.name not in seen:  # a matrix may hold the cases too
                    seen.add(case.name)
                    yield source, dataclasses.replace(case, platform=platform)
