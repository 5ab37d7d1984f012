"""The chips that kernels are tiled for, and which one a program is being made for.

A kernel never asks which devices exist: the chip comes from the mesh in force (`jax.set_mesh`, described topologies
too) or from an explicit `chip=`. Without either, tiling fits the smallest chip, so that it runs on every one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a kernel has to know of a chip; per core for a TPU (a JAX device of v5p has two), per device for a GPU.

    Attributes:
      on_chip_bytes: VMEM of a TPU core; shared memory that a block of a GPU can have.
      matrix_unit: rows and columns of a TPU's matrix unit; the least columns that fill it.
      memory_bytes_per_s: of the device's main memory (HBM), all cores together.
      bf16_flops_per_s: dense, all cores together.
      cores: cores that share a JAX device.
    """

    name: str
    platform: str
    device_kinds: tuple[str, ...]
    on_chip_bytes: int
    matrix_unit: int
    memory_bytes_per_s: float
    bf16_flops_per_s: float
    cores: int = 1


# Figures of the vendors' public pages (cloud.google.com/tpu/docs, data sheets of the SXM cards) and of jax's TpuInfo.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", ("TPU v4",), 16 * _MIB, 128, 1.23e12, 275e12),
        Chip("v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 128 * _MIB, 128, 0.82e12, 197e12),
        Chip("v5p", "tpu", ("TPU v5", "TPU v5p"), 64 * _MIB, 128, 2.77e12, 459e12, cores=2),
        Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 128 * _MIB, 256, 1.64e12, 918e12),
        Chip("tpu7x", "tpu", ("TPU7x",), 64 * _MIB, 256, 3.69e12, 1154e12),
        Chip("h100", "gpu", ("NVIDIA H100",), 227 << 10, 64, 3.35e12, 989e12),
        Chip("h200", "gpu", ("NVIDIA H200",), 227 << 10, 64, 4.8e12, 989e12),
    )
}
SMALLEST_TPU = "v4"


def named_chip(name: str) -> Chip:
    """Raises ValueError for a name that is not among `CHIPS`."""
    if name not in CHIPS:
        raise ValueError(f"no chip is called {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name]


def chip_in_force() -> Chip | None:
    """The chip of the mesh in force; None without a mesh, or for a chip that is not among `CHIPS`."""
    kind = _kind_in_force()
    return chip_of_kind(kind) if kind is not None else None


def platform_in_force() -> str | None:
    """Of the mesh in force: "tpu", "gpu" or "cpu"; None without a mesh, or for a chip that is not among `CHIPS`."""
    chip = chip_in_force()
    return chip.platform if chip is not None else "cpu" if _kind_in_force() == "cpu" else None


def _kind_in_force() -> str | None:
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else None


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip whose devices call themselves so; a GPU's name may go on ("NVIDIA H100 80GB HBM3")."""
    for chip in CHIPS.values():
        matches = device_kind.startswith if chip.platform == "gpu" else device_kind.__eq__
        if any(map(matches, chip.device_kinds)):
            return chip
    return None


def tpu_to_tile_for(name: str | None = None) -> Chip:
    """The TPU called `name`, else that of the mesh in force, else the smallest."""
    if name is not None:
        return named_chip(name)
    chip = chip_in_force()
    return chip if chip is not None and chip.platform == "tpu" else CHIPS[SMALLEST_TPU]
