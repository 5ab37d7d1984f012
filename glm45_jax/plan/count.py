"""Counts what one device does in a program: FLOPs and bytes of memory, from the jaxpr, every loop's rounds included.

The program is walked once, as its first device runs it. Kernels are gone through step by step of their grid
(`pallas_kernels.analysis`), so that what they skip (causal blocks, experts without rows) is not counted and what they
pad is. What steers them must be known; where it depends on data, this is assumed:

  routing       balanced: a `top_k` of unknown scores takes the columns in turn, so every expert gets the same
  other devices all alike: what a collective brings from another device is what this one has
  loops         each round as the first; rounds of a scan are in the program, of a `while` read off its condition, and
                of a few rounds each is gone through
  branches      one whose condition is not known counts as its dearest branch

Inside `shard_map` shapes are one device's. Outside, where XLA divides the work, figures are divided by the number of
devices: work that XLA does on several devices over again is seen in the compiled program alone (`hlo_cost.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from glm45_jax.plan.collectives import Collective, mean_distance
from pallas_kernels.analysis.interpreter import UnknownValueError, loop_counter, scan_parts
from pallas_kernels.analysis.kernel import item_bytes
from pallas_kernels.analysis.traffic import ProgramWalk, kernel_traffic
from pallas_kernels.analysis.values import UNKNOWN, known
from pallas_kernels.analysis.xla_ops import own_traffic

_FEW_ROUNDS = 8


@dataclasses.dataclass
class Counts:
    """Of one device.

    Attributes:
      xla_flops, kernel_flops: of matrix products, recomputed ones and what kernels pad included.
      xla_bytes: an estimate, see `pallas_kernels.analysis.xla_ops`.
      kernel_bytes: that the kernels move.
      kernels: calls, FLOPs and bytes by kernel.
      saved_bytes: stacked values that one loop leaves for another: activations kept for the backward pass.
      ragged_sent, ragged_room: bytes that ragged all-to-alls send, and would if they filled the smaller buffer.
      collectives: that the program itself asks for, within `shard_map`; XLA's own are seen in the compiled one alone.
      notes: what is not exact.
    """

    xla_flops: float = 0
    xla_bytes: float = 0
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    saved_bytes: float = 0
    ragged_sent: float = 0
    ragged_room: float = 0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    @property
    def kernel_flops(self) -> float:
        return sum(k.flops for k in self.kernels.values())

    @property
    def kernel_bytes(self) -> float:
        return sum(k.bytes for k in self.kernels.values())

    @property
    def flops(self) -> float:
        return self.xla_flops + self.kernel_flops

    @property
    def bytes(self) -> float:
        return self.xla_bytes + self.kernel_bytes

    def add(self, other: Counts) -> None:
        self.xla_flops += other.xla_flops
        self.xla_bytes += other.xla_bytes
        self.saved_bytes += other.saved_bytes
        self.ragged_sent += other.ragged_sent
        self.ragged_room += other.ragged_room
        self.collectives += other.collectives
        self.notes |= other.notes
        for name, kernel in other.kernels.items():
            mine = self.kernels.setdefault(name, Kernel())
            mine.calls, mine.flops = mine.calls + kernel.calls, mine.flops + kernel.flops
            mine.bytes += kernel.bytes


@dataclasses.dataclass
class Kernel:
    """All calls of one kernel."""

    calls: float = 0
    flops: float = 0
    bytes: float = 0


def count(jaxpr: Any, values: Sequence[Any], platform: str, devices: int = 1) -> Counts:
    """What a device does in a program.

    Args:
      jaxpr: closed, traced with the mesh in force.
      values: of its arguments, one for each: arrays for what steers it, None for all else.
      platform: "tpu", "cuda" or "cpu": whose branches of `platform_dependent` are taken.
      devices: over which what stands outside `shard_map` is divided.
    """
    walk = _Count(platform, devices)
    known_values = [UNKNOWN if v is None else np.asarray(v) for v in values]
    here = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("here",))
    with jax.set_mesh(here), np.errstate(all="ignore"):  # small operations run here and now
        walk.run_closed(jaxpr, known_values)
    walk.counts.notes |= walk.notes
    return walk.counts


_KINDS = {
    "psum": "all-reduce", "psum_invariant": "all-reduce", "psum2": "all-reduce", "pmax": "all-reduce",
    "pmin": "all-reduce", "all_gather": "all-gather", "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all", "ppermute": "collective-permute",
    "ragged_all_to_all": "ragged-all-to-all",
}  # fmt: skip


class _Count(ProgramWalk):
    counted = ProgramWalk.counted | _KINDS.keys()

    def __init__(self, platform: str, devices: int) -> None:
        super().__init__(platform)
        self.devices = devices
        self.times = 1.0
        self.share = 1.0 / devices
        self.axis_sizes: dict[Any, int] = {}  # of the mesh of the `shard_map` around
        self.counts = Counts()
        alike: dict[str, Callable[..., Any]] = {
            "psum": lambda x, n, p: x * n, "psum_invariant": lambda x, n, p: x * n, "psum2": lambda x, n, p: x * n,
            "pmax": lambda x, n, p: x, "pmin": lambda x, n, p: x, "ppermute": lambda x, n, p: x,
            "all_gather": _gathered, "all_gather_invariant": _gathered,
            "reduce_scatter": _scattered, "all_to_all": _exchanged,
        }  # fmt: skip
        self.rules |= {name: self._collective(rule) for name, rule in alike.items()}
        self.rules |= {"top_k": self._top_k, "ragged_dot_general": self._ragged_dot}
        self.rules |= {"ragged_all_to_all": self._ragged}

    def run(self, jaxpr: Any, args: Sequence[Any], consts: Sequence[Any] = (), used: Sequence[bool] = ()) -> list[Any]:
        live = [step.eqn for step in self._live(jaxpr, tuple(used))]
        if not self._inside_chain:
            nbytes, flops = own_traffic(live, jaxpr.outvars)
            self.counts.xla_bytes += nbytes * self.times * self.share
            self.counts.xla_flops += flops * self.times * self.share
        self.counts.saved_bytes += _left_for_others(live) * self.share
        return super(ProgramWalk, self).run(jaxpr, args, consts, used)

    # --- kernels -----------------------------------------------------------------------------------------------------

    def _kernel(self, eqn: Any, args: list[Any]) -> list[Any]:
        try:
            traffic = kernel_traffic(eqn, args)
        except UnknownValueError as e:
            self.counts.notes[f"not counted: {e}"] = None
            return [UNKNOWN] * len(eqn.outvars)
        self.counts.notes |= dict.fromkeys(traffic.notes)
        once = Kernel(1, traffic.flops, traffic.total_bytes)
        kernel = self.counts.kernels.setdefault(traffic.name, Kernel())
        times = self.times * (self.share if self.share == 1 else 1)
        kernel.calls += times
        kernel.flops += times * once.flops
        kernel.bytes += times * once.bytes
        return [UNKNOWN] * len(eqn.outvars)

    # --- loops and branches ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _repeated(self, times: float) -> Iterator[None]:
        before = self.times
        self.times *= times
        try:
            yield
        finally:
            self.times = before

    def _scan(self, eqn: Any, args: list[Any]) -> list[Any]:
        """One round, as the first, for all."""
        p = eqn.params
        if known(*args):  # of what steers the kernels: evaluated, round by round
            self._interesting[id(p["jaxpr"])] = (p["jaxpr"], True)
            return super()._scan(eqn, args)
        consts, carry = scan_parts(p)
        first = consts + carry
        at = p["length"] - 1 if p["reverse"] else 0
        if not p["length"]:
            return [*args[consts:first], *[UNKNOWN] * (len(eqn.outvars) - carry)]
        rows = [x[at] if known(x) else UNKNOWN for x in args[first:]]
        with self._repeated(p["length"]):
            out = self.run_closed(p["jaxpr"], [*args[:first], *rows])
        stacks = [np.broadcast_to(x, (p["length"], *x.shape)) if known(x) else UNKNOWN for x in out[carry:]]
        return [*(UNKNOWN for _ in out[:carry]), *stacks]

    def _while(self, eqn: Any, args: list[Any]) -> list[Any]:
        p = eqn.params
        if known(*args):
            self._interesting[id(p["body_jaxpr"])] = (p["body_jaxpr"], True)
            return super()._while(eqn, args)
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        rounds = _rounds(p, args[:first], args[second:])
        if rounds is None:
            self.counts.notes["a loop that ends by its data is counted as one round"] = None
        if rounds is not None and rounds <= _FEW_ROUNDS:  # of experts: what a round meets differs
            consts, carry = args[first:second], args[second:]
            for _ in range(rounds):
                carry = self.run_closed(p["body_jaxpr"], [*consts, *carry])
            return carry
        with self._repeated(1 if rounds is None else rounds):
            self.run_closed(p["body_jaxpr"], args[first:])
        return [UNKNOWN] * len(eqn.outvars)

    def _every_branch(self, eqn: Any, branches: Sequence[Any], operands: list[Any]) -> list[Any]:
        total, each = self.counts, []
        for branch in branches:
            self.counts = Counts()
            self.run_closed(branch, operands)
            each.append(self.counts)
        self.counts = total
        self.counts.add(max(each, key=lambda c: (c.flops, c.bytes)))
        return [UNKNOWN] * len(eqn.outvars)

    def _shard_map(self, eqn: Any, args: list[Any]) -> list[Any]:
        before = self.share, self.axis_sizes
        self.share, self.axis_sizes = 1.0, dict(eqn.params["mesh"].shape)
        try:
            return super()._shard_map(eqn, args)
        finally:
            self.share, self.axis_sizes = before

    def _ragged_dot(self, eqn: Any, args: list[Any]) -> list[Any]:
        """The rows of its groups, where these are known; else all: each row meets one matrix."""
        lhs, out, sizes = eqn.invars[0].aval, eqn.outvars[0].aval, args[2]
        whole = 2.0 * math.prod(lhs.shape) * out.shape[-1]
        if out.ndim == 3:  # a matrix of each group: the rows are what is summed over
            whole = 2.0 * lhs.shape[0] * math.prod(out.shape[1:])
        rows = min(1.0, float(np.sum(sizes)) / lhs.shape[0]) if known(sizes) else 1.0
        self.counts.xla_flops += whole * rows * self.times * self.share
        return [UNKNOWN]

    # --- what is assumed ---------------------------------------------------------------------------------------------

    def _top_k(self, eqn: Any, args: list[Any]) -> list[Any]:
        """Balanced: of unknown scores row r has the columns from r * k on, in turn."""
        if known(*args):
            return self.bind(eqn, args)
        shape, k = eqn.outvars[1].aval.shape, eqn.outvars[1].aval.shape[-1]
        columns = eqn.invars[0].aval.shape[-1]
        rows = np.arange(math.prod(shape[:-1]))[:, None]
        indices = (rows * k + np.arange(k)) % columns
        return [UNKNOWN, indices.astype(np.int32).reshape(shape)]

    def _ragged(self, eqn: Any, args: list[Any]) -> list[Any]:
        """A buffer has room for more than is sent, and the last of several exchanges may send nothing."""
        held, into = (v.aval for v in eqn.invars[:2])
        row = math.prod(held.shape[1:]) * item_bytes(held.dtype) * self.times
        room = min(held.shape[0], into.shape[0])
        sent = min(room, int(np.sum(args[3]))) if known(args[3]) else room
        self.counts.ragged_room += row * room
        self.counts.ragged_sent += row * sent
        self._note_collective(eqn, row * sent / self.times)
        return [UNKNOWN]

    def _collective(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        def apply(eqn: Any, args: list[Any]) -> list[Any]:
            self._note_collective(eqn, sum(math.prod(v.aval.shape) * item_bytes(v.aval.dtype) for v in eqn.invars))
            n = math.prod(self.axis_sizes.get(a, 1) for a in _axes(eqn))
            outs = []
            for x, v in zip(args, eqn.outvars):
                y = rule(x, n, eqn.params) if known(x) else UNKNOWN
                outs.append(y if known(y) and y.shape == v.aval.shape else UNKNOWN)
            return outs

        return apply

    def _note_collective(self, eqn: Any, nbytes: float) -> None:
        over = _axes(eqn)
        axes = tuple(a for a, n in self.axis_sizes.items() if a in over and n > 1)  # in the mesh's order
        if not axes:
            return
        kind, group = _KINDS[eqn.primitive.name], tuple(self.axis_sizes[a] for a in axes)
        pairs = eqn.params.get("perm", ())
        hops = (mean_distance(np.asarray(pairs), group[0]),) if pairs else ()
        name = f"{eqn.primitive.name}.{len(self.counts.collectives)}"
        self.counts.collectives.append(Collective(kind, axes, group, nbytes, self.times, name, hops=hops))


def _axes(eqn: Any) -> tuple[Any, ...]:
    names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return names if isinstance(names, tuple) else (names,)


def _gathered(x: np.ndarray, n: int, p: dict[str, Any]) -> np.ndarray:
    d = p["all_gather_dimension"]
    return np.concatenate([x] * n, axis=d) if p["tiled"] else np.stack([x] * n, axis=d)


def _scattered(x: np.ndarray, n: int, p: dict[str, Any]) -> np.ndarray:
    d = p["scatter_dimension"]
    part = np.split(x * n, n, axis=d)[0]
    return part if p["tiled"] else np.squeeze(part, axis=d)


def _exchanged(x: np.ndarray, n: int, p: dict[str, Any]) -> np.ndarray:
    mine = np.split(x, n, axis=p["split_axis"])[0]
    if p.get("tiled", True):
        return np.concatenate([mine] * n, axis=p["concat_axis"])
    return np.stack([np.squeeze(mine, axis=p["split_axis"])] * n, axis=p["concat_axis"])


def _rounds(p: dict[str, Any], consts: Sequence[Any], carry: Sequence[Any]) -> int | None:
    """Of a loop `while carry[i] < limit: carry[i] += step`, where both ends are known."""
    counter = loop_counter(p)
    if counter is None:
        return None
    low, high = carry[counter.index], counter.limit([*consts, *carry])
    return max(0, -(-(int(high) - int(low)) // counter.step)) if known(low, high) else None


def _left_for_others(eqns: Sequence[Any]) -> float:
    """Bytes of the stacks that a scan of a jaxpr makes and another scan of it goes through."""
    made: set[Any] = set()
    saved: dict[Any, float] = {}
    for eqn in eqns:
        if eqn.primitive.name == "scan":
            consts, carry = scan_parts(eqn.params)
            for v in eqn.invars[consts + carry :]:
                if not hasattr(v, "val") and v in made:
                    saved[v] = math.prod(v.aval.shape) * item_bytes(v.aval.dtype)
            made |= set(eqn.outvars[carry:])
    return sum(saved.values())
