"""State and batches over meshes of eight devices, made in a process of their own: what lies where changes nothing."""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from glm45_jax.parallel import AXES, MeshConfig
from glm45_jax.train import OptimizerConfig, TrainConfig, params_digest
from glm45_jax.train.digest import array_digests
from glm45_jax.train.placement import rows_here, run_mesh
from tests.convert.support import run_python

ON_EIGHT = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from glm45_jax.config import get_preset
from glm45_jax.parallel import MeshConfig, make_mesh
from glm45_jax.train import OptimizerConfig, TrainConfig, params_digest
from glm45_jax.train.digest import _compiled_sums, array_digests
from glm45_jax.train.loop import placed_state
from glm45_jax.train.placement import batch_sharding, place_batch, rows_here, run_mesh, state_shardings
from tests.support import quick_jit
out = {}

mesh = make_mesh(fsdp=4, tensor=2)
x = np.random.default_rng(0).standard_normal((8, 4, 16)).astype(np.float32)
arrays = [x, (x > 0), x.astype("bfloat16"), np.int32(7)]
specs = [P(), P("fsdp"), P(None, "fsdp", "tensor"), P("tensor", None, "fsdp"), P(None, None, ("fsdp", "tensor"))]
here, there = [], []
for array in arrays:
    for spec in specs if np.ndim(array) else [P()]:
        y = jax.device_put(array, NamedSharding(mesh, spec))
        here.append(array_digests({"a": y})["['a']"])
        there.append("".join(f"{int(s):08x}" for s in _compiled_sums(y, mesh)))
out["digests"] = {"here": here, "there": there}

config = TrainConfig(
    model=get_preset("tiny"), steps=4, batch_size=8, seq_len=32, optimizer=OptimizerConfig(),
    mesh=MeshConfig(fsdp=2, tensor=2, expert=2),
)
mesh = run_mesh(config)
state = quick_jit(placed_state, static_argnames=("config", "mesh"))(config, None, mesh)
out["params"] = params_digest(state.params)
def specs_of(tree):
    return {jax.tree_util.keystr(p): str(x.sharding.spec) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
out["step"] = str(state.step.sharding.spec)
out["params_specs"], out["opt_specs"] = specs_of(state.params), specs_of(state.opt_state)
wanted = state_shardings(config, mesh)
out["as_wanted"] = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)
out["as_wanted"] = sorted(set(map(str, jax.tree.leaves(out["as_wanted"]))))

tokens = np.arange(8 * 3).reshape(8, 3)
placed = place_batch({"tokens": tokens}, rows_here(8, mesh), 8, mesh)["tokens"]
out["batch"] = np.asarray(placed).tolist()
out["shard"] = list(placed.addressable_shards[0].data.shape)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_eight():
    return json.loads(run_python(ON_EIGHT))


@pytest.mark.slow
def test_a_digest_does_not_depend_on_the_mesh(on_eight):
    x = np.random.default_rng(0).standard_normal((8, 4, 16)).astype(np.float32)
    arrays = [x] * 5 + [x > 0] * 5 + [x.astype("bfloat16")] * 5 + [np.int32(7)]
    expected = [array_digests({"a": array})["['a']"] for array in arrays]
    assert on_eight["digests"] == {"here": expected, "there": expected}, "by the host, and by programs on the devices"
    assert len(set(expected)) == 4


@pytest.mark.slow
def test_fresh_parameters_do_not_depend_on_the_mesh(on_eight, quick_programs):
    config = TrainConfig(model=get_preset("tiny"), steps=4, batch_size=8, seq_len=32, optimizer=OptimizerConfig())
    assert params_digest(quick_programs[1](config, None, None).params) == on_eight["params"]


def test_what_belongs_to_a_parameter_lies_where_it_lies(on_eight):
    assert on_eight["as_wanted"] == ["True"]
    params = on_eight["params_specs"]
    own = {
        path: spec
        for path, spec in on_eight["opt_specs"].items()
        if (not path.endswith(".count") and "momentum" in path) or ".mu" in path or ".nu" in path
    }
    for path, spec in own.items():
        (param,) = (name for name in params if path.endswith(name))
        assert spec == params[param], path
    matrices = [spec for path, spec in own.items() if "experts" in path]
    assert matrices and all("'expert'" in spec and "'tensor'" in spec for spec in matrices)
    assert on_eight["step"] == str(PartitionSpec())


def test_a_batch_over_the_mesh(on_eight):
    assert on_eight["batch"] == np.arange(24).reshape(8, 3).tolist()
    assert on_eight["shard"] == [2, 3], "fsdp x expert = 4 have sequences of their own"


def test_rows_of_a_process_are_those_of_its_devices(monkeypatch):
    """Two devices to a process: with rows of their own, or with the same rows in both processes."""

    def rows(*pieces):
        indices = {i: (slice(*piece), slice(None)) for i, piece in enumerate(pieces)}
        sharding = types.SimpleNamespace(addressable_devices_indices_map=lambda _: indices)
        monkeypatch.setattr("glm45_jax.train.placement.batch_sharding", lambda _: sharding)
        return rows_here(8, None)

    assert rows((0, 2), (4, 6)) == [0, 1, 4, 5]
    assert rows((4, 8), (0, 4)) == list(range(8))
    assert rows((2, 4), (2, 4)) == [2, 3]


def test_a_mesh_that_does_not_divide_the_batch_is_refused(monkeypatch):
    config = TrainConfig(model=get_preset("tiny"), steps=4, batch_size=6, accumulation=2, seq_len=32)
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1, 1, 1), AXES)
    monkeypatch.setattr(MeshConfig, "make", lambda self: mesh)
    with pytest.raises(UserError, match=r"6 / 2 = 3 sequences.*2 devices \(fsdp=2\); make it a multiple of 2"):
        run_mesh(config)


def test_a_mesh_that_does_not_divide_the_model_is_refused(monkeypatch):
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 1, 1, 64), AXES)
    monkeypatch.setattr(MeshConfig, "make", lambda self: mesh)
    with pytest.raises(UserError, match="cannot be sharded over mesh"):
        run_mesh(TrainConfig(model=get_preset("tiny"), steps=4, seq_len=32))


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    config = TrainConfig(model=get_preset("tiny"), steps=4, seq_len=32, mesh=MeshConfig(fsdp=3))
    with pytest.raises(UserError, match=f"does not divide {jax.device_count()} devices"):
        run_mesh(config)
