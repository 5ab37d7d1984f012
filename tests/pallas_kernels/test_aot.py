"""The kernels compiled for chips that are not there, at the true shapes of GLM-4.5: one shape per op and direction.

Needs the `aot` extra (libtpu; jax-cuda13-plugin and ptxas for the H100). Without it the tests are skipped, but where
CI=true that is a failure. The full matrix is scripts/prove_kernels.py.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.analysis.cases import Case, Source, shapes_of
from pallas_kernels.analysis.compile import compile_for, missing_compiler, prepare_environment, program_hash
from pallas_kernels.analysis.schedule import Worker
from pallas_kernels.chip import CHIPS
from tests.pallas_kernels.aot_cases import ONE_SHAPE, gather

prepare_environment()  # before anything loads libtpu

CHIPS_OF = {"tpu": ("v5e", "v5p", "v6e", "tpu7x"), "gpu": ("h100",)}
CASES = [case for _, case in gather(ONE_SHAPE)]
COMPILED = [pytest.param(case, chip, id=f"{case.name}-{chip}") for case in CASES for chip in CHIPS_OF[case.platform]]


def need_compiler(chip: str) -> None:
    """Skips without the chip's compiler; in continuous integration that is a failure."""
    if why := missing_compiler(chip):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)


def double(x: jax.Array) -> jax.Array:
    return x * 2


@pytest.mark.slow
@pytest.mark.parametrize("chip", [c for chips in CHIPS_OF.values() for c in chips])
def test_something_compiles_for_every_chip(chip: str) -> None:
    need_compiler(chip)
    compiled = compile_for(chip, double, jax.ShapeDtypeStruct((8, 128), jnp.float32))
    assert compiled.argument_bytes >= 8 * 128 * 4 and compiled.output_bytes >= 8 * 128 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("case", "chip"), COMPILED)
def test_compiles(case: Case, chip: str) -> None:
    """It fits: on-chip memory is checked by the compiler, main memory here."""
    need_compiler(chip)
    compiled = compile_for(chip, case.function, *case.arguments)
    asked = compiled.argument_bytes + compiled.output_bytes + compiled.temporary_bytes
    assert asked < (16 << 30 if chip == "v5e" else 32 << 30)


@pytest.mark.slow
def test_exported_for_a_tpu_the_ops_are_tpu_kernels() -> None:
    """Left to choose on a machine without TPUs, every op takes its kernel when the program is lowered for a TPU."""
    pytest.importorskip("glm45_jax.plan.kernels")
    from glm45_jax.plan.kernels import kernel_cases

    cases = kernel_cases()
    exported = {op for op in pallas_kernels.__all__ if hasattr(pallas_kernels, op)}
    assert {case.op for case in cases} >= exported & TPU_OPS
    for case in cases:
        args = shapes_of(case.arguments)
        text = jax.export.export(jax.jit(case.function), platforms=["tpu"])(*args).mlir_module()
        assert "tpu_custom_call" in text, case.name
        here = jax.jit(case.function).lower(*args).as_text()
        assert "tpu_custom_call" not in here, case.name


def test_a_programs_hash_is_of_what_it_does() -> None:
    """Not of where it stands; known to differ where the kernel does."""
    from jax.experimental import pallas as pl

    def kernel_of(source: str):
        scope: dict = {"jnp": jnp}
        exec(source, scope)
        call = pl.pallas_call(scope["kernel"], out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))
        return program_hash("v5p", call, jax.ShapeDtypeStruct((8, 128), jnp.float32))

    source = "def kernel(x, o):\n    o[...] = jnp.exp(x[...])\n"
    assert kernel_of(source) == kernel_of("\n\n" + source) != kernel_of(source.replace("exp", "log"))


@pytest.mark.slow
def test_slots_of_a_dense_product(tmp_path) -> None:
    """The compiler's own matrix product fills nearly every slot; a case that fails is an answer, not an exception."""
    need_compiler("v5p")
    file = tmp_path / "some.py"
    file.write_text(
        "import jax, jax.numpy as jnp\nx = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)\n"
        "def broken(x):\n    raise ValueError('as meant')\n"
        "def cases():\n    return [('product', lambda a, b: a @ b, (x, x)), ('broken', broken, (x,))]\n"
    )
    with Worker() as worker:
        assert "as meant" in worker.analyse(Source(str(file)), "broken", "v5p")["error"]
        answer = worker.analyse(Source(str(file)), "product", "v5p")
    (schedule,) = answer["schedules"]
    assert answer["output_bytes"] == 2 * 1024 * 1024
    assert 0.9 < schedule["matrix_slots"] <= 1 and schedule["bundles"] > 1024


# --- the table of chips ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chip", [c for c in CHIPS if CHIPS[c].platform == "tpu"])
def test_the_compiler_knows_the_chip_by_the_name_that_we_do(chip: str) -> None:
    from pallas_kernels.analysis.compile import described_mesh
    from pallas_kernels.chip import chip_of_kind

    need_compiler(chip)
    device = described_mesh(chip).devices.flat[0]
    assert chip_of_kind(device.device_kind) == CHIPS[chip]
