"""Rules from logical to mesh axes, and the errors that name what doesn't fit."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from glm45_jax.model import param_shardings
from glm45_jax.parallel import make_mesh


def specs(config, rules=None, **sizes):
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return jax.tree.map(lambda s: s.spec, param_shardings(config, mesh, rules))


def test_specs() -> None:
    tree = specs(get_preset("tiny"), fsdp=2, tensor=2, expert=4)
    moe = tree["moe_layers"]["moe"]
    assert moe["experts"]["gate"] == PartitionSpec(None, "expert", "tensor", "fsdp")
    assert moe["experts"]["down"] == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert moe["router"]["bias"] == PartitionSpec(None, "expert")
    assert tree["embed"]["weight"] == PartitionSpec("tensor", "fsdp")
    assert tree["moe_layers"]["attention"]["o"]["weight"] == PartitionSpec(None, "fsdp", "tensor")
    assert tree["moe_layers"]["attention"]["q_norm"]["scale"] == PartitionSpec(None, None)


def test_axes_that_the_mesh_lacks_are_skipped() -> None:
    assert all(not any(spec) for spec in jax.tree.leaves(specs(get_preset("tiny"), data=8), is_leaf=is_spec))


def is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)


def test_rules_may_be_changed() -> None:
    config = get_preset("tiny")
    tree = specs(config, {"kv_heads": None, "experts": ("expert", "fsdp"), "embed": None}, tensor=8, expert=2, fsdp=2)
    assert tree["moe_layers"]["attention"]["k"]["weight"] == PartitionSpec(None, None, None)
    assert tree["moe_layers"]["moe"]["experts"]["up"] == PartitionSpec(None, ("expert", "fsdp"), "tensor", None)


def test_heads_are_never_cut() -> None:
    """The k matrix has 32 rows, divisible by 8: but they are 2 heads."""
    with pytest.raises(
        UserError, match=r"attention\.k\.weight: kv_heads is 2, not divisible by mesh axes \('tensor',\) of 8"
    ):
        specs(get_preset("tiny"), tensor=8)


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
