"""Plans: the identities between their fields, what the command writes, what it refuses, the meshes that it tries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

from glm45_jax.cli import main
from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from glm45_jax.model import abstract_params, param_shardings
from glm45_jax.parallel import AXES, MeshConfig
from glm45_jax.plan.jobs import decode_job, default_mesh, for_serving, parse_mesh, train_job
from glm45_jax.plan.report import Job, Memory, Plan
from glm45_jax.plan.report import plan as make_plan
from glm45_jax.plan.search import largest_batch, meshes
from glm45_jax.plan.slices import resolved
from glm45_jax.train.config import TrainConfig
from pallas_kernels.analysis.compile import missing_compiler

needs_libtpu = pytest.mark.skipif(missing_compiler("v5p") is not None, reason="needs libtpu: the aot extra")


def identities(p: dict[str, Any]) -> None:
    """What the module's docstring promises of a plan's JSON."""
    m = p["memory"]
    assert p["compute_seconds"] == p["flops"] / p["device_flops_per_s"]
    assert p["memory_seconds"] == p["bytes"] / p["device_bytes_per_s"]
    terms = {"compute": p["compute_seconds"], "memory": p["memory_seconds"], **p["collective_seconds"]}
    for axis, speed in (p["link_bytes_per_s"] or {}).items():
        assert terms[axis] == p["collective_bytes"][axis] / speed
    assert p["roofline_seconds"] == max(terms.values()) == terms[p["bound_by"]]
    assert p["serial_seconds"] == sum(terms.values())
    assert p["mfu"] == p["model_flops"] / (p["chips"] * p["chip_flops_per_s"] * p["roofline_seconds"])
    if m["peak"] is None:
        assert p["fits"] is None
        return
    parts = ("parameters", "optimizer", "cache", "batch", "activations", "temporaries", "outputs")
    assert m["peak"] == pytest.approx(sum(m[name] for name in parts), rel=1e-12)
    assert p["fits"] == (m["peak"] <= m["limit"])


def command(tmp_path: Path, *args: str) -> dict[str, Any]:
    file = tmp_path / "plans" / "plan.json"
    assert main(["plan", *args, "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    identities(plan)
    return plan


@pytest.mark.slow
def test_training_is_counted_without_a_compiler(tmp_path: Path) -> None:
    args = ("--slice", "v5e:2x2", "--mesh", "fsdp=2,expert=2", "--seq-len", "128", "--no-compile")
    plan = command(tmp_path, "train", "--model", "tiny", *args)
    assert (plan["chips"], plan["batch"], plan["tokens"], plan["remat"]) == (4, 4, 512, "full")
    assert plan["mesh"] == {"data": 1, "pipeline": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 1}
    assert plan["collective_bytes"].keys() == {"fsdp", "expert"} and plan["memory"]["peak"] is None
    assert len(plan["notes"]) == 1  # of collectives: every kernel is counted
    assert plan["flops"] > plan["model_flops"] / 4
    total = sum(x.size for x in jax.tree.leaves(abstract_params(get_preset("tiny"))))
    assert total * 4 / 4 <= plan["memory"]["parameters"] <= total * 4  # float32, most of it on one device alone


def test_decoding_is_bound_by_memory(tmp_path: Path) -> None:
    args = ("--slice", "v6e:1x1", "--batch-size", "8", "--seq-len", "256", "--no-compile")
    plan = command(tmp_path, "decode", "--model", "tiny", *args)
    assert plan["bound_by"] == "memory"
    assert plan["tokens"] == plan["batch"] == 8
    kv = 3 * 2 * 8 * 2 * 256 * 16 * 2  # layers, k and v, rows, heads, slots, dimensions, bytes
    assert kv <= plan["memory"]["cache"] <= kv + 8 * 256 * 4 + 100


@pytest.mark.slow
def test_a_recipe_says_what_is_planned(tmp_path: Path) -> None:
    args = ("--recipe", "recipes/mini.yaml", "--slice", "v5e:1x1", "--batch-size", "2", "--no-compile")
    plan = command(tmp_path, "train", *args)
    assert (plan["model"], plan["seq_len"], plan["batch"], plan["remat"]) == ("mini", 512, 2, "none")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "decode"])
def test_a_step_is_compiled_for_four_chips(tmp_path: Path, program: str) -> None:
    mesh = {"train": "fsdp=2,expert=2", "decode": "expert=2,tensor=2,fsdp=1"}[program]
    args = ("--model", "tiny", "--slice", "v5e:2x2", "--mesh", mesh, "--seq-len", "128", "--batch-size", "4")
    plan = command(tmp_path, program, *args)
    assert plan["fits"] is True
    busy = {axis for axis, sent in plan["collective_bytes"].items() if sent > 0}
    assert busy == {"train": {"fsdp", "expert"}, "decode": {"expert", "tensor"}}[program]
    assert set(plan["link_bytes_per_s"]) == busy
    # what is compiled does what the jaxpr says, but for what devices do over again
    assert plan["flops"] >= 0.9 * plan["jaxpr_flops"]
    counted = command(tmp_path, program, *args, "--no-compile")
    assert counted["link_bytes_per_s"] == plan["link_bytes_per_s"]
    asked, sent = (sum(p["collective_bytes"].values()) for p in (counted, plan))
    assert 0.75 < asked / sent < 1.1


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5p:2x2x2", "tpu7x:2x2x1"])
def test_decoding_writes_into_the_cache_where_it_lies(name: str) -> None:
    job = decode_job(get_preset("glm-4.5-air", num_hidden_layers=3, n_routed_experts=8), "air", 32, 16384)
    found = make_plan(job, name, MeshConfig(data=1, fsdp=1, expert=2, tensor=4))
    assert found.memory.temporaries is not None and found.memory.temporaries < found.memory.cache / 2
    assert found.bytes < 2 * (found.memory.parameters + found.memory.cache)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("train", "--model", "glm-5"), "no preset is called 'glm-5'"),
        (("train", "--slice", "v5p:4"), "v5p takes 3 sizes"),
        (("train", "--mesh", "fdsp=2"), "'fdsp=2' is no axis=size"),
        (("train", "--mesh", "fsdp=two"), "size of fsdp is 'two'"),
        (("train", "--mesh", "fsdp=3,expert=2"), "does not divide 64 devices"),
        (("train", "--batch-size", "60"), "give --batch-size a multiple of 64"),
        (("decode", "--mesh", "tensor=3,expert=1,fsdp=1"), "does not divide 64 devices"),
    ],
)
def test_bad_input_is_refused(args: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *args, "--no-compile"]) == 2
    assert what in capsys.readouterr().err


# --- meshes ----------------------------------------------------------------------------------------------------------


def test_meshes_from_text() -> None:
    assert parse_mesh("fsdp=16, expert=-1") == MeshConfig(fsdp=16, expert=-1)
    assert parse_mesh("expert=4").fsdp == -1
    with pytest.raises(UserError, match="axes are data"):
        parse_mesh("")


@pytest.mark.parametrize("name", ["glm-4.5", "glm-4.5-air"])
@pytest.mark.parametrize("devices", [4, 64, 256])
def test_meshes_that_are_taken_or_tried_divide_the_model(name: str, devices: int) -> None:
    model = get_preset(name)
    config = TrainConfig(model=model, steps=10, batch_size=2 * devices, seq_len=4096)
    jobs = {"train": train_job(config, name), "decode": decode_job(model, name, 64, 4096)}
    for program, job in jobs.items():
        tried = list(meshes(job, model, devices))
        assert len(tried) >= 3
        for sizes in (resolved(default_mesh(program, model, devices), devices), *tried):
            assert math.prod(sizes.values()) == devices
            param_shardings(model if program == "train" else for_serving(model), AbstractMesh((*sizes.values(),), AXES))


def fake_plan(batch: int, peak: float) -> Plan:
    memory = Memory(1, 1, 0, 1, 1, 1, 0, peak, limit=100)
    mesh = {"data": 1, "pipeline": 1, "fsdp": 4, "expert": 2, "context": 1, "tensor": 1}
    return Plan(
        program="train", model="m", slice="s", chips=8, devices=8, mesh=mesh, remat="full", batch=batch, seq_len=1,
        memory=memory, fits=peak <= 100, flops=1, bytes=1, jaxpr_flops=1, jaxpr_bytes=1, collective_bytes={},
        link_bytes_per_s={}, chip_flops_per_s=1, device_flops_per_s=1, device_bytes_per_s=1, model_flops=1,
        active_parameters=1, tokens=1, kernels={}, collectives={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fixed", "each", "more", "largest"), [(20, 10, 0, 8), (20, 10, 9, 7), (95, 4, 0, 1), (99, 4, 0, 0)]
)
def test_the_largest_batch(fixed: float, each: float, more: float, largest: int) -> None:
    """Memory as a line, and a bit more than that at large batches."""

    def plan_of(batch: int) -> Plan:
        rows = batch // 8
        return fake_plan(batch, fixed + each * rows + (more if rows > 2 else 0))

    assert largest_batch(plan_of(8), plan_of) == 8 * largest


def test_a_program_too_large_by_no_one_knows_how_much() -> None:
    """JSON has no infinity."""
    plan = fake_plan(8, math.inf).as_json()
    assert plan["memory"]["peak"] is None and plan["fits"] is False
    assert json.loads(json.dumps(plan, allow_nan=False))["memory"]["peak"] is None


def test_no_published_plan_does_less_than_its_model_asks_for() -> None:
    """A kernel that is not counted would show as a share of the peak that cannot be reached."""
    plans = json.loads((Path(__file__).parents[2] / "docs" / "proofs" / "plans.json").read_text())
    assert len(plans) >= 60
    for name, p in plans.items():
        assert p["mfu"] <= 1, name
        assert p["program"] != "train" or p["flops"] * p["devices"] > p["model_flops"], name


def test_a_job_says_what_it_is() -> None:
    job = decode_job(get_preset("tiny"), "tiny", 8, 128)
    assert isinstance(job, Job)
    assert (job.tokens, job.batch, job.remat) == (8, 8, "none")
