"""Muon divided over a mesh: the same directions, and no device repeats another's work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from glm45_jax.config import get_preset
from glm45_jax.model import abstract_params
from glm45_jax.train.muon import plan_jobs, scale_by_muon
from glm45_jax.train.optimizer import OptimizerConfig, make_optimizer
from pallas_kernels.analysis.compile import described_mesh, missing_compiler
from tests.support import QUICK_FLAGS
from tests.train.muon_on_a_mesh import MESHES, SHAPES, specs_on

FLAGS = f"--xla_force_host_platform_device_count=8 {QUICK_FLAGS}"


@pytest.fixture(scope="module")
def on_eight_devices():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    command = [sys.executable, "-m", "tests.train.muon_on_a_mesh"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_directions_are_those_of_one_device(on_eight_devices):
    """Experts, attention, router, head and a lone projection; five devices, three axes, rows shared by two axes."""
    for differences in (*on_eight_devices["agrees"].values(), *(on_eight_devices[n] for n in ("in_parts", "explicit"))):
        assert differences.keys() == SHAPES.keys() and max(differences.values()) < 1e-5, differences
    assert max(on_eight_devices["without_nesterov"].values()) < 1e-5
    # bfloat16: the same roundings but for the order of sums
    assert max(on_eight_devices["bfloat16"].values()) < 0.03


@pytest.mark.slow
def test_the_optimizer_divides_the_work_by_the_models_shardings(on_eight_devices):
    found = on_eight_devices["whole_optimizer"]
    assert found["worst"] < 1e-6 and found["exchanges"] >= 4


def products(jaxpr, times=1):
    """FLOPs of the matrix products in a jaxpr, those in a loop as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            length = int(np.prod([eqn.invars[0].aval.shape[d] for d in contract]))
            total += 2 * times * int(np.prod(eqn.outvars[0].aval.shape)) * length
        more = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += products(inner, more) if hasattr(inner, "eqns") else 0
    return total


def traced_flops(sizes, shapes, specs):
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    shardings = lambda mesh: {name: NamedSharding(mesh, spec) for name, spec in specs.items()}  # noqa: E731
    rule = scale_by_muon(ns_dtype="float32", shardings=shardings)
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    with jax.sharding.use_abstract_mesh(mesh):
        return products(jax.make_jaxpr(rule.update)(tree, jax.eval_shape(rule.init, tree)).jaxpr)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_computes_what_the_plan_says(mesh):
    """The products in the traced program, against the plan's and against all of the work undivided."""
    sizes = MESHES[mesh]
    names, specs = sorted(SHAPES), specs_on(sizes)
    jobs = plan_jobs([SHAPES[name] for name in names], [specs[name] for name in names], sizes)
    traced = traced_flops(sizes, SHAPES, specs)
    assert traced == pytest.approx(sum(job.flops for job in jobs), rel=1e-3)
    whole = sum(job.flops for job in plan_jobs([SHAPES[name] for name in names], [P()] * len(names), {}))
    assert traced < 2 * whole / int(np.prod(list(sizes.values())))  # so few matrices leave some devices idle


def jobs_of(preset, **sizes):
    """The jobs of a whole model, its embeddings left out, by rules that cut the width over many axes."""
    config = get_preset(preset)
    stacks = {
        "gate": (None, "expert", None, "fsdp"),
        "up": (None, "expert", None, "fsdp"),
        "down": (None, "expert", "fsdp"),
    }
    shapes, specs = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if len(leaf.shape) < 2 or name.endswith(("embed.weight", "scale", "bias")):
            continue
        width = tuple(n for n in ("fsdp", "expert") if n in sizes)
        spec = [width if size == config.hidden_size else None for size in leaf.shape]
        shapes.append(leaf.shape)
        specs.append(P(*stacks[name.split(".")[-1]]) if ".experts." in name else P(*spec))
    return plan_jobs(shapes, specs, sizes), plan_jobs(shapes, specs, {})


@pytest.mark.parametrize(
    ("sizes", "most"), [({"fsdp": 8, "expert": 32}, 1.35), ({"data": 4, "fsdp": 4, "expert": 40}, 1.6)]
)
def test_the_flagships_work_is_shared_evenly(sizes, most):
    shared, alone = jobs_of("glm-4.5", **sizes)
    devices, whole = int(np.prod(list(sizes.values()))), sum(job.flops for job in alone)
    assert sum(job.flops for job in shared) < most * whole / devices
    heads = [job for job in shared if 151552 in job.shape]
    assert heads and all(job.by_rows for job in heads), "a head on one device would keep the others waiting"
    assert (
        max(3 * 4 * job.at_once // job.devices * job.shape[0] * job.shape[1] for job in shared if not job.by_rows)
        < 2**30
    )
    sent = [job.bytes_sent(sizes) for job in shared]
    assert all(s["all_to_all"] > 0 for s in sent)
    assert all(("all_gather" in s) == ("data" in sizes) for s in sent)
    assert all(("all_reduce" in s) == job.by_rows for s, job in zip(sent, shared))


def test_few_matrices_of_one_shape_are_done_together():
    """Three layers of one kind and one of another, one of them lying the other way round."""
    (job,) = plan_jobs(
        [(3, 48, 40), (1, 48, 40), (3, 40, 48)], [P(None, None, "x"), P(None, None, "x"), P(None, "x")], {"x": 8}
    )
    assert (job.leaves, job.turned, job.held, job.at_once) == ((0, 1, 2), (True, True, False), 7, 8)
    apart = plan_jobs([(3, 48, 40), (3, 48, 40)], [P(None, None, "x"), P(None, "x")], {"x": 8})
    assert len(apart) == 2, "cut otherwise"


def test_states_in_chosen_dtypes():
    config = get_preset("tiny")
    rules = OptimizerConfig(momentum_dtype="bfloat16", adam_dtype="bfloat16")
    optimizer, params = make_optimizer(config, rules, 10), abstract_params(config)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    kinds = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}  # noqa: E731
    assert (kinds(state), kinds(after), kinds(updates)) == ({"bfloat16"}, {"bfloat16"}, {"float32"})


def test_inside_shard_map_it_is_refused():
    rule = scale_by_muon(shardings=lambda mesh: {"w": NamedSharding(mesh, P())})
    tree = {"w": jax.ShapeDtypeStruct((2, 8, 8), jnp.float32)}
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="outside of"):
        jax.make_jaxpr(jax.shard_map(rule.update, in_specs=P(), out_specs=P(), check_vma=False))(
            tree, jax.eval_shape(rule.init, tree)
        )


@pytest.mark.slow
def test_compiles_for_tpus():
    if why := missing_compiler("v5p"):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)
    mesh = jax.sharding.Mesh(described_mesh("v5p", 4).devices.reshape(2, 2), ("fsdp", "expert"))
    shapes = {"experts": (4, 8, 256, 512), "q": (4, 512, 512), "head": (4096, 512)}
    specs = {
        "experts": P(None, "expert", None, "fsdp"),
        "q": P(None, None, ("fsdp", "expert")),
        "head": P(None, ("fsdp", "expert")),
    }
    rule = scale_by_muon(shardings=lambda mesh: {name: NamedSharding(mesh, specs[name]) for name in specs})
    place = lambda name: jax.ShapeDtypeStruct(shapes[name], jnp.float32, sharding=NamedSharding(mesh, specs[name]))  # noqa: E731
    tree = {name: place(name) for name in shapes}
    state = jax.eval_shape(rule.init, tree)._replace(momentum=tree)
    with jax.set_mesh(mesh):
        compiled = jax.jit(rule.update).trace(tree, state).lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert "all-to-all" in text and "bf16" in text
