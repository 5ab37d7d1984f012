"""A plan: what a step needs of one device, and the time that it cannot beat.

Identities between the fields, exact:

  memory.peak          = parameters + optimizer + cache + batch + activations + temporaries + outputs
  compute_seconds      = flops / (bf16 peak of a device)
  memory_seconds       = bytes / (memory speed of a device)
  collective_seconds   = collective_bytes / link_bytes_per_s, axis by axis
  roofline_seconds     = max(compute_seconds, memory_seconds, each of collective_seconds): everything overlapped
  serial_seconds       = their sum: nothing overlapped
  bound_by             = which of them is the roofline: "compute", "memory" or a mesh axis
  mfu                  = model_flops / (chips * chip_flops_per_s * roofline_seconds)
  fits                 = memory.peak <= memory.limit

Without a compiled program memory but for arguments and saved activations is not known: None. Collectives are then those
that the program itself asks for, and without a compiler to describe the slice's links their times are left out.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from glm45_jax.parallel import AXES, MeshConfig
from glm45_jax.plan.build import Built, build
from glm45_jax.plan.collectives import Collective, collectives, sent_bytes
from glm45_jax.plan.count import Counts, count
from glm45_jax.plan.hlo_cost import matrix_flops, memory_bytes
from glm45_jax.plan.programs import Program, bytes_per_device, steering_values
from glm45_jax.plan.slices import Slice, axis_speeds, mesh_of, parse_slice, resolved
from pallas_kernels.analysis.compile import missing_compiler


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      optimizer, cache: of training; of serving.
      activations: kept for the backward pass, as the program stacks them.
      temporaries: all else that the step allocates, its code included.
      outputs: those that do not take over an argument's memory.
      limit: the device's memory less what the runtime keeps for itself.
    """

    parameters: float
    optimizer: float
    cache: float
    batch: float
    activations: float | None
    temporaries: float | None
    outputs: float | None
    peak: float | None
    limit: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the module for how the figures hang together. FLOPs and bytes are one device's, `model_flops` all devices'.

    Attributes:
      batch: sequences of a step, all devices together.
      flops: of matrix products as they run, what is recomputed and padded included: the kernels' from the jaxpr, XLA's
        own from the compiled program, without one, and for GPUs, from the jaxpr too.
      bytes: of main memory read and written; from the same places.
      jaxpr_flops, jaxpr_bytes: all of it from the jaxpr. FLOPs differ from `flops` by what XLA does on several devices
        over again, or does not do after all; these bytes are a rough estimate.
      kernels: calls, FLOPs and bytes by kernel.
      collectives: how often each runs, by "kind axes".
    """

    program: str
    model: str
    slice: str
    chips: int
    devices: int
    mesh: dict[str, int]
    remat: str
    batch: int
    seq_len: int
    memory: Memory
    fits: bool | None
    flops: float
    bytes: float
    jaxpr_flops: float
    jaxpr_bytes: float
    collective_bytes: dict[str, float]
    link_bytes_per_s: dict[str, float] | None
    chip_flops_per_s: float
    device_flops_per_s: float
    device_bytes_per_s: float
    model_flops: float
    active_parameters: float
    tokens: int
    kernels: dict[str, dict[str, float]]
    collectives: dict[str, float]
    compile_seconds: float | None = None
    largest_batch: int | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def compute_seconds(self) -> float:
        return self.flops / self.device_flops_per_s

    @property
    def memory_seconds(self) -> float:
        return self.bytes / self.device_bytes_per_s

    @property
    def collective_seconds(self) -> dict[str, float]:
        speeds = self.link_bytes_per_s or {}
        return {axis: sent / speeds[axis] for axis, sent in self.collective_bytes.items() if axis in speeds}

    @property
    def terms(self) -> dict[str, float]:
        """Seconds of everything that a step must do, by what does it."""
        return {"compute": self.compute_seconds, "memory": self.memory_seconds, **self.collective_seconds}

    @property
    def roofline_seconds(self) -> float:
        return max(self.terms.values())

    @property
    def serial_seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def bound_by(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.chips * self.chip_flops_per_s * self.roofline_seconds)

    def as_json(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: memory is null, and `fits` false, where the compiler refused the program
        as too large without a figure."""
        derived = (
            "compute_seconds", "memory_seconds", "collective_seconds", "roofline_seconds", "serial_seconds", "bound_by",
            "mfu",
        )  # fmt: skip
        plain = dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
        memory = {part: None if size == math.inf else size for part, size in plain["memory"].items()}
        return plain | {"memory": memory}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is planned.

    Attributes:
      make: mesh -> the program.
      model_flops, active_parameters: see `plan.model_flops`.
    """

    program: str
    model: str
    make: Any
    remat: str
    batch: int
    seq_len: int
    tokens: int
    model_flops: float
    active_parameters: float


def plan(job: Job, slice_name: str, sizes: MeshConfig, compiled: bool = True) -> Plan:
    """Compiles the job's program for the slice and counts it; `compiled=False` only counts."""
    where = parse_slice(slice_name)
    described = missing_compiler(where.chip.name) is None
    mesh = mesh_of(slice_name, sizes) if described else abstract_mesh(where, sizes)
    program = job.make(mesh)
    # the mesh in force tells kernels their chip
    with jax.set_mesh(mesh) if described else jax.sharding.use_abstract_mesh(mesh):
        traced = program.trace()
    counts = count(traced.jaxpr, steering_values(program), where.platform, where.devices)
    built = build(program, where, mesh, traced) if compiled else None
    found = _without_empty_rows(collectives(built.hlo, mesh), counts) if built and built.hlo else counts.collectives
    speeds = axis_speeds(where, mesh) if described else None
    memory = _memory(program, where, built, counts)
    # what is compiled is what runs; kernels are opaque to the compiler, and the walk knows them
    xla_flops, xla_bytes = counts.xla_flops, counts.xla_bytes
    if built and built.hlo:
        xla_bytes = memory_bytes(built.hlo)
        if where.platform == "tpu":  # a GPU's products are calls of cuBLAS by then
            xla_flops = matrix_flops(built.hlo)
    notes = [*counts.notes, *(built.hlo.notes if built and built.hlo else ())]
    if not (built and built.hlo):
        notes.append("of the collectives only those that the program itself asks for are in the figures, not XLA's own")
    network = "switch" if where.platform == "cuda" else "torus"
    per_chip = where.hardware.devices_per_chip
    return Plan(
        program=job.program,
        model=job.model,
        slice=slice_name,
        chips=where.chips,
        devices=where.devices,
        mesh=resolved(sizes, where.devices),
        remat=job.remat,
        batch=job.batch,
        seq_len=job.seq_len,
        memory=memory,
        fits=None if memory.peak is None else memory.peak <= memory.limit,
        flops=xla_flops + counts.kernel_flops,
        bytes=xla_bytes + counts.kernel_bytes,
        jaxpr_flops=counts.flops,
        jaxpr_bytes=counts.bytes,
        collective_bytes=sent_bytes(found, mesh, network),
        link_bytes_per_s=speeds,
        chip_flops_per_s=where.chip.bf16_flops_per_s * per_chip,
        device_flops_per_s=where.chip.bf16_flops_per_s,
        device_bytes_per_s=where.chip.memory_bytes_per_s,
        model_flops=job.model_flops,
        active_parameters=job.active_parameters,
        tokens=job.tokens,
        kernels={name: dataclasses.asdict(kernel) for name, kernel in sorted(counts.kernels.items())},
        collectives=_how_often(found),
        compile_seconds=built.seconds if built else None,
        notes=tuple(notes),
        versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    )


def _without_empty_rows(found: list[Collective], counts: Counts) -> list[Collective]:
    """Ragged all-to-alls with the rows that they send: in the compiled program only their buffers' sizes are seen."""
    share = counts.ragged_sent / counts.ragged_room if counts.ragged_room else 1.0
    return [dataclasses.replace(c, bytes=c.bytes * share) if c.kind == "ragged-all-to-all" else c for c in found]


def abstract_mesh(where: Slice, sizes: MeshConfig) -> AbstractMesh:
    """A mesh to trace under, without a compiler that could describe devices."""
    chip = where.chip
    device = AbstractDevice(chip.device_kinds[0], chip.cores if chip.platform == "tpu" else None, chip.platform)
    shape = tuple(resolved(sizes, where.devices).values())
    return AbstractMesh(shape, AXES, (AxisType.Auto,) * len(AXES), abstract_device=device)


def memory_limit(where: Slice) -> float:
    """Of a device, less what its runtime keeps: a quarter GiB of a TPU, of a GPU CUDA's context and NCCL's buffers."""
    return where.hardware.memory_bytes - ((2 << 30) if where.platform == "cuda" else (1 << 28))


def _memory(program: Program, where: Slice, built: Built | None, counts: Counts) -> Memory:
    part = {name: bytes_per_device(tree) for name, tree in program.parts.items()}
    fixed = {name: part.get(name, 0.0) for name in ("parameters", "optimizer", "cache", "batch")}
    limit = memory_limit(where)
    if built is None:
        return Memory(**fixed, activations=counts.saved_bytes, temporaries=None, outputs=None, peak=None, limit=limit)
    arguments = sum(fixed.values())
    if built.hlo is None:
        rest = max(0.0, (built.needed_bytes or 0) - arguments)
        outputs = 0.0
    else:
        # the compiler's figure for arguments has their padding to whole tiles
        rest = built.temporary_bytes + built.code_bytes + max(0.0, built.argument_bytes - arguments)
        outputs = max(0.0, built.output_bytes - built.alias_bytes)
    activations = min(counts.saved_bytes, rest)
    peak = arguments + rest + outputs
    return Memory(
        **fixed, activations=activations, temporaries=rest - activations, outputs=outputs, peak=peak, limit=limit
    )


def _how_often(found: list[Collective]) -> dict[str, float]:
    total: dict[str, float] = {}
    for c in found:
        if c.axes:
            name = f"{c.kind} {'+'.join(c.axes)}"
            total[name] = total.get(name, 0) + c.times
    return dict(sorted(total.items()))
