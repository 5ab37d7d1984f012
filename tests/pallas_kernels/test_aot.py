"""The kernels compiled for chips that are not there, at the true shapes of GLM-4.5: one shape per op and direction.

Needs the `aot` extra (libtpu; jax-cuda13-plugin and ptxas for the H100). Without it the tests are skipped, but where
CI=true that is a failure. The full matrix is scripts/prove_kernels.py.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import glm45_jax as glm
import pallas_kernels
from glm45_jax.config import get_preset
from glm45_jax.plan.kernels import kernel_cases
from pallas_kernels import flash_attention, fused_moe, grouped_matmul, grouped_swiglu, linear_cross_entropy
from pallas_kernels.analysis.cases import Case, Source, shapes_of
from pallas_kernels.analysis.compile import (
    compile_for,
    described_mesh,
    missing_compiler,
    prepare_environment,
    program_hash,
)
from pallas_kernels.analysis.schedule import Worker
from pallas_kernels.chip import CHIPS
from tests.pallas_kernels.aot_cases import EVERY_SHAPE, ONE_SHAPE, gather
from tests.support import ROOT

prepare_environment()  # before anything loads libtpu

CHIPS_OF = {"tpu": ("v5e", "v5p", "v6e", "tpu7x"), "gpu": ("h100",)}
CASES = [case for _, case in gather(ONE_SHAPE)]


def compiled() -> list[Any]:
    """Each case on one chip, the chips of its platform by turns: a program that the proof has is known to compile."""
    turns = {platform: itertools.cycle(chips) for platform, chips in CHIPS_OF.items()}
    return [pytest.param(case, chip := next(turns[case.platform]), id=f"{case.name}-{chip}") for case in CASES]


def need_compiler(chip: str) -> None:
    """Skips without the chip's compiler; in continuous integration that is a failure."""
    if why := missing_compiler(chip):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("false", pytest.skip.Exception)])
def test_without_a_compiler_only_continuous_integration_fails(ci: str, outcome, monkeypatch) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setitem(globals(), "missing_compiler", lambda chip: "no compiler here")
    with pytest.raises(outcome, match="no compiler here"):
        need_compiler("v5p")


def double(x: jax.Array) -> jax.Array:
    return x * 2


@pytest.mark.slow
@pytest.mark.parametrize("chip", [c for chips in CHIPS_OF.values() for c in chips])
def test_something_compiles_for_every_chip(chip: str) -> None:
    need_compiler(chip)
    compiled = compile_for(chip, double, jax.ShapeDtypeStruct((8, 128), jnp.float32))
    assert compiled.argument_bytes >= 8 * 128 * 4 and compiled.output_bytes >= 8 * 128 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("case", "chip"), compiled())
def test_compiles(case: Case, chip: str) -> None:
    """It fits: on-chip memory is checked by the compiler, main memory here."""
    need_compiler(chip)
    compiled = compile_for(chip, case.function, *case.arguments)
    asked = compiled.argument_bytes + compiled.output_bytes + compiled.temporary_bytes
    assert asked < (16 << 30 if chip == "v5e" else 32 << 30)


def _matmul(x, sizes, gate, up, down):
    """Rows' gradients of another dtype than the matrices come back to it."""
    return grouped_matmul(x, gate, sizes, preferred_element_type=jnp.float32, implementation="tpu")


def _experts(x, sizes, gate, up, down):
    return grouped_matmul(grouped_swiglu(x, gate, up, sizes, implementation="tpu"), down, sizes, implementation="tpu")


def _few_tokens(x, sizes, gate, up, down):
    indices = jnp.stack([jnp.arange(8), jnp.arange(8) + 1], 1) % gate.shape[0]
    return fused_moe(x[:8], gate, up, down, indices, jnp.ones((8, 2)) / 2, implementation="tpu")


def _attention(x, sizes, gate, up, down):
    q = x[:, None, None, :128].repeat(2, 2).swapaxes(0, 1)
    return flash_attention(q, q[:, :, :1], q[:, :, :1], implementation="tpu")


def _loss(x, sizes, gate, up, down):
    return linear_cross_entropy(x, gate[0], jnp.arange(len(x)), implementation="tpu")


TRANSFORMED = {
    "grouped_matmul": _matmul, "experts": _experts, "fused_moe": _few_tokens, "flash_attention": _attention,
    "linear_cross_entropy": _loss,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("width", [24, 256, 200])
@pytest.mark.parametrize("op", TRANSFORMED)
def test_compiles_inside_a_checked_shard_map_under_scan_remat_and_vmap(op: str, width: int) -> None:
    """With gradients, over four chips that share the weights; experts of any width. Interpreters can't run this."""
    need_compiler("v5p")
    mesh = described_mesh("v5p", 4)
    specs = (P("x"), P("x"), P(), P(), P())

    def loss(x, sizes, *weights):
        one = jax.checkpoint(lambda x, sizes: TRANSFORMED[op](x, sizes, *weights).astype(jnp.float32).sum())
        by_scan = jax.lax.scan(lambda total, args: (total + one(*args), None), jnp.float32(0) * x.sum(), (x, sizes))[0]
        return (by_scan + jax.vmap(one)(x, sizes).sum())[None]

    def gradients(x, sizes, *weights):
        mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=True)
        return jax.grad(lambda x, *weights: mapped(x, sizes, *weights).sum(), (0, 1, 2, 3))(x, *weights)

    shapes = [(8, 72, 256), (8, 4), (4, 256, width), (4, 256, width), (4, width, 256)]
    args = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if shape == (8, 4) else jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs)
    ]
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients).trace(*args).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
    lowered.compile()


EXPORTED = [pytest.param(case, id=case.name) for case in kernel_cases(decoded=(8,), sequence=1024, tokens=1024)]


def test_every_op_is_exported() -> None:
    ops = {name.removeprefix("weighted_") for name in pallas_kernels.__all__}
    assert {case.op for (case,) in (param.values for param in EXPORTED)} == ops


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED)
def test_exported_for_a_tpu_it_is_a_tpu_kernel(case: Case) -> None:
    """Left to choose on a machine without TPUs, an op takes its kernel where the program is lowered for a TPU."""
    shapes = shapes_of(case.arguments)
    text = jax.export.export(jax.jit(case.function), platforms=["tpu"])(*shapes).mlir_module()
    assert "tpu_custom_call" in text
    assert "tpu_custom_call" not in jax.jit(case.function).lower(*shapes).as_text()


def model_step(name: str):
    """A program of the whole model, at the least widths that the kernels take, and the shapes of its arguments."""
    config = get_preset(
        "tiny", hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=128, intermediate_size=256,
        moe_intermediate_size=128, vocab_size=512, dtype="bfloat16", param_dtype="bfloat16", remat="full",
    )  # fmt: skip
    params, tokens = glm.abstract_params(config), jax.ShapeDtypeStruct((2, 512), jnp.int32)  # more than "few tokens"
    cache = jax.eval_shape(lambda: glm.init_cache(config, 2, 512))
    if name == "train":
        loss = lambda params, tokens: glm.loss_fn(params, config, {"tokens": tokens})[0]  # noqa: E731
        return jax.grad(loss), (params, tokens)
    if name == "prefill":
        return lambda params, cache, tokens: glm.prefill(params, config, cache, tokens), (params, cache, tokens)
    one = jax.ShapeDtypeStruct((2,), jnp.int32)
    return lambda params, cache, tokens: glm.decode_step(params, config, cache, tokens), (params, cache, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("train", {"flash_attention", "grouped_matmul", "grouped_swiglu", "linear_cross_entropy"}),
        ("prefill", {"flash_attention", "grouped_matmul", "grouped_swiglu"}),
        ("decode", {"fused_moe"}),
    ],
    ids=["train", "prefill", "decode"],
)
def test_exported_for_a_tpu_the_model_runs_on_kernels(name: str, ops: set[str]) -> None:
    step, shapes = model_step(name)
    checks = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
    text = jax.export.export(jax.jit(step), platforms=["tpu"], disabled_checks=checks)(*shapes).mlir_module()
    kernels = set(re.findall(r'kernel_name = "(\w+)"', text))
    assert all(any(kernel.startswith(op) for kernel in kernels) for op in ops), kernels


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


# --- the full matrix --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_proof_is_of_the_cases_there_are() -> None:
    """Every case on every chip has its row, and no row is of a case that is gone; all of them compile."""
    rows = proof()
    expected = {f"{case.name} @ {chip}" for _, case in gather(EVERY_SHAPE) for chip in CHIPS_OF[case.platform]}
    assert not (missing := sorted(expected - set(rows))), f"run scripts/prove_kernels.py; without rows: {missing}"
    assert not (gone := sorted(set(rows) - expected)), f"run scripts/prove_kernels.py; rows of no case: {gone}"
    assert not (broken := sorted(name for name, row in rows.items() if "error" in row)), broken


@pytest.mark.slow
def test_no_row_of_the_proof_is_stale() -> None:
    """The programs as they are lowered now; of the matrix those that the tests compile, on one chip for each platform.

    `scripts/prove_kernels.py --check` does all of them.
    """
    rows = proof()
    stale = []
    for case in CASES:
        chip = CHIPS_OF[case.platform][-1]
        name = f"{case.name} @ {chip}"
        if rows.get(name, {}).get("program") != program_hash(chip, case.function, *case.arguments):
            stale.append(name)
    assert not stale, f"run scripts/prove_kernels.py: their programs have changed: {stale}"


@pytest.mark.slow
def test_the_page_shows_the_proof() -> None:
    from prove_kernels import PAGE, with_figures

    rows = proof()
    assert PAGE.read_text() == with_figures(PAGE.read_text(), rows), "run scripts/prove_kernels.py"


def proof() -> dict:
    """The rows of this version of JAX."""
    version = f"jax {jax.__version__}"
    proofs = json.loads((ROOT / "docs" / "proofs" / "kernels.json").read_text())
    if version not in proofs:
        pytest.skip(f"the kernels are proven with {', '.join(proofs)}, not with {version}")
    return proofs[version]


# --- the table of chips ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chip", [c for c in CHIPS if CHIPS[c].platform == "tpu"])
def test_the_compiler_knows_the_chip_by_the_name_that_we_do(chip: str) -> None:
    from pallas_kernels.chip import chip_of_kind

    need_compiler(chip)
    device = described_mesh(chip).devices.flat[0]
    assert chip_of_kind(device.device_kind) == CHIPS[chip]
