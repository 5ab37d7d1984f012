"""Orbax itself restores our directory: v0 and v1, asked for nothing, for host arrays, for any sharding."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest

from glm45_jax import convert
from glm45_jax.convert import store
from glm45_jax.model import abstract_params
from tests.convert.support import NARROW, arrays, flat, make, run_python, same

warnings.filterwarnings("ignore")
ocp = pytest.importorskip("orbax.checkpoint")
v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax")
    convert.from_hf(make(folder / "hf"), folder / "own")
    return folder / "own", convert.load_checkpoint(folder / "own")[1]


def abstract(params, sharded: bool = True):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if sharded else None
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), params)


WAYS = {
    "v0 handler": lambda path, tree: ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    ).restore(path),
    "v0 checkpointer": lambda path, tree: ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=True).restore(path),
    "v0 defaults": lambda path, tree: ocp.PyTreeCheckpointer().restore(path),
    "v0 standard": lambda path, tree: ocp.StandardCheckpointer().restore(path),
    "v0 standard, abstract": lambda path, tree: ocp.StandardCheckpointer().restore(path, abstract(tree)),
    "v0 restore args": lambda path, tree: ocp.PyTreeCheckpointer().restore(
        path, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract(tree)), item=abstract(tree)
    ),
    "v1": lambda path, tree: v1.load(path),
    "v1 load_pytree": lambda path, tree: v1.load_pytree(path),
    "v1, abstract": lambda path, tree: v1.load(path, abstract(tree)),
    "v1, abstract without shardings": lambda path, tree: v1.load(path, abstract(tree, sharded=False)),
    "v1, the directory above": lambda path, tree: v1.load(path.parent),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_orbax_restores(way, own) -> None:
    path, params = own
    restored = way(path / "params", params)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(same, restored, params)))


def test_the_tree_is_ours(own) -> None:
    tree = ocp.PyTreeCheckpointer().metadata(own[0] / "params").item_metadata.tree
    config, _ = convert.load_checkpoint(own[0])
    expected = flat(abstract_params(config))
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in flat(tree).items()}
    assert found == {path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()}


def test_chunks_are_experts_and_plain(own) -> None:
    """Read by nothing but their place: one expert, uncompressed, in C order; zeros too."""
    path, params = own
    up = params["moe_layers"]["moe"]["experts"]["up"]
    chunk = path / "params" / "moe_layers.moe.experts.up" / "c.1.3.0.0"
    assert chunk.read_bytes() == np.asarray(up[1, 3]).tobytes()


@pytest.mark.parametrize("vocab", [61, 64])
def test_tensorstore_reads_every_array(vocab, tmp_path, monkeypatch) -> None:
    """An embedding in chunks of rows too, of which the last one reaches beyond the end."""
    import tensorstore as ts

    monkeypatch.setattr(store, "_SMALL", 0)
    monkeypatch.setattr(store, "_TALL", 1000)
    monkeypatch.setattr(store, "_ROWS", 8 * 32 * 2)
    convert.from_hf(make(tmp_path / "hf", NARROW.replace(vocab_size=vocab)), tmp_path / "own")
    assert len(list((tmp_path / "own" / "params" / "embed.weight").glob("c.*"))) == 8
    convert.verify(tmp_path / "own")
    _, params = convert.load_checkpoint(tmp_path / "own")
    restored = flat(ocp.PyTreeCheckpointer().restore(tmp_path / "own" / "params"))
    for path, array in flat(params).items():
        kvstore = {"driver": "file", "path": str(tmp_path / "own" / "params" / path)}
        assert same(ts.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result(), array), path
        assert same(restored[path], array), path
    assert same(params["embed"]["weight"], arrays(tmp_path / "hf")["model.embed_tokens.weight"])


def test_zeros_are_stored(tmp_path) -> None:
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract_params(NARROW))
    convert.save_checkpoint(params, NARROW, tmp_path / "own")
    loaded = convert.load_checkpoint(tmp_path / "own")[1]
    assert all(jax.tree.leaves(jax.tree.map(same, loaded, params)))


@pytest.mark.slow
def test_kept_fp8_restores_as_codes_and_scales(tmp_path) -> None:
    convert.from_hf(make(tmp_path / "hf", fp8="channel"), tmp_path / "own", keep_fp8=True)
    tree = flat(ocp.PyTreeCheckpointer().restore(tmp_path / "own" / "params"))
    codes, scales = tree["moe_layers.moe.experts.up"], tree["moe_layers.moe.experts.up_scale"]
    assert codes.dtype.name == "float8_e4m3fn" and scales.shape == (*codes.shape[:-1], 1)


@pytest.mark.slow
def test_into_a_mesh(own) -> None:
    code = """
import sys, jax, orbax.checkpoint as ocp, orbax.checkpoint.experimental.v1 as v1
from glm45_jax import abstract_params, convert, model, parallel
config, plain = convert.load_checkpoint(sys.argv[1])
shardings = model.param_shardings(config, parallel.make_mesh(fsdp=2, tensor=2, expert=2))
tree = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract_params(config), shardings)
tree = jax.tree.map(lambda t, a: jax.ShapeDtypeStruct(t.shape, a.dtype, sharding=t.sharding), tree, plain)
path = sys.argv[1] + "/params"
for restored in (v1.load(path, tree), ocp.StandardCheckpointer().restore(path, tree)):
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b, s: a.sharding == s and bool((a == jax.device_put(b, s)).all()),
                                            restored, plain, shardings)))
print("same")
"""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert "same" in run_python(code, str(own[0]), env=env)
