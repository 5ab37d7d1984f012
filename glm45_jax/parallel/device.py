"""The device that kernels are made for, said to them by way of the mesh in force."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from glm45_jax.parallel.mesh import make_mesh


@contextlib.contextmanager
def device_in_force(arrays: Any) -> Iterator[None]:
    """Makes the device that holds `arrays` the mesh in force: programs traced inside have kernels for its chip.

    Without one a TPU's kernels are tiled for the smallest chip, and a Hopper GPU gets portable XLA (see
    `pallas_kernels.chip`). Nothing changes where a mesh is in force already, or where several devices hold the arrays.
    """
    devices = {device for x in jax.tree.leaves(arrays) for device in getattr(x, "devices", set)()}
    if len(devices) != 1 or not jax.sharding.get_abstract_mesh().empty:
        yield
        return
    with jax.set_mesh(make_mesh(list(devices), fsdp=1)):
        yield
