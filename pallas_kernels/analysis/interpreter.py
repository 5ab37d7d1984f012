"""Walks a jaxpr with some of its values known: evaluates what it can, follows every call, loop and branch taken.

What a walk is for (counting bytes, finding kernels) is added by subclasses as rules for primitives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.analysis.values import UNKNOWN, Lanes, evaluate, known, raw

# Primitives whose result no walk on one device can know.
_COLLECTIVES = {
    "psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "reduce_scatter",
    "ragged_all_to_all", "all_gather_invariant",
}  # fmt: skip


class UnknownValueError(ValueError):
    """Something that has to be known to go on depends on values that were not given."""


def sub_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters, opened."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") and hasattr(item, "invars"):
                found.append(item.jaxpr if hasattr(item, "consts") else item)
            elif hasattr(item, "jaxpr") and hasattr(item, "consts"):
                found.append(item.jaxpr)
    return found


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those inside of others too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in sub_jaxprs(eqn):
            yield from equations(inner)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """An equation, with what of it need be found out only once.

    Attributes:
      wanted: which of its results somebody needs.
      inputs: (variable, None) or (None, literal value).
      rule: what the walk does with it; `call`: the jaxpr that it calls; else it is evaluated, where `knowable`.
      large: a result has more than one element.
    """

    eqn: Any
    name: str
    wanted: tuple[bool, ...]
    inputs: tuple[tuple[Any, Any], ...]
    rule: Callable[..., Any] | None
    call: Any
    knowable: bool
    large: bool


class Interpreter:
    """One walk. `lanes` many executions at once where given, of which those in `active` count."""

    max_elements = 1 << 22  # of a value that is worth knowing
    counted: frozenset[str] = frozenset()  # primitives for whose sake the inside of a loop or branch is walked

    def __init__(self, platform: str, lanes: int | None = None) -> None:
        self.platform = platform
        self.lanes = lanes
        self.active = np.ones(lanes or 1, bool)
        self.notes: dict[str, None] = {}  # in the order met
        self.where = "the program"
        self.uncertain = 0  # how many branches deep that may not be taken
        self._interesting: dict[int, tuple[Any, bool]] = {}
        self._steps: dict[Any, tuple[Any, list[Step]]] = {}
        self.rules: dict[str, Callable[..., Any]] = {
            "cond": self._cond,
            "while": self._while,
            "scan": self._scan,
            "shard_map": self._shard_map,
            "platform_index": self._platform_index,
            "axis_index": lambda eqn, args: [np.int32(0)],
        }

    # --- the walk ----------------------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, args: Sequence[Any], consts: Sequence[Any] = (), used: Sequence[bool] = ()) -> list[Any]:
        """The values of the results.

        Args:
          used: which of the results somebody wants; all, where it is empty. What only the others need is left out, as
            the compiler leaves it out.
        """
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
        for step in self._live(jaxpr, tuple(used)):
            values = self.equation(step, [x if v is None else env.get(v, UNKNOWN) for v, x in step.inputs])
            env.update(zip(step.eqn.outvars, values))
        return [_literal(v) if hasattr(v, "val") else env.get(v, UNKNOWN) for v in jaxpr.outvars]

    def run_closed(self, jaxpr: Any, args: Sequence[Any], used: Sequence[bool] = ()) -> list[Any]:
        if not hasattr(jaxpr, "consts"):
            return self.run(jaxpr, args, used=used)
        return self.run(jaxpr.jaxpr, args, [self.constant(c) for c in jaxpr.consts], used)

    def _live(self, jaxpr: Any, used: tuple[bool, ...]) -> list[Step]:
        """The equations that the results in `used` need."""
        key = (id(jaxpr), used)
        if key not in self._steps:
            results = zip(jaxpr.outvars, used or (True,) * len(jaxpr.outvars))
            needed = {v for v, u in results if u and not hasattr(v, "val")}
            live = []
            for eqn in reversed(jaxpr.eqns):
                wanted = tuple(v in needed for v in eqn.outvars)
                if any(wanted) or eqn.effects:
                    live.append(self._step(eqn, wanted))
                    needed |= {v for v in eqn.invars if not hasattr(v, "val")}
            self._steps[key] = (jaxpr, live[::-1])  # the jaxpr is kept: its id stays its own
        return self._steps[key][1]

    def _step(self, eqn: Any, wanted: tuple[bool, ...]) -> Step:
        inputs = tuple((None, _literal(v)) if hasattr(v, "val") else (v, None) for v in eqn.invars)
        sizes = [math.prod(getattr(v.aval, "shape", (self.max_elements + 1,))) for v in eqn.outvars]
        inner = sub_jaxprs(eqn)
        closed = None
        if len(inner) == 1 and len(inner[0].invars) == len(eqn.invars):  # jit, custom_vjp, remat, custom_vmap, ...
            (closed,) = [v for v in eqn.params.values() if getattr(v, "jaxpr", v) is inner[0] or v is inner[0]]
        name = eqn.primitive.name
        counts = name in _COLLECTIVES or any(map(self.interesting, inner))
        knowable = not counts and all(n <= self.max_elements for n in sizes)
        return Step(eqn, name, wanted, inputs, self.rules.get(name), closed, knowable, any(n > 1 for n in sizes))

    def constant(self, value: Any) -> Any:
        """A concrete value as this walk knows it."""
        shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
        if isinstance(dtype, np.dtype | None) and math.prod(shape) <= self.max_elements:
            return np.asarray(value)
        return UNKNOWN

    def equation(self, step: Step, args: list[Any]) -> list[Any]:
        eqn = step.eqn
        if step.rule is not None:
            return step.rule(eqn, args)
        if step.call is not None:
            return self.run_closed(step.call, args, step.wanted if any(step.wanted) else ())
        if not step.knowable or not known(*args):
            return [UNKNOWN] * len(eqn.outvars)
        if len(eqn.outvars) == 1:
            out = evaluate(step.name, eqn.params, args, eqn.outvars[0].aval.shape)
            if out is not None:
                return [out]
        return self.bind(eqn, args)

    def bind(self, eqn: Any, args: Sequence[Any]) -> list[Any]:
        """Runs the primitive itself on the CPU; what cannot run there is not known."""
        call = lambda *xs: eqn.primitive.bind(*xs, **eqn.params)  # noqa: E731
        some = any(isinstance(a, Lanes) for a in args)
        if some:
            call = jax.vmap(call, in_axes=[0 if isinstance(a, Lanes) else None for a in args])
        try:
            with jax.default_device(jax.devices("cpu")[0]):
                out = call(*map(raw, args))
        except (NotImplementedError, TypeError, ValueError):
            return [UNKNOWN] * len(eqn.outvars)
        outs = list(out) if eqn.primitive.multiple_results else [out]
        return [Lanes(np.asarray(x)) if some else self.constant(x) for x in outs]

    def interesting(self, jaxpr: Any) -> bool:
        """Whether something is counted inside."""
        key = id(jaxpr)
        if key not in self._interesting:
            found = any(self.is_counted(eqn) for eqn in equations(getattr(jaxpr, "jaxpr", jaxpr)))
            self._interesting[key] = (jaxpr, found)  # the jaxpr is kept: its id stays its own
        return self._interesting[key][1]

    def is_counted(self, eqn: Any) -> bool:
        return eqn.primitive.name in self.counted

    @contextlib.contextmanager
    def only(self, mask: np.ndarray) -> Iterator[None]:
        """Only these lanes, of those that are active, count inside."""
        before = self.active
        self.active = before & mask
        try:
            yield
        finally:
            self.active = before

    def note(self, text: str) -> None:
        self.notes[f"{self.where}: {text}"] = None

    # --- control flow ------------------------------------------------------------------------------------------------

    def _platform_index(self, eqn: Any, args: list[Any]) -> list[Any]:
        platforms = eqn.params["platforms"]
        for i, names in enumerate(platforms):
            if names is not None and self.platform in names:
                return [np.int32(i)]
        return [np.int32(platforms.index(None))]

    def _cond(self, eqn: Any, args: list[Any]) -> list[Any]:
        branches, (index, *operands) = eqn.params["branches"], args
        if known(index) and not isinstance(index, Lanes):
            return self.run_closed(branches[int(np.clip(index, 0, len(branches) - 1))], operands)
        if not known(index):
            return self._every_branch(eqn, branches, operands)
        chosen = np.clip(index.array, 0, len(branches) - 1)
        merged: list[Any] | None = None
        for i, branch in enumerate(branches):
            mine = chosen == i
            if not (mine & self.active).any():
                continue
            with self.only(mine):
                out = self.run_closed(branch, operands)
            merged = out if merged is None else [_merge(mine, a, b) for a, b in zip(out, merged)]
        return merged if merged is not None else [UNKNOWN] * len(eqn.outvars)

    def _every_branch(self, eqn: Any, branches: Sequence[Any], operands: list[Any]) -> list[Any]:
        inside = [b for b in branches if self.interesting(b)]
        if inside:
            self.note("a branch that depends on values not given is counted as taken; its figures are upper bounds")
        self.uncertain += 1
        for branch in inside:
            self.run_closed(branch, operands)
        self.uncertain -= 1
        return [UNKNOWN] * len(eqn.outvars)

    def _while(self, eqn: Any, args: list[Any]) -> list[Any]:
        p = eqn.params
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        cond_consts, body_consts, carry = args[:first], args[first:second], args[second:]
        has_refs = any(not known(a) and a is not UNKNOWN for a in args)
        if not self.interesting(p["body_jaxpr"]) and not has_refs:
            return self._opaque(eqn, args)
        while True:
            (go_on,) = self.run_closed(p["cond_jaxpr"], [*cond_consts, *carry])
            if not known(go_on):
                return self._endless(eqn, [*body_consts, *carry])
            if not isinstance(go_on, Lanes):
                if not go_on:
                    return carry
                carry = self.run_closed(p["body_jaxpr"], [*body_consts, *carry])
                continue
            live = go_on.array.astype(bool)
            if not (live & self.active).any():
                return carry
            with self.only(live):
                new = self.run_closed(p["body_jaxpr"], [*body_consts, *carry])
            carry = [_merge(live, a, b) for a, b in zip(new, carry)]

    def _endless(self, eqn: Any, args: list[Any]) -> list[Any]:
        """A loop of which nobody knows how often it runs."""
        if self.interesting(eqn.params["body_jaxpr"]):
            raise UnknownValueError(
                f"{self.where}: the number of rounds of a loop depends on values that were not given; "
                "give the small arrays that steer it (group sizes, indices, lengths) as concrete arrays"
            )
        return [UNKNOWN] * len(eqn.outvars)

    def _scan(self, eqn: Any, args: list[Any]) -> list[Any]:
        p = eqn.params
        body, length = p["jaxpr"], p["length"]
        num_consts, num_carry = scan_parts(p)
        has_refs = any(not known(a) and a is not UNKNOWN for a in args)
        if not self.interesting(body) and not has_refs:
            return self._opaque(eqn, args)
        consts, carry, xs = args[:num_consts], args[num_consts : num_consts + num_carry], args[num_consts + num_carry :]
        columns: list[list[Any]] = []
        for i in range(length)[:: -1 if p["reverse"] else 1]:
            out = self.run_closed(body, [*consts, *carry, *(_row(x, i) for x in xs)])
            carry = out[:num_carry]
            columns.append(out[num_carry:])
        columns = columns[:: -1 if p["reverse"] else 1]
        ys = [np.stack(c) if known(*c) and not any(isinstance(v, Lanes) for v in c) else UNKNOWN for c in zip(*columns)]
        return [*carry, *(ys or [UNKNOWN] * (len(eqn.outvars) - num_carry))]

    def _opaque(self, eqn: Any, args: list[Any]) -> list[Any]:
        """A loop in which nothing is counted: run whole if everything about it is known."""
        small = all(math.prod(v.aval.shape) <= self.max_elements for v in eqn.outvars)
        return self.bind(eqn, args) if small and known(*args) else [UNKNOWN] * len(eqn.outvars)

    def _shard_map(self, eqn: Any, args: list[Any]) -> list[Any]:
        """The first device of the mesh."""
        sizes = dict(eqn.params["mesh"].shape)
        mine = [_shard(a, spec, sizes) for a, spec in zip(args, eqn.params["in_specs"])]
        self.run_closed(eqn.params["jaxpr"], mine)
        return [UNKNOWN] * len(eqn.outvars)


@dataclasses.dataclass(frozen=True)
class Counter:
    """Of a loop `while carry[index] < limit: carry[index] += step`.

    Attributes:
      place: of the limit among the condition's constants and the carry; None where it is `value`.
    """

    index: int
    step: int
    place: int | None
    value: Any = None

    def limit(self, inputs: Sequence[Any]) -> Any:
        """Given the condition's constants and the carry."""
        return self.value if self.place is None else inputs[self.place]


def loop_counter(params: dict[str, Any]) -> Counter | None:
    """Of a `while` with such a condition and nothing else."""
    condition, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    tests = [e for e in condition.eqns if e.outvars[0] in condition.outvars]
    if len(tests) != 1 or tests[0].primitive.name not in ("lt", "gt"):
        return None
    same = {e.outvars[0]: e.invars[0] for e in condition.eqns if e.primitive.name in ("convert_element_type", "pvary")}
    sides = [v if hasattr(v, "val") else same.get(v, v) for v in tests[0].invars]
    counted, limit = sides if tests[0].primitive.name == "lt" else sides[::-1]
    places = {v: i for i, v in enumerate(condition.invars)}
    index = places.get(counted, -1) - params["cond_nconsts"] if not hasattr(counted, "val") else -1
    literal = hasattr(limit, "val")
    if index < 0 or not (literal or limit in places):
        return None
    out = body.outvars[index]
    step = next((e for e in body.eqns if e.outvars[0] is out and e.primitive.name == "add"), None)
    if step is None or body.invars[params["body_nconsts"] + index] not in step.invars:
        return None
    added = next((int(v.val) for v in step.invars if hasattr(v, "val")), 0)
    if added <= 0:
        return None
    return Counter(index, added, None, np.asarray(limit.val)) if literal else Counter(index, added, places[limit])


def scan_parts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants and how many are carried; said differently from JAX 0.11 on."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _literal(v: Any) -> Any:
    return np.asarray(v.val, v.aval.dtype) if isinstance(v.aval.dtype, np.dtype) else UNKNOWN


def _merge(mine: np.ndarray, new: Any, old: Any) -> Any:
    """`new` in the lanes that are `mine`, `old` in the others."""
    if new is old:
        return new
    if not known(new, old):
        return UNKNOWN
    a, b = raw(new), raw(old)
    rank = max(a.ndim - isinstance(new, Lanes), b.ndim - isinstance(old, Lanes))
    return Lanes(np.where(mine.reshape(-1, *(1,) * rank), a, b))


def _row(x: Any, i: int) -> Any:
    if isinstance(x, Lanes):
        return Lanes(x.array[:, i])
    return x[i] if known(x) else UNKNOWN


def _shard(x: Any, spec: Any, sizes: dict[Any, int]) -> Any:
    """The first device's part of a known value."""
    if not known(x):
        return x
    for axis, names in enumerate(spec):
        for name in () if names is None else names if isinstance(names, tuple) else (names,):
            x = np.split(x, sizes[name], axis)[0]
    return x
