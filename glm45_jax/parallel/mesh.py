"""Meshes: which devices stand where, on six named axes.

data      copies of everything, each with its own sequences; the axis between slices
pipeline  stages: each has some of the MoE layers; at rest parameters are divided over it, as over fsdp
fsdp      parameters divided, gathered where used; each has its own sequences
expert    the experts divided; for all else as fsdp
context   pieces of each sequence
tensor    heads and widths; between them pieces of each sequence
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from glm45_jax.errors import UserError

AXES = ("data", "pipeline", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1: the devices that remain."""

    data: int = 1
    pipeline: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def make(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh of all six axes."""
        return make_mesh(devices, **dataclasses.asdict(self))


def make_mesh(devices: Sequence[Any] | None = None, **axis_sizes: int) -> Mesh:
    """A mesh of Auto axes in the order given; one size may be -1: what remains.

    TPUs are laid out along their torus as well as JAX can. Of several slices each has the same part of the `data` axis,
    the only one that then crosses the network between them.

    >>> make_mesh(fsdp=2, tensor=-1)

    Raises:
      UserError: the sizes don't multiply to the number of devices, or `data` doesn't divide over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, known = dict(axis_sizes), math.prod(size for size in axis_sizes.values() if size != -1)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) == 1 and known > 0:
        sizes[open_axes[0]] = len(devices) // known
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != len(devices):
        raise UserError(f"a mesh of {axis_sizes} does not divide {len(devices)} devices")
    return Mesh(_laid_out(sizes, devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _laid_out(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    how = {"devices": devices, "allow_split_physical_axes": True}
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), **how)
    if sizes.get("data", 1) % slices:
        raise UserError(
            f"{slices} slices need a data axis of a multiple of {slices}, which alone crosses the network between "
            f"them; this mesh has data={sizes.get('data', 1)}"
        )
    between = tuple(slices if name == "data" else 1 for name in sizes)
    within = tuple(size // n for size, n in zip(sizes.values(), between))
    return mesh_utils.create_hybrid_device_mesh(within, between, **how)
