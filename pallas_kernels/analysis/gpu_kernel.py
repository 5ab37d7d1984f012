"""Walks a Pallas Mosaic GPU kernel: the products of its warpgroups, and what its copies move from and to main memory.

Every warpgroup of every block is a lane of one walk (`KernelWalk`), and so are the rounds of its inner loops. What
several blocks load is counted once, as if the L2 cache kept it for them: these kernels order their tiles so that it
mostly does. A part that the blocks of a cluster fetch for one another is each block's share. Stores of less than a
whole buffer count what lies inside the array.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pallas_kernels.analysis.interpreter import Step, UnknownValueError, loop_counter
from pallas_kernels.analysis.kernel import Copies, KernelWalk, Ref, item_bytes
from pallas_kernels.analysis.values import UNKNOWN, Lanes, known, raw

_PLACES_KEPT = 1 << 20  # before those that are the same are dropped


class GpuKernelWalk(KernelWalk):
    counted = frozenset({"copy_gmem_to_smem", "copy_smem_to_gmem", "wgmma_ref", "dot_general"})

    def __init__(self, where: str, axes: dict[str, int], totals: Copies) -> None:
        """`axes`: the size of each named axis of blocks, clusters and warpgroups."""
        num_lanes = math.prod(axes.values())
        super().__init__(where, list(axes.values()), [], num_lanes, totals)
        places = np.unravel_index(np.arange(num_lanes), tuple(axes.values()))
        self.axes = axes
        self.place = {name: np.asarray(i, np.int32) for name, i in zip(axes, places)}
        self.loaded: dict[tuple[str, float], list[np.ndarray]] = collections.defaultdict(list)
        self.rules |= {
            "axis_index": lambda eqn, args: [Lanes(self.place[eqn.params["axis_name"]])],
            "copy_gmem_to_smem": self._load,
            "copy_smem_to_gmem": self._store_out,
            "wgmma_ref": self._multiply,
        }

    def is_counted(self, eqn: Any) -> bool:
        return eqn.primitive.name in self.counted

    def equation(self, step: Step, args: list[Any]) -> list[Any]:
        if step.rule is None and step.call is None and not step.wanted:  # barriers, fences, registers
            return []
        return super().equation(step, args)

    def _while(self, eqn: Any, args: list[Any]) -> list[Any]:
        """All rounds of a loop that does nothing but count are lanes of one walk through its body."""
        p = eqn.params
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        consts, carry, counter = args[first:second], args[second:], loop_counter(p)
        body = p["body_jaxpr"].jaxpr
        kept = [new is old for new, old in zip(body.outvars, body.invars[p["body_nconsts"] :])]
        if counter is None or any(known(x) and not k for x, k in _without(counter.index, carry, kept)):
            return super()._while(eqn, args)
        ends = carry[counter.index], counter.limit([*args[:first], *carry])
        if not known(*ends):
            return super()._while(eqn, args)
        low, high = (np.broadcast_to(raw(x), self.active.shape).astype(np.int64) for x in ends)
        rounds = np.where(self.active, np.maximum(-(-(high - low) // counter.step), 0), 0)
        if rounds.any():
            lane = np.repeat(np.arange(len(rounds)), rounds)
            number = np.arange(len(lane)) - np.repeat(np.cumsum(rounds) - rounds, rounds)
            values = [Lanes(x.array[lane]) if isinstance(x, Lanes) else x for x in (*consts, *carry)]
            values[len(consts) + counter.index] = Lanes((low[lane] + number * counter.step).astype(np.int32))
            with self._lanes(lane):
                self.run_closed(p["body_jaxpr"], values)
        after = [x if k else UNKNOWN for x, k in zip(carry, kept)]
        after[counter.index] = Lanes((low + rounds * counter.step).astype(np.int32))
        return after

    @contextlib.contextmanager
    def _lanes(self, of: np.ndarray) -> Iterator[None]:
        """Inside there is a lane for each entry of `of`, a copy of that lane."""
        before = self.active, self.place
        self.active = np.ones(len(of), bool)
        self.place = {axis: at[of] for axis, at in self.place.items()}
        try:
            yield
        finally:
            self.active, self.place = before

    def _run_scoped(self, eqn: Any, args: list[Any]) -> list[Any]:
        jaxpr = eqn.params["jaxpr"]
        return self.run(jaxpr, [Ref(f"scratch {i}", v.aval) for i, v in enumerate(jaxpr.invars)], args)

    def finish(self) -> None:
        """Adds what was loaded, each place once, to the totals."""
        for (name, nbytes), places in self.loaded.items():
            self.totals.read[name] += nbytes * len(np.unique(np.concatenate(places)))

    def _multiply(self, eqn: Any, args: list[Any]) -> list[Any]:
        """An accumulator [M, N] gains [M, K] times [K, N]; K is what the left side has beside M."""
        rows, columns = _shape(eqn, "acc")
        contracted = _shape(eqn, "a")[1]
        self.totals.flops += 2.0 * rows * columns * contracted * int(self.active.sum())
        return []

    def _load(self, eqn: Any, args: list[Any]) -> list[Any]:
        ref, tree = args[0], eqn.params["src_transforms_treedef"]
        starts, sizes = self._region(ref, tree.unflatten(args[3 : 3 + tree.num_leaves]))
        together = math.prod(self.axes.get(a, 1) for a in eqn.params["collective_axes"] or ())
        place = np.zeros(len(self.active), np.int64)
        for start, size in zip(starts, ref.aval.shape):
            place = place * size + start
        nbytes = math.prod(sizes) * item_bytes(ref.aval.dtype) / together
        if together > 1:  # each block of a cluster fetches another part of the same place
            for axis in eqn.params["collective_axes"]:
                place = place * self.axes[axis] + self.place[axis]
        self.totals.started += int(self.active.sum())
        found = self.loaded[ref.name, nbytes]
        found.append(np.unique(place[self.active]))
        if sum(map(len, found)) > _PLACES_KEPT:
            found[:] = [np.unique(np.concatenate(found))]
        return []

    def _store_out(self, eqn: Any, args: list[Any]) -> list[Any]:
        ref, (left, tree) = args[1], (eqn.params[f"{x}_transforms_treedef"] for x in ("src", "dst"))
        first = 2 + left.num_leaves
        starts, sizes = self._region(ref, tree.unflatten(args[first : first + tree.num_leaves]))
        inside = np.ones(len(self.active), np.int64)
        for start, size, whole in zip(starts, sizes, ref.aval.shape):
            inside = inside * np.clip(whole - start, 0, size)
        self.totals.started += int(self.active.sum())
        self.totals.written[ref.name] += float(inside[self.active].sum()) * item_bytes(ref.aval.dtype)
        return []

    def _region(self, ref: Ref, transforms: Sequence[Any]) -> tuple[list[Any], list[int]]:
        """First element and extent along each axis of the array, one for each lane where they differ."""
        starts: list[Any] = [np.int64(0)] * len(ref.aval.shape)
        sizes = list(ref.aval.shape)
        kept = list(range(len(sizes)))
        for transform in transforms:
            for axis, index in zip(list(kept), transform.indices):
                begin = getattr(index, "start", index)
                if not isinstance(begin, int) and not known(begin):
                    raise UnknownValueError(f"{self.where}: where it copies depends on values that were not given")
                starts[axis] = starts[axis] + np.asarray(raw(begin), np.int64)
                if hasattr(index, "size") and hasattr(index, "start"):
                    sizes[axis] = index.size
                else:
                    sizes[axis] = 1
                    kept.remove(axis)
        return starts, sizes


def _without(index: int, *lists: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """The lists side by side, but for one place."""
    return (items for i, items in enumerate(zip(*lists)) if i != index)


def _shape(eqn: Any, operand: str) -> list[int]:
    """Of an operand ("acc", "a" or "b") of a product, as far as it is cut out and turned around."""
    names = ("acc", "a", "b")
    trees = [eqn.params[f"{name}_transforms_tree"] for name in names]
    number = names.index(operand)
    first = 3 + sum(tree.num_leaves for tree in trees[:number] if tree is not None)
    shape = list(eqn.invars[number].aval.shape)
    tree = trees[number]
    for transform in () if tree is None else tree.unflatten(eqn.invars[first : first + tree.num_leaves]):
        if hasattr(transform, "indices"):
            shape = [i.size for i in transform.indices if hasattr(i, "size") and hasattr(i, "start")]
        elif hasattr(transform, "permutation"):
            shape = [shape[axis] for axis in transform.permutation]
    return shape
