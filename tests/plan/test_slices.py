"""Slices by name, and the speed of mesh axes laid on them, by hand."""

from __future__ import annotations

import types

import numpy as np
import pytest
from jax.sharding import Mesh

from glm45_jax.errors import UserError
from glm45_jax.parallel import MeshConfig
from glm45_jax.plan.slices import Stretch, axis_speeds, parse_slice, resolved


@pytest.mark.parametrize(
    ("name", "chips", "devices", "wraps"),
    [
        ("v5e:4x8", 32, 32, (False, False)),
        ("v5e:8x16", 128, 128, (False, True)),
        ("v6e:16x16", 256, 256, (True, True)),
        ("v5p:2x2x4", 16, 16, (False,) * 3),  # no whole cube
        ("v5p:8x8x4", 256, 256, (True,) * 3),
        ("tpu7x:4x4x4", 64, 128, (True,) * 3),
        ("h100:64", 64, 64, ()),
    ],
)
def test_names(name: str, chips: int, devices: int, wraps: tuple[bool, ...]) -> None:
    where = parse_slice(name)
    assert (where.chips, where.devices, where.wraps) == (chips, devices, wraps)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("v9:2x2", "no chip is called 'v9'"),
        ("v5p", "sizes are missing"),
        ("v5e:0x4", "sizes are missing"),
        ("v5p:4x4", "v5p takes 3 sizes"),
        ("v5e:4x4x4", "v5e takes 2 sizes"),
        ("h100:8x8", "takes the number of GPUs"),
        ("h100:12", "no multiple"),
    ],
)
def test_bad_names_are_refused(name: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        parse_slice(name)


def test_sizes_that_remain() -> None:
    assert resolved(MeshConfig(expert=8), 64)["fsdp"] == 8
    with pytest.raises(UserError, match="fsdp=3, expert=8 does not divide 64"):
        resolved(MeshConfig(fsdp=3, expert=8), 64)
    with pytest.raises(UserError, match="does not divide"):
        resolved(MeshConfig(expert=128), 64)


def links(*args) -> float:
    return Stretch(*args).links()


def test_links_of_a_stretch() -> None:
    assert links(8, 1, 8, True) == 2  # around a ring, both ways
    assert links(8, 1, 8, False) == 1  # a line: its ends have one neighbour
    assert links(4, 1, 8, True) == 1  # half a ring is a line
    assert links(4, 2, 8, True) == 1  # every other chip around a ring: both ways, shared with the chips between
    assert links(2, 2, 4, True) == 1  # across a ring of four, two ways of two links
    assert links(2, 4, 8, False) == 0.25


def laid(name: str, places: list[tuple[int, ...]], shape: tuple[int, ...]) -> Mesh:
    """A mesh whose devices stand at these places, the last coordinate the core."""
    devices = np.empty(len(places), object)
    for i, (*coords, core) in enumerate(places):
        devices[i] = types.SimpleNamespace(id=i, coords=tuple(coords), core_on_chip=core)
    named = types.SimpleNamespace(axis_names=("fsdp", "expert", "tensor")[: len(shape)], devices=devices.reshape(shape))
    return named  # pyright: ignore


def grid(*sizes: int) -> list[tuple[int, ...]]:
    return [tuple(map(int, i)) for i in np.ndindex(*sizes)]


def speeds(name: str, places: list[tuple[int, ...]], shape: tuple[int, ...]) -> dict[str, float]:
    return axis_speeds(parse_slice(name), laid(name, places, shape))


def test_speeds_of_axes_on_a_torus() -> None:
    whole = grid(8, 8, 4, 1)
    # 64 chips over two whole dimensions: four links; 4 over one: two
    assert speeds("v5p:8x8x4", whole, (64, 4)) == {"fsdp": 400e9, "expert": 200e9}
    assert speeds("v5p:8x8x4", whole, (8, 32)) == {"fsdp": 200e9, "expert": 400e9}
    # a ring, and two of the next one opposite each other, four links apart both ways; half of that one, and a ring
    assert speeds("v5p:8x8x4", whole, (16, 16)) == {"fsdp": 200e9 + 2 * 100e9 / 4, "expert": 100e9 + 200e9}
    # no ring in a small v5e
    assert speeds("v5e:4x8", grid(4, 8, 1), (4, 8)) == {"fsdp": 50e9, "expert": 50e9}
    assert speeds("v5e:16x16", grid(16, 16, 1), (16, 16)) == {"fsdp": 100e9, "expert": 100e9}


def test_a_diagonal_has_the_links_of_one_dimension() -> None:
    """Four chips in the order of a ring: JAX lays meshes on one host so."""
    ring = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
    assert speeds("v5e:2x2", ring, (2, 2)) == {"fsdp": 50e9, "expert": 50e9}
    assert speeds("v5e:2x2", ring, (4, 1)) == {"fsdp": 100e9}


def test_both_devices_of_a_chip_share_its_links() -> None:
    both = [(x, y, z, c) for x, y, z, c in grid(4, 4, 4, 2)]
    assert speeds("tpu7x:4x4x4", both, (16, 4, 2)) == {"fsdp": 200e9, "expert": 100e9, "tensor": 600e9}


def test_speeds_of_axes_on_gpus() -> None:
    gpus = [(i, 0) for i in range(64)]
    assert speeds("h100:64", gpus, (8, 8)) == {"fsdp": 50e9, "expert": 450e9}
    assert speeds("h100:64", gpus, (64, 1)) == {"fsdp": 400e9}  # eight adapters a host
    assert speeds("h100:64", gpus, (16, 4)) == {"fsdp": 100e9, "expert": 450e9}
