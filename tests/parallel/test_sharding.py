"""Rules from logical to mesh axes, and the errors that name what doesn't fit."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from glm45_jax.config import ParallelConfig, get_preset
from glm45_jax.errors import UserError
from glm45_jax.model import param_shardings
from glm45_jax.parallel import make_mesh


def specs(config, rules=None, **sizes):
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return jax.tree.map(lambda s: s.spec, param_shardings(config, mesh, rules))


def test_specs() -> None:
    tree = specs(get_preset("tiny"), fsdp=2, tensor=2, expert=4)
    moe = tree["moe_layers"]["moe"]
    assert moe["experts"]["gate"] == PartitionSpec(None, ("expert", "tensor"), None, "fsdp")
    assert moe["experts"]["down"] == PartitionSpec(None, ("expert", "tensor"), "fsdp", None)
    assert moe["router"]["weight"] == PartitionSpec(None, None, ("fsdp", "expert"))
    assert moe["router"]["bias"] == PartitionSpec(None, None)
    assert tree["embed"]["weight"] == PartitionSpec("tensor", ("fsdp", "expert"))
    assert tree["moe_layers"]["attention"]["o"]["weight"] == PartitionSpec(None, ("fsdp", "expert"), "tensor")
    assert tree["moe_layers"]["attention"]["q_norm"]["scale"] == PartitionSpec(None, None)


def test_axes_that_the_mesh_lacks_are_skipped() -> None:
    assert all(not any(spec) for spec in jax.tree.leaves(specs(get_preset("tiny"), data=8), is_leaf=is_spec))


def is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)


def test_rules_may_be_changed() -> None:
    config = get_preset("tiny")
    changes = {"experts": ("expert", "fsdp"), "embed": None, "expert_embed": None}
    tree = specs(config, changes, tensor=2, expert=2, fsdp=2)
    assert tree["moe_layers"]["attention"]["k"]["weight"] == PartitionSpec(None, "tensor", None)
    assert tree["moe_layers"]["moe"]["experts"]["up"] == PartitionSpec(None, ("expert", "fsdp"), None, None)


def test_rules_are_those_of_the_configuration() -> None:
    config = get_preset("tiny").replace(parallel=ParallelConfig(rules=(("experts", "expert", "fsdp"), ("embed",))))
    tree = specs(config, {"expert_embed": None}, expert=2, fsdp=2)
    assert tree["moe_layers"]["moe"]["experts"]["up"] == PartitionSpec(None, ("expert", "fsdp"), None, None)
    assert tree["head"]["weight"] == PartitionSpec(None, None)


def test_more_devices_than_kv_heads_have_all_of_them() -> None:
    tree = specs(get_preset("tiny", n_routed_experts=16), tensor=8)
    assert tree["moe_layers"]["attention"]["k"]["weight"] == PartitionSpec(None, None, None)
    assert tree["moe_layers"]["attention"]["q"]["weight"] == PartitionSpec(None, "tensor", None)


def test_axes_of_one_device_cut_nothing() -> None:
    assert specs(get_preset("tiny"), fsdp=1, tensor=2)["embed"]["weight"] == PartitionSpec("tensor", None)


def test_heads_are_never_cut() -> None:
    """The q matrix has 128 rows, divisible by 16: but they are 8 heads."""
    with pytest.raises(
        UserError, match=r"attention\.q\.weight: heads is 8, not divisible by mesh axes \('tensor',\) of 16"
    ):
        specs(get_preset("tiny"), tensor=16)


def test_collisions_are_named() -> None:
    with pytest.raises(UserError, match=r"embed\.weight: 'vocab' and 'embed' both go to mesh axis 'fsdp'"):
        specs(get_preset("tiny"), {"vocab": "fsdp"}, fsdp=2)


def test_unknown_logical_axes() -> None:
    with pytest.raises(UserError, match=r"unknown logical axes \['kv'\]"):
        specs(get_preset("tiny"), {"kv": None}, fsdp=2)


def test_make_mesh() -> None:
    mesh = make_mesh(fsdp=1, tensor=-1)
    assert dict(mesh.shape) == {"fsdp": 1, "tensor": len(jax.devices())}
    with pytest.raises(UserError, match="does not divide"):
        make_mesh(fsdp=3 * len(jax.devices()))
