"""The collectives of a compiled program: of which kind, over which mesh axes, how often, how many bytes.

`count_collectives(compiled, mesh)` says how many of each stand in a program; `collectives(program, mesh)` is the full
list, loops' rounds included, from which `sent_bytes` sums what each device puts on the links of each mesh axis.

Bytes are those of the usual algorithms, n devices along one axis, P bytes held by each (R = n P gathered):

  all-gather            R (n - 1) / n: each piece is passed on around the ring
  reduce-scatter        the same, of its operand
  all-reduce            both, one after the other
  all-to-all            on a ring each piece goes the shorter way, through d - 1 others where it is d away:
                        P/n times the sum of distances, which is P floor(n^2/4) / n. Through a switch: P (n - 1) / n
  ragged-all-to-all     as all-to-all, of what is sent or what it lands in, whichever is less: the rows that there are
  collective-permute    P times the mean distance around the ring

Over several axes at once a gather goes axis by axis, the last one first (the pieces grow from axis to axis), a
reduce-scatter the other way round, and an all-to-all moves everything once along each axis.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from glm45_jax.plan.hlo import Computation, Instruction, Program, array_bytes, parse, text_of
from glm45_jax.plan.replica_groups import coordinates, parse_groups, parse_pairs, varying_axes

Network = Literal["torus", "switch"]
KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      axes: mesh axes over which it runs, in the mesh's order; none where every group is one device.
      group: devices of each group along each of the axes.
      bytes: of its operands on one device.
      times: how often it runs.
      hops: of a permute, the mean distance along each axis.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    bytes: float
    times: float
    name: str
    source: str = ""
    hops: tuple[float, ...] = ()

    def sent_bytes(self, network: Mapping[str, Network] | Network = "torus") -> dict[str, float]:
        """What each device puts on the links of each axis, all times it runs."""
        of_axis = (lambda a: network) if isinstance(network, str) else (lambda a: network.get(a, "torus"))
        return {axis: self.times * value for axis, value in self._once(of_axis).items()}

    def _once(self, network: Any) -> dict[str, float]:
        if self.kind == "collective-permute":
            return {a: self.bytes * h for a, h in zip(self.axes, self.hops)}
        if "all-to-all" in self.kind:
            return {a: all_to_all_bytes(self.bytes, n, network(a)) for a, n in zip(self.axes, self.group)}
        total = math.prod(self.group)
        piece = self.bytes if self.kind == "all-gather" else self.bytes / total
        ways = {"all-reduce": 2}.get(self.kind, 1)
        sent = {}
        for axis, n in reversed([*zip(self.axes, self.group)]):
            sent[axis] = ways * piece * (n - 1)
            piece *= n
        return {a: sent[a] for a in self.axes}


def all_to_all_bytes(nbytes: float, n: int, network: Network) -> float:
    """What a device that holds `nbytes` puts on the links of an axis of `n`, the pieces passed on included."""
    return nbytes * (n * n // 4) / n if network == "torus" else nbytes * (n - 1) / n


def count_collectives(compiled: Any, mesh: Any) -> dict[tuple[str, tuple[str, ...]], int]:
    """How many collectives of each kind and axes stand in a program; one in a loop is one.

    Args:
      compiled: of `jax.jit(…).lower(…).compile()`, or its text, or the StableHLO text of `….lower(…)`, in which only
        those stand that the program itself asks for (within `shard_map`).
      mesh: it was compiled for, or its sizes by name.

    >>> count_collectives(compiled, mesh)
    {('all-gather', ('fsdp',)): 3, ('all-to-all', ('expert',)): 2}
    """
    text = compiled if isinstance(compiled, str) else text_of(compiled)
    if "stablehlo." in text:
        found: Iterable[tuple[str, tuple[str, ...]]] = _stablehlo(text, sizes_of(mesh))
    else:
        program, seen, found = parse(text), set(), []
        for collective in collectives(program, mesh):
            if collective.axes and collective.name not in seen:
                seen.add(collective.name)
                found.append((collective.kind, collective.axes))
    return dict(sorted(collections.Counter(found).items()))


def sizes_of(mesh: Any) -> dict[str, int]:
    """A mesh's axes and their sizes, in order."""
    return {str(k): int(v) for k, v in (mesh if isinstance(mesh, Mapping) else mesh.shape).items()}


def collectives(program: Program, mesh: Any) -> list[Collective]:
    """Every collective of a program, with how often it runs; of the branches of a conditional all."""
    sizes = sizes_of(mesh)
    found = []
    for computation, instruction, times in program.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU's: a fusion of an all-reduce and of the part that is kept
        if kind in KINDS:
            found.append(_collective(kind, computation, instruction, times, sizes, program.partitions))
    return found


def sent_bytes(
    found: Iterable[Collective], mesh: Any, network: Mapping[str, Network] | Network = "torus"
) -> dict[str, float]:
    """Bytes that each device puts on the links of each mesh axis, axes of one device left out."""
    total = {axis: 0.0 for axis, size in sizes_of(mesh).items() if size > 1}
    for collective in found:
        for axis, value in collective.sent_bytes(network).items():
            total[axis] += value
    return total


def _collective(
    kind: str, computation: Computation, it: Instruction, times: float, sizes: dict[str, int], devices: int
) -> Collective:
    source = re.search(r'op_name="([^"]*)"', it.attributes)
    each = [array_bytes(computation.instructions[o].type) for o in it.operands]
    # what is sent and what it lands in: one of the two is a buffer of the worst case, the other the rows that there are
    nbytes = min(each[:2]) if kind == "ragged-all-to-all" else sum(each)
    told = (nbytes, times, it.name, source[1] if source else "")
    if kind == "collective-permute":
        pairs = parse_pairs(_groups_text(it, "source_target_pairs"))
        axes = varying_axes(pairs, sizes)
        return Collective(kind, axes, tuple(sizes[a] for a in axes), *told, hops=_hops(pairs, axes, sizes))
    groups = parse_groups(_groups_text(it, "replica_groups"), devices)
    axes = varying_axes(groups, sizes)
    return Collective(kind, axes, _extents(groups, axes, sizes), *told)


def _groups_text(it: Instruction, name: str) -> str:
    start = it.attributes.find(f"{name}=")
    if start < 0:
        return "{}"
    rest = it.attributes[start + len(name) + 1 :]
    if rest.startswith("{"):
        depth = np.cumsum([(c == "{") - (c == "}") for c in rest[: 1 << 20]])
        return rest[: int(np.argmin(depth > 0)) + 1]
    return rest


def _extents(groups: np.ndarray, axes: tuple[str, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    """How many places along each axis a group takes."""
    where = coordinates(groups[:1], sizes)
    return tuple(len(np.unique(where[a])) for a in axes)


def _hops(pairs: np.ndarray, axes: tuple[str, ...], sizes: dict[str, int]) -> tuple[float, ...]:
    where = coordinates(pairs, sizes)
    out = []
    for a in axes:
        out.append(mean_distance(where[a], sizes[a]))
    return tuple(out)


def mean_distance(pairs: np.ndarray, size: int) -> float:
    """Of the two places of each pair on a ring of `size`."""
    away = np.abs(pairs[:, 1] - pairs[:, 0])
    return float(np.minimum(away, size - away).mean())


# --- StableHLO -------------------------------------------------------------------------------------------------------

_STABLE = re.compile(r'"?stablehlo\.(all_gather|all_reduce|reduce_scatter|all_to_all|collective_permute)"?')
_DENSE = re.compile(r"(?:replica_groups|source_target_pairs) = dense<([^>]*)> : tensor<(\d+)x(\d+)xi64>")
_RAGGED = re.compile(r"@ragged_all_to_all")


def _stablehlo(text: str, sizes: dict[str, int]) -> list[tuple[str, tuple[str, ...]]]:
    found = []
    for line in text.splitlines():
        match, ragged = _STABLE.search(line), _RAGGED.search(line)
        dense = _DENSE.search(line)
        if dense is None or (match is None and ragged is None):
            continue
        groups = _dense(dense[1], int(dense[2]), int(dense[3]))
        axes = varying_axes(groups, sizes)
        if axes:
            found.append((match[1].replace("_", "-") if match else "ragged-all-to-all", axes))
    return found


def _dense(value: str, rows: int, columns: int) -> np.ndarray:
    """The array of a `dense<…>` attribute: numbers, one number for all, or hexadecimal bytes."""
    if value.startswith('"0x'):
        return np.frombuffer(bytes.fromhex(value[3:-1]), "<i8").reshape(rows, columns)
    numbers = [int(x) for x in re.findall(r"-?\d+", value)]
    return np.broadcast_to(np.array(numbers), (rows * columns,)).reshape(rows, columns)
