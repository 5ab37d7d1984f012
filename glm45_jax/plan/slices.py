"""Slices by name: how many devices, how much memory, and how fast each mesh axis is.

`v5p:8x8x4` is a TPU slice by its topology, as libtpu names it; `h100:64` so many GPUs, eight to a host. A JAX device
is a chip, but for tpu7x, whose chips are two devices: figures here are a chip's, of tpu7x half a chip's.

Sources: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} for memory and "bidirectional ICI bandwidth per chip", which is
divided by the chip's links (four in a 2D, six in a 3D torus) and by two directions; NVIDIA's H100 SXM data sheet and
the DGX H100 guide for NVLink (900 GB/s, both directions) and one 400 Gb/s adapter for each GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from glm45_jax.errors import UserError
from glm45_jax.parallel import MeshConfig, make_mesh
from pallas_kernels.analysis.compile import missing_compiler, prepare_environment
from pallas_kernels.chip import CHIPS, Chip

_GIB = 1 << 30
_HOST = 8  # GPUs of a host


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a plan knows of a kind of chip besides `pallas_kernels.chip`. Bytes and speeds are a JAX device's.

    Attributes:
      memory_bytes: of HBM.
      link_bytes_per_s: of one link in one direction; of a GPU, NVLink's.
      dimensions: of the torus; 0 for a GPU.
      devices_per_chip: JAX devices.
      wraps_at: a dimension of a slice is a ring where its size is a multiple of this, else a line.
      core_bytes_per_s: between the two devices of a chip, one direction.
      network_bytes_per_s: of a GPU's adapter, one direction.
    """

    memory_bytes: float
    link_bytes_per_s: float
    dimensions: int
    devices_per_chip: int = 1
    wraps_at: int = 0
    core_bytes_per_s: float = 0
    network_bytes_per_s: float = 0


# v5e and v6e are rings along a whole pod's 16 alone; v5p and tpu7x are wired in cubes of 4 x 4 x 4, rings from there
# on. The two halves of a tpu7x chip are connected six times as fast as a link.
HARDWARE = {
    "v5e": Hardware(16 * _GIB, 50e9, 2, wraps_at=16),
    "v6e": Hardware(32 * _GIB, 100e9, 2, wraps_at=16),
    "v5p": Hardware(95 * _GIB, 100e9, 3, wraps_at=4),
    "tpu7x": Hardware(96 * _GIB, 100e9, 3, devices_per_chip=2, wraps_at=4, core_bytes_per_s=600e9),
    "h100": Hardware(80e9, 450e9, 0, network_bytes_per_s=50e9),
}
EXAMPLES = "v5e:16x16, v5p:8x8x4, v6e:8x8, tpu7x:4x4x4, h100:64"


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices that are not there: `dims` of the torus, or the number of GPUs."""

    name: str
    chip: Chip
    hardware: Hardware
    dims: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.dims)

    @property
    def devices(self) -> int:
        return self.chips * self.hardware.devices_per_chip

    @property
    def platform(self) -> str:
        """That programs are lowered for."""
        return "cuda" if self.chip.platform == "gpu" else "tpu"

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions are rings. A TPU's are only where all could be: a slice of whole cubes."""
        at = self.hardware.wraps_at
        if not at:
            return ()
        each = tuple(d % at == 0 for d in self.dims)
        return each if self.hardware.dimensions == 2 else (all(each),) * len(each)


def parse_slice(name: str) -> Slice:
    """A slice by its name.

    Raises:
      UserError: an unknown chip, or sizes that it does not come in.
    """
    kind, _, sizes = name.partition(":")
    if kind not in HARDWARE:
        raise UserError(
            f"slice {name!r}: no chip is called {kind!r}; there are {', '.join(HARDWARE)}, as in {EXAMPLES}"
        )
    hardware = HARDWARE[kind]
    dims = tuple(map(int, sizes.split("x"))) if re.fullmatch(r"\d+(x\d+)*", sizes) else ()
    if not all(dims) or not dims:
        raise UserError(f"slice {name!r}: sizes are missing, as in {EXAMPLES}")
    if len(dims) != (hardware.dimensions or 1):
        what = f"{hardware.dimensions} sizes, as {kind}:{'x'.join(['4'] * hardware.dimensions)}"
        raise UserError(f"slice {name!r}: {kind} takes {what if hardware.dimensions else 'the number of GPUs'}")
    if not hardware.dimensions and dims[0] > _HOST and dims[0] % _HOST:
        raise UserError(f"slice {name!r}: hosts have {_HOST} GPUs; {dims[0]} is no multiple")
    return Slice(name, CHIPS[kind], hardware, dims)


@functools.cache
def devices_of(name: str) -> tuple[Any, ...]:
    """The slice's devices, described to the compiler.

    Raises:
      UserError: the compiler is not installed, or knows no such slice.
    """
    wanted = parse_slice(name)
    if why := missing_compiler(wanted.chip.name):
        raise UserError(f"{why}; with --no-compile everything but memory and collectives is there all the same")
    prepare_environment()
    try:
        if wanted.platform == "tpu":
            with _hushed():
                found = topologies.get_topology_desc(platform="tpu", topology_name=name)
        else:
            hosts = -(-wanted.devices // _HOST)
            found = _gpus(f"1x{hosts}x{wanted.devices // hosts}")
    except Exception as e:
        raise UserError(f"slice {name!r}: the compiler describes no such slice ({str(e).splitlines()[0][:200]})") from e
    if len(found.devices) != wanted.devices:
        raise UserError(
            f"slice {name!r} has {len(found.devices)} devices for the compiler, {wanted.devices} were expected"
        )
    return tuple(found.devices)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what libtpu, as it is loaded, writes to stderr about there being no TPU."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _gpus(topology: str) -> Any:
    from pallas_kernels.analysis.compile import H100

    return topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology=topology)


def mesh_of(name: str, sizes: MeshConfig) -> Mesh:
    """The slice's mesh, as a run on it would make it."""
    return make_mesh(devices_of(name), **resolved(sizes, parse_slice(name).devices))


def resolved(sizes: MeshConfig, devices: int) -> dict[str, int]:
    """The sizes of all six axes, -1 put in.

    Raises:
      UserError: they do not multiply to the number of devices.
    """
    each = dataclasses.asdict(sizes)
    known = math.prod(n for n in each.values() if n != -1)
    each = {a: (devices // known if known > 0 else 0) if n == -1 else n for a, n in each.items()}
    if math.prod(each.values()) != devices or min(each.values()) < 1:
        asked = ", ".join(f"{a}={n}" for a, n in dataclasses.asdict(sizes).items() if n != 1)
        raise UserError(f"a mesh of {asked} does not divide {devices} devices")
    return each


# --- the speed of a mesh axis ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What one mesh axis covers of one dimension of a torus: `size` places, `stride` apart, of `extent`."""

    size: int
    stride: int
    extent: int
    wraps: bool

    @property
    def is_ring(self) -> bool:
        return self.wraps and self.size * self.stride == self.extent

    def links(self) -> float:
        """Links in one direction that a device's traffic has: 2 of a ring (both ways around), 1 of a line.

        Places `stride` apart share the links between them with those in the gaps.
        """
        return (2 if self.is_ring else 1) / self.stride


def axis_speeds(where: Slice, mesh: Mesh) -> dict[str, float]:
    """Bytes per second that each device can put on the links of each mesh axis; axes of one device left out.

    Read off where the mesh's devices stand: along one axis, all others at 0, the coordinates that change. An axis that
    covers several dimensions of the torus has the links of all of them. On GPUs an axis within a host has NVLink's
    speed, one between hosts an adapter's, and one over both a host's adapters together, up to NVLink's.
    """
    speeds = {}
    for i, axis in enumerate(mesh.axis_names):
        if mesh.devices.shape[i] > 1:
            line = np.moveaxis(mesh.devices, i, 0).reshape(mesh.devices.shape[i], -1)[:, 0]
            speeds[str(axis)] = _gpu_speed(where, line) if where.platform == "cuda" else _torus_speed(where, line)
    return speeds


def _torus_speed(where: Slice, line: Any) -> float:
    hardware = where.hardware
    on_chip = {d.core_on_chip for d in line}
    stretches = [s for s in _stretches(where, [tuple(d.coords) for d in line]) if s.size > 1]
    each = [s.links() for s in stretches]
    # a diagonal goes along two dimensions with the links of one
    full = math.prod(s.size for s in stretches) * len(on_chip) == len(line)
    links = sum(each) if full else min(each)
    # both devices of a chip use its links, at the same time
    speed = links * hardware.link_bytes_per_s / hardware.devices_per_chip
    return hardware.core_bytes_per_s if len(on_chip) > 1 and not stretches else speed


def _stretches(where: Slice, line: list[tuple[int, ...]]) -> list[Stretch]:
    wraps = where.wraps + (False,) * 3
    found = []
    for d, extent in enumerate(where.dims):
        places = sorted({c[d] for c in line})
        stride = min(np.diff(places), default=1)
        found.append(Stretch(len(places), int(stride), extent, wraps[d]))
    return found


def _gpu_speed(where: Slice, line: Any) -> float:
    hosts = {d.id // _HOST for d in line}
    within = len(line) / len(hosts)
    if len(hosts) == 1:
        return where.hardware.link_bytes_per_s
    return min(where.hardware.link_bytes_per_s, within * where.hardware.network_bytes_per_s)
