"""Walks the inside of a TPU kernel: the copies that it starts itself and the matrix products that it does.

Scalars are evaluated (program ids, prefetched arrays, loop counters, SMEM), vectors are not; so a kernel of real size
is walked in seconds, without its data. All steps of the grid are walked at once where no step depends on what an
earlier one left in SMEM, else one after another.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.analysis.interpreter import Interpreter, Step, UnknownValueError, equations
from pallas_kernels.analysis.values import UNKNOWN, Lanes, known, raw

_FAR = ("hbm", "any", "gmem", "host")
_WRITES = ("swap", "addupdate", "masked_swap")
_PRODUCTS = ("dot_general",)
_CHUNK = 1 << 16  # grid steps walked at once


def item_bytes(dtype: Any) -> float:
    """Bytes of one element; half a byte for int4."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return 1
    bits = (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits
    return bits / 8


def memory_space(aval: Any) -> str:
    """In lower case; "vmem" for a block without one of its own."""
    space = str(getattr(aval, "memory_space", None) or "vmem").lower().rsplit(".", 1)[-1]
    return {"default": "vmem", "none": "vmem"}.get(space, space)


def is_far(aval: Any) -> bool:
    """Whether a reference is to the device's main memory, which a kernel reaches by copies of its own."""
    return memory_space(aval) in _FAR


@dataclasses.dataclass(eq=False)
class Ref:
    """A reference as the walk knows it; only what lies in SMEM has contents worth knowing."""

    name: str
    aval: Any
    contents: Any = None  # an array, or None
    valid: Any = None  # which of the contents are known

    @staticmethod
    def of(name: str, aval: Any, value: Any = UNKNOWN) -> Ref:
        if known(value):
            return Ref(name, aval, np.array(value), np.ones(np.shape(value), bool))
        if memory_space(aval) == "smem" and math.prod(aval.shape) <= 1 << 22:
            return Ref(name, aval, np.zeros(aval.shape, aval.dtype), np.zeros(aval.shape, bool))
        return Ref(name, aval)


def _zeros() -> collections.defaultdict[str, float]:
    return collections.defaultdict(float)


@dataclasses.dataclass
class Copies:
    """Bytes that a kernel's own copies move between main memory and the chip, by what they read or write."""

    read: collections.defaultdict[str, float] = dataclasses.field(default_factory=_zeros)
    written: collections.defaultdict[str, float] = dataclasses.field(default_factory=_zeros)
    started: int = 0
    flops: float = 0


class KernelWalk(Interpreter):
    max_elements = 1024
    counted = frozenset({"dma_start", *_PRODUCTS})

    def __init__(self, where: str, grid: Sequence[int], ids: Sequence[Any], lanes: int, totals: Copies) -> None:
        super().__init__("tpu", lanes)
        self.where, self.grid, self.ids, self.totals = where, grid, ids, totals
        self.rules |= {
            "program_id": lambda eqn, args: [self.ids[eqn.params["axis"]]],
            "num_programs": lambda eqn, args: [np.int32(self.grid[eqn.params["axis"]])],
            "get": self._get,
            "swap": self._swap,
            "addupdate": self._forget,
            "masked_swap": self._forget,
            "run_scoped": self._run_scoped,
            "dma_start": self._dma_start,
            "dot_general": self._dot_general,
        }

    def is_counted(self, eqn: Any) -> bool:
        return super().is_counted(eqn) or (eqn.primitive.name in _WRITES and memory_space(eqn.invars[0].aval) == "smem")

    def equation(self, step: Step, args: list[Any]) -> list[Any]:
        if step.large and step.rule is None and step.call is None and any(isinstance(a, Lanes) for a in args):
            return [UNKNOWN] * len(step.wanted)
        return super().equation(step, args)

    # --- references --------------------------------------------------------------------------------------------------

    def _run_scoped(self, eqn: Any, args: list[Any]) -> list[Any]:
        jaxpr = eqn.params["jaxpr"]
        scratch = [Ref.of(f"scratch {v.aval.shape}", v.aval) for v in jaxpr.invars]
        return self.run(jaxpr, scratch, args)

    def _get(self, eqn: Any, args: list[Any]) -> list[Any]:
        ref, transforms = args[0], jax.tree.unflatten(eqn.params["tree"], args[1:])
        if not isinstance(ref, Ref) or ref.contents is None:
            return [UNKNOWN]
        where = index_of(transforms)
        if where is None:
            return [UNKNOWN]
        some = any(isinstance(i, Lanes) for i in where)
        if some and not all(known(i) for i in where):
            return [UNKNOWN]
        index = tuple(_inside(i, n) for i, n in zip(where, ref.contents.shape or (1,)))
        valid = ref.valid[index]
        if not (valid[self.active] if some else valid).all():
            return [UNKNOWN]
        value = ref.contents[index]
        return [Lanes(value) if some else np.asarray(value)]

    def _swap(self, eqn: Any, args: list[Any]) -> list[Any]:
        ref, value, transforms = args[0], args[1], jax.tree.unflatten(eqn.params["tree"], args[2:])
        if not isinstance(ref, Ref) or ref.contents is None:
            return [UNKNOWN]
        (old,) = self._get_plain(ref, transforms)
        self._store(ref, transforms, value)
        return [old]

    def _get_plain(self, ref: Ref, transforms: Any) -> list[Any]:
        where = index_of(transforms)
        if where is None or any(isinstance(i, Lanes) for i in where) or not ref.valid[where].all():
            return [UNKNOWN]
        return [np.asarray(ref.contents[where])]

    def _store(self, ref: Ref, transforms: Any, value: Any) -> None:
        where = index_of(transforms)
        if where is None or any(isinstance(i, Lanes) for i in where):
            ref.valid[...] = False
        elif self.uncertain or not known(value) or isinstance(value, Lanes):
            ref.valid[where] = False
        else:
            ref.contents[where], ref.valid[where] = value, True

    def _forget(self, eqn: Any, args: list[Any]) -> list[Any]:
        if isinstance(args[0], Ref) and args[0].valid is not None:
            args[0].valid[...] = False
        return [UNKNOWN] * len(eqn.outvars)

    # --- what is counted ---------------------------------------------------------------------------------------------

    def _dma_start(self, eqn: Any, args: list[Any]) -> list[Any]:
        avals = eqn.params["tree"].unflatten([v.aval for v in eqn.invars])
        source, target = eqn.params["tree"].unflatten(args)[:2]
        nbytes = self._extent(avals[0], source) * item_bytes(avals[0].dtype)
        total = float(np.sum(np.broadcast_to(nbytes, self.active.shape)[self.active]))
        self.totals.started += int(self.active.sum())
        source_ref, target_ref = getattr(source, "ref", source), getattr(target, "ref", target)
        if is_far(source_ref.aval):
            self.totals.read[source_ref.name] += total
        if is_far(target_ref.aval):
            self.totals.written[target_ref.name] += total
        if len(avals) > 4 and avals[4] is not None:
            self.note("copies to other devices are counted as copies within this one")
        if target_ref.contents is not None:
            value = UNKNOWN
            if source_ref.contents is not None and self.lanes == 1:
                (value,) = self._get_plain(source_ref, getattr(source, "transforms", ()))
            self._store(target_ref, getattr(target, "transforms", ()), value)
        return []

    def _extent(self, aval: Any, ref: Any) -> Any:
        """Elements of a reference; an array, one for each lane, where its size is computed."""
        if all(isinstance(d, int) for d in aval.shape):
            return math.prod(aval.shape)
        indexers = [t for t in ref.transforms if hasattr(t, "indices")]
        sizes = [i.size for i in indexers[-1].indices if hasattr(i, "size") and hasattr(i, "stride")]
        if not all(isinstance(s, int) or known(s) for s in sizes):
            raise UnknownValueError(f"{self.where}: the size of a copy depends on values that were not given")
        return math.prod(np.maximum(raw(s), 0).astype(np.int64) for s in sizes)

    def _dot_general(self, eqn: Any, args: list[Any]) -> list[Any]:
        self.totals.flops += dot_flops(eqn) * int(self.active.sum())
        return [UNKNOWN]


def dot_flops(eqn: Any) -> float:
    """Of one matrix product, a multiplication and an addition counted as two."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracted)


def index_of(transforms: Any) -> tuple[Any, ...] | None:
    """The NumPy index that one indexer means; None where it isn't that simple."""
    if isinstance(transforms, tuple | list) and not transforms:
        return (...,)
    if len(transforms) != 1 or not hasattr(transforms[0], "indices"):
        return None
    index: list[Any] = []
    for i in transforms[0].indices:
        if hasattr(i, "stride"):
            if not all(isinstance(x, int) or (known(x) and not isinstance(x, Lanes)) for x in (i.start, i.size)):
                return None
            index.append(slice(int(i.start), int(i.start) + int(i.size) * i.stride, i.stride))
        elif isinstance(i, int) or known(i):
            index.append(np.asarray(i) if isinstance(i, int) else i)
        else:
            return None
    return tuple(index)


def _inside(index: Any, size: int) -> Any:
    """An index moved into the array: that of a lane which isn't active may be anything."""
    if isinstance(index, Lanes):
        return np.clip(index.array, 0, size - 1)
    return index if isinstance(index, slice) or index is ... else min(max(int(index), 0), size - 1)


def in_order(jaxpr: Any) -> bool:
    """Whether a step may depend on what an earlier one left in SMEM."""
    for eqn in equations(jaxpr):
        refs = [v.aval for v in eqn.invars if hasattr(v.aval, "memory_space") and hasattr(v.aval, "inner_aval")]
        if eqn.primitive.name in _WRITES and memory_space(refs[0]) == "smem":
            return True
        if eqn.primitive.name == "dma_start" and any(memory_space(a) == "smem" for a in refs):
            return True
    return False


def walk_kernel(
    where: str, jaxpr: Any, names: Sequence[str], values: Mapping[int, Any], grid: Sequence[int]
) -> tuple[Copies, list[str]]:
    """What the kernel's own copies move and how many FLOPs its products are, over all steps of the grid.

    Args:
      names: of the kernel's arguments.
      values: of those arguments that are known, by position.
      grid: its sizes.

    Returns: the totals, and notes on what isn't exact.
    """
    totals, notes = Copies(), {}
    if not any(eqn.primitive.name in KernelWalk.counted for eqn in equations(jaxpr)):
        return totals, []
    steps = math.prod(grid)
    chunk = 1 if in_order(jaxpr) else min(_CHUNK, max(1, steps))
    refs = [Ref.of(name, v.aval, values.get(i, UNKNOWN)) for i, (name, v) in enumerate(zip(names, jaxpr.invars))]
    walk = None
    for start in range(0, steps, chunk):
        lanes = min(chunk, steps - start)
        ids = program_ids(grid, start, lanes)
        if walk is None or walk.lanes != lanes:
            walk = KernelWalk(where, grid, ids, lanes, totals)
        walk.ids = ids
        walk.run(jaxpr, refs)
        notes |= walk.notes
    return totals, list(notes)


def program_ids(grid: Sequence[int], start: int, lanes: int) -> list[Any]:
    """The ids of `lanes` steps from `start` on, one for each axis of the grid, the last axis fastest."""
    ids = np.unravel_index(np.arange(start, start + lanes), grid) if len(grid) else []
    ids = [np.asarray(i, np.int32) for i in ids]
    return [i[0] for i in ids] if lanes == 1 else [Lanes(i) for i in ids]
