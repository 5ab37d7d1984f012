"""Counts the bytes that a program's kernels move between a device's main memory and the chip: counted, never declared.

`count_traffic(fn, *args)` traces the program and walks it with whatever is known: concrete arrays among the arguments
(group sizes, indices, lengths) are followed through the ordinary operations, `jax.ShapeDtypeStruct`s are shapes alone.
At every `pallas_call` of a TPU's the grid is gone through in its order, last axis fastest. A block is fetched when its
index differs from the step before, and written back when the index of an output is about to change; only what lies
inside the array counts. Copies that a kernel starts itself (`make_async_copy`, `emit_pipeline`) are summed as they
start. A kernel of Mosaic GPU is walked by all of its blocks at once (`gpu_kernel.py`).

Not counted: what the padding of arrays to whole tiles adds, and that two cores which share a device may each fetch a
block that is fetched once here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.analysis.gpu_kernel import GpuKernelWalk
from pallas_kernels.analysis.interpreter import Interpreter, Step, UnknownValueError
from pallas_kernels.analysis.kernel import (
    Copies,
    KernelWalk,
    Ref,
    is_far,
    item_bytes,
    memory_space,
    program_ids,
    walk_kernel,
)
from pallas_kernels.analysis.values import UNKNOWN, known, raw
from pallas_kernels.analysis.xla_ops import GPU_KERNEL, KERNELS, is_fused, own_traffic
from pallas_kernels.chip import named_chip


@dataclasses.dataclass(frozen=True)
class OperandTraffic:
    """One operand or result of a kernel. `fetches` and `write_backs` count blocks, not the kernel's own copies."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read_bytes: float = 0
    written_bytes: float = 0
    fetches: int = 0
    write_backs: int = 0


@dataclasses.dataclass(frozen=True)
class KernelTraffic:
    """One kernel call, all steps of its grid. `flops` are those of its matrix products."""

    name: str
    grid: tuple[int, ...]
    operands: tuple[OperandTraffic, ...]
    flops: float = 0
    copies_started: int = 0
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return math.prod(self.grid)

    @property
    def read_bytes(self) -> float:
        return sum(o.read_bytes for o in self.operands)

    @property
    def written_bytes(self) -> float:
        return sum(o.written_bytes for o in self.operands)

    @property
    def total_bytes(self) -> float:
        return self.read_bytes + self.written_bytes


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of a whole program, in the order in which it calls its kernels.

    Attributes:
      xla_bytes: apart from the kernels', a rough figure: the large operands and results of XLA's own operations, where
        a chain of elementwise operations counts what goes in and what comes out.
      xla_flops: of the matrix products outside of kernels.
    """

    kernels: tuple[KernelTraffic, ...]
    xla_bytes: float = 0
    xla_flops: float = 0
    notes: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> float:
        return sum(k.read_bytes for k in self.kernels)

    @property
    def written_bytes(self) -> float:
        return sum(k.written_bytes for k in self.kernels)

    @property
    def total_bytes(self) -> float:
        """Of the kernels."""
        return self.read_bytes + self.written_bytes

    @property
    def flops(self) -> float:
        """Of the kernels."""
        return sum(k.flops for k in self.kernels)


def count_traffic(fn: Callable[..., Any], *args: Any, chip: str | None = None, platform: str = "tpu") -> Traffic:
    """What the kernels of `fn(*args)` move.

    Args:
      args: arrays, or `jax.ShapeDtypeStruct`s where only the shape is needed. Everything that steers a kernel's grid or
        blocks has to be concrete.
      chip: a name among `pallas_kernels.chip.CHIPS` to trace for; by default the mesh in force decides.
      platform: which branches of `jax.lax.platform_dependent` are walked.

    Raises:
      UnknownValueError: (a ValueError) blocks, a grid or a loop depend on values that were not given.
    """
    with described(chip):
        traced = jax.make_jaxpr(fn)(*args)
    walk = ProgramWalk(platform)
    concrete = np.ndarray | np.generic | jax.Array | int
    values = [walk.constant(x) if isinstance(x, concrete) else UNKNOWN for x in jax.tree.leaves(args)]
    # small operations run here and now: a mesh of devices that are only described must not be in force
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("here",))), np.errstate(all="ignore"):
        walk.run_closed(traced, values)
    return Traffic(tuple(walk.kernels), walk.xla_bytes, walk.xla_flops, tuple(walk.notes))


def described(chip: str | None) -> Any:
    """A context in which a mesh of one `chip` is in force, enough to trace for it; none where `chip` is None."""
    if chip is None:
        return jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())
    c = named_chip(chip)
    device = jax.sharding.AbstractDevice(c.device_kinds[0], c.cores if c.platform == "tpu" else None, c.platform)
    axes = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), axes, abstract_device=device))


_WALKS_KEPT = 64
_walked: dict[Any, KernelTraffic] = {}  # of kernels on GPUs: the same one stands in a program many times


class ProgramWalk(Interpreter):
    counted = KERNELS

    def __init__(self, platform: str) -> None:
        super().__init__(platform)
        self.kernels: list[KernelTraffic] = []
        self.xla_bytes = self.xla_flops = 0.0
        self.rules |= dict.fromkeys(KERNELS, self._kernel)
        self._inside_chain = 0

    def run(self, jaxpr: Any, args: Sequence[Any], consts: Sequence[Any] = (), used: Sequence[bool] = ()) -> list[Any]:
        if not self._inside_chain:
            nbytes, flops = own_traffic([step.eqn for step in self._live(jaxpr, tuple(used))], jaxpr.outvars)
            self.xla_bytes += nbytes
            self.xla_flops += flops
        return super().run(jaxpr, args, consts, used)

    def equation(self, step: Step, args: list[Any]) -> list[Any]:
        fused = is_fused(step.eqn)
        self._inside_chain += fused
        try:
            return super().equation(step, args)
        finally:
            self._inside_chain -= fused

    def _kernel(self, eqn: Any, args: list[Any]) -> list[Any]:
        self.kernels.append(kernel_traffic(eqn, args))
        for note in self.kernels[-1].notes:
            self.notes[note] = None
        return [UNKNOWN] * len(eqn.outvars)


def kernel_traffic(eqn: Any, args: Sequence[Any]) -> KernelTraffic:
    """Of one call of a kernel, with its operands as far as they are known."""
    return (_gpu_kernel if eqn.primitive.name == GPU_KERNEL else _tpu_kernel)(eqn, args)


def _gpu_kernel(eqn: Any, args: Sequence[Any]) -> KernelTraffic:
    """Of one `mpmd_map`: blocks that go through the whole of what they are told to by scalars in main memory."""
    (mesh,), (jaxpr,), name = eqn.params["meshes"], eqn.params["jaxprs"], eqn.params["name"]
    key = name, mesh, str(jaxpr), *((x.shape, x.tobytes()) if known(x) else None for x in args)
    if key not in _walked:
        _walked[key] = _walk_gpu_kernel(eqn, args, mesh, jaxpr, name)
        while len(_walked) > _WALKS_KEPT:
            del _walked[next(iter(_walked))]
    return _walked[key]


def _walk_gpu_kernel(eqn: Any, args: Sequence[Any], mesh: Any, jaxpr: Any, name: str) -> KernelTraffic:
    totals = Copies()
    walk = GpuKernelWalk(name, dict(mesh.shape), totals)
    names = argument_names(jaxpr)
    operands = [*args, *(UNKNOWN for _ in eqn.outvars)]
    walk.run(jaxpr, [Ref.of(n, v.aval, value) for n, v, value in zip(names, jaxpr.invars, operands)])
    walk.finish()
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    rows = [
        _with_copies(OperandTraffic(n, tuple(a.shape), str(a.dtype)), totals)
        for n, a in zip(names, avals)
        if n in totals.read or n in totals.written
    ]
    return KernelTraffic(name, tuple(mesh.grid), tuple(rows), totals.flops, totals.started, tuple(walk.notes))


def _tpu_kernel(eqn: Any, args: Sequence[Any]) -> KernelTraffic:
    """Of one `pallas_call`."""
    mapping, jaxpr = eqn.params["grid_mapping"], eqn.params["jaxpr"]
    name = eqn.params.get("name") or getattr(jaxpr.debug_info, "func_name", "kernel")
    dynamic = [i for i, d in enumerate(mapping.grid) if not isinstance(d, int)]
    sizes, operands = args[: len(dynamic)], args[len(dynamic) :]
    if not known(*sizes):
        raise UnknownValueError(
            f"{name}: the size of its grid depends on values that were not given; "
            "give the small arrays that steer it (group sizes, indices, lengths) as concrete arrays"
        )
    grid = list(mapping.grid)
    for i, size in zip(dynamic, sizes):
        grid[i] = int(size)
    names = argument_names(jaxpr)
    prefetched = mapping.num_index_operands
    rows = [_prefetch(names[i], v.aval, operands[i]) for i, v in enumerate(jaxpr.invars[:prefetched])]
    for i, block in enumerate(mapping.block_mappings):
        reads = i < mapping.num_inputs
        rows.append(block_traffic(name, names[prefetched + i], block, grid, operands[:prefetched], reads))
    values = {i: v for i, v in enumerate(operands) if known(v) and _is_whole(mapping, i)}
    copies, notes = walk_kernel(name, jaxpr, names, values, grid)
    rows = [_with_copies(r, copies) for r in rows]
    extra = set(copies.read) | set(copies.written)
    rows += [_with_copies(OperandTraffic(n, (), ""), copies) for n in sorted(extra - {r.name for r in rows})]
    return KernelTraffic(name, tuple(grid), tuple(rows), copies.flops, copies.started, tuple(notes))


def argument_names(jaxpr: Any) -> list[str]:
    """The kernel's own names of its arguments, each once."""
    given = [str(n) for n in (getattr(jaxpr.debug_info, "arg_names", None) or ())]
    names: list[str] = []
    for i in range(len(jaxpr.invars)):
        name = given[i] if i < len(given) and given[i] else f"argument {i}"
        names.append(name if name not in names else f"{name} {i}")
    return names


def _is_whole(mapping: Any, i: int) -> bool:
    """Whether the kernel's argument number `i` is the operand itself, not a block of it in VMEM."""
    if i < mapping.num_index_operands:
        return True
    block = mapping.block_mappings[i - mapping.num_index_operands]
    aval = block.transformed_block_aval
    return is_far(aval) or (memory_space(aval) == "smem" and aval.shape == block.array_aval.shape)


def _prefetch(name: str, aval: Any, value: Any) -> OperandTraffic:
    nbytes = math.prod(aval.shape) * item_bytes(aval.dtype)
    return OperandTraffic(name, tuple(aval.shape), str(aval.dtype), read_bytes=nbytes, fetches=1)


def _with_copies(row: OperandTraffic, copies: Copies) -> OperandTraffic:
    return dataclasses.replace(
        row,
        read_bytes=row.read_bytes + copies.read.get(row.name, 0.0),
        written_bytes=row.written_bytes + copies.written.get(row.name, 0.0),
    )


# --- blocks ----------------------------------------------------------------------------------------------------------


def block_traffic(
    kernel: str, name: str, block: Any, grid: Sequence[int], prefetched: Sequence[Any], reads: bool
) -> OperandTraffic:
    """An operand (`reads`) or result in blocks, over all steps of the grid."""
    array, steps = block.array_aval, math.prod(grid)
    row = OperandTraffic(name, tuple(array.shape), str(array.dtype))
    if steps == 0 or is_far(block.transformed_block_aval) or "sem" in memory_space(block.transformed_block_aval):
        return row
    starts, extents = block_indices(f"{kernel}, {name}", block, grid, prefetched)
    changed = np.ones(steps, bool)
    if steps > 1:
        moved = [(x[1:] != x[:-1]) for x in (*starts, *extents) if x.shape]
        changed[1:] = np.logical_or.reduce(moved) if moved else False
    sizes = np.ones((), np.int64)
    for start, extent, size in zip(starts, extents, array.shape):
        sizes = sizes * np.clip(np.minimum(start + extent, size) - np.maximum(start, 0), 0, None)
    # a result is written when its block is left, and every block that is entered is left
    nbytes = float(np.sum(np.broadcast_to(sizes, (steps,))[changed]) * item_bytes(array.dtype))
    count = int(changed.sum())
    if reads:
        return dataclasses.replace(row, read_bytes=nbytes, fetches=count)
    return dataclasses.replace(row, written_bytes=nbytes, write_backs=count)


def block_indices(
    where: str, block: Any, grid: Sequence[int], prefetched: Sequence[Any]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """First element and extent of the block along each axis, for each step of the grid."""
    jaxpr, steps = block.index_map_jaxpr, math.prod(grid)
    walk = KernelWalk(where, grid, [], steps, Copies())
    refs = [
        Ref.of(f"prefetched {i}", v.aval, value) if hasattr(v.aval, "inner_aval") else value
        for i, (v, value) in enumerate(zip(jaxpr.jaxpr.invars[len(grid) :], prefetched))
    ]
    values = walk.run_closed(jaxpr, [*program_ids(grid, 0, steps), *refs])
    if not known(*values):
        raise UnknownValueError(f"{where}: the index of its block depends on values that were not given")
    indices = jax.tree.unflatten(block.index_map_out_tree, [raw(v).astype(np.int64) for v in values])
    starts, extents = [], []
    for index, dim in zip(indices, block.block_shape):
        start, extent = _placed(index, dim)
        starts.append(start)
        extents.append(extent)
    return starts, extents


def _placed(index: Any, dim: Any) -> tuple[np.ndarray, np.ndarray]:
    """First element and extent along one axis, from what the index map said of it."""
    kind = type(dim).__name__
    if hasattr(index, "size") and hasattr(index, "start"):  # BoundedSlice: the map says both
        return np.asarray(index.start), np.asarray(index.size)
    if dim is None or kind == "Squeezed":
        return index, np.ones((), np.int64)
    extent = np.asarray(getattr(dim, "block_size", dim), np.int64)
    if kind == "Element":
        return index - dim.padding[0], extent
    return index * extent, extent
