"""Reads the text of a compiled program: its computations, what calls what, and how often each loop runs.

Only what plans need: shapes, operands, attributes as text. XLA prints the same grammar for CPU, GPU and TPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

from glm45_jax.errors import UserError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|called_computations|to_apply|body|branch_computations|true_computation|false_computation)="
)
_NAMES = re.compile(r"%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def array_bytes(text: str) -> float:
    """Bytes of an array, or of all arrays of a tuple, from the text of its type."""
    total = 0.0
    for dtype, dims in _ARRAY.findall(text):
        sizes = [int(d.lstrip("<=")) for d in dims.split(",") if d]
        total += math.prod(sizes) * _bits(dtype) / 8
    return total


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+?(\d+)", dtype)  # bf16, s32, f8e4m3fn
    return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `attributes` is all that follows its operands."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    argument: str  # between the parentheses: a constant's value, a parameter's number
    attributes: str
    root: bool

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, conditions of loops and reductions' sums left out."""
        if self.opcode in ("async-update", "async-done") or self.opcode in _REDUCING:
            return ()
        found: list[str] = []
        for match in _CALLED.finditer(self.attributes):
            rest = self.attributes[match.end() :]
            inside = rest[1 : rest.index("}")] if rest.startswith("{") else rest.split(",")[0].split(" ")[0]
            found += _NAMES.findall(inside)
        return tuple(found)

    def attribute(self, name: str) -> str | None:
        """The first word of an attribute's value."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


_REDUCING = {
    "all-reduce", "all-reduce-start", "reduce-scatter", "reduce", "reduce-window", "scatter", "select-and-scatter",
    "sort", "map",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction, those that take its result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """A module's computations; `notes` says which figures are not exact."""

    computations: dict[str, Computation]
    entry: str
    partitions: int
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    def executed(self, fusions: bool = True) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction with how often it runs; one computation called twice comes twice.

        Of a conditional's branches all come, as if each were taken.

        Args:
          fusions: what stands inside of them too.
        """
        yield from self._run(_Context(self.computations[self.entry], None, None), 1.0, fusions)

    def _run(self, context: _Context, times: float, fusions: bool) -> Iterator[tuple[Computation, Instruction, float]]:
        for instruction in context.computation.instructions.values():
            yield context.computation, instruction, times
            inside = times
            if instruction.opcode == "while":
                inside = times * self.trip_count(instruction, context)
            for name in instruction.called if fusions or instruction.opcode != "fusion" else ():
                if name in self.computations:
                    yield from self._run(_Context(self.computations[name], context, instruction), inside, fusions)

    # --- loops -------------------------------------------------------------------------------------------------------

    def trip_count(self, loop: Instruction, context: _Context) -> int:
        """How often a loop's body runs: said by the compiler, else read off `i < n` in its condition; else 1 and a
        note."""
        said = _TRIPS.search(loop.attributes)
        if said:
            return int(said[1])
        count = self._counted(loop, context)
        if count is None:
            self.notes[f"the rounds of loop {loop.name} are not known: its body is counted once"] = None
            return 1
        return count

    def _counted(self, loop: Instruction, outside: _Context) -> int | None:
        condition = self.computations.get(loop.attribute("condition") or "")
        body = self.computations.get(loop.attribute("body") or "")
        if condition is None or body is None:
            return None
        inside = _Context(condition, outside, loop)
        found = self._comparison(inside)
        if found is None:
            return None
        index, limit, inclusive = found
        start = self._element(loop, index, outside)
        step = self._step(body, index)
        if limit is None or start is None or step is None:
            return None
        low, high = (start, limit) if step > 0 else (limit, start)
        return max(0, -(-(high - low + inclusive) // abs(step)))

    def _comparison(self, inside: _Context) -> tuple[int, int | None, bool] | None:
        """Of a condition `carry[index] < limit`: index, limit, whether equality goes on too."""
        test = inside.computation.root
        if test.opcode == "fusion" and test.called:
            inner = self.computations[test.called[0]]
            inside, test = _Context(inner, inside, test), inner.root
        if test.opcode != "compare" or len(test.operands) != 2:
            return None
        direction = test.attribute("direction")
        sides = [self._carried(name, inside) for name in test.operands]
        if direction in ("LT", "LE", "GT", "GE") and (sides[0] is None) != (sides[1] is None):
            counter = 0 if sides[0] is not None else 1
            limit = self._value(test.operands[1 - counter], inside)
            return sides[counter], limit, direction in ("LE", "GE")  # pyright: ignore[reportReturnType]
        if sides[0] is not None and sides[1] is not None:  # the limit is carried too, unchanged
            limit = self._value(test.operands[1], inside)
            return sides[0], limit, direction in ("LE", "GE")
        return None

    def _carried(self, name: str, context: _Context) -> int | None:
        """The place in the loop's carry that a value is."""
        it = context.computation.instructions.get(name)
        while it is not None and it.opcode in ("copy", "convert", "bitcast"):
            it = context.computation.instructions.get(it.operands[0])
        if it is None:
            return None
        if it.opcode == "get-tuple-element":
            return int(it.attribute("index") or 0)
        if it.opcode == "parameter" and context.call is not None and context.call.opcode == "fusion":
            assert context.caller is not None
            return self._carried(context.call.operands[int(it.argument)], context.caller)
        return None

    def _step(self, body: Computation, index: int) -> int | None:
        """What a round adds to a place of the carry."""
        root = body.root
        if root.opcode != "tuple" or index >= len(root.operands):
            return 1 if root.opcode != "tuple" else None
        context = _Context(body, None, None)
        it = body.instructions.get(root.operands[index])
        if it is not None and it.opcode == "fusion" and it.called:
            inner = self.computations[it.called[0]]
            context, it = _Context(inner, context, it), inner.root
        while it is not None and it.opcode in ("copy", "bitcast"):
            it = context.computation.instructions.get(it.operands[0])
        if it is None or it.opcode not in ("add", "subtract"):
            return None
        values = [self._value(name, context) for name in it.operands]
        added = next((v for v in values[::-1] if v is not None), None)
        return added if added is None or it.opcode == "add" else -added

    def _element(self, loop: Instruction, index: int, context: _Context) -> int | None:
        """The integer at a place of a loop's first carry."""
        start = context.computation.instructions.get(loop.operands[0])
        while start is not None and start.opcode in ("copy", "opt-barrier"):
            start = context.computation.instructions.get(start.operands[0])
        if start is None or start.opcode != "tuple":
            return None
        return self._value(start.operands[index], context)

    def _value(self, name: str, context: _Context | None) -> int | None:
        """A scalar integer that does not depend on the run; through calls, fusions and what loops carry unchanged.

        Of a maximum of which one side does depend on it, the other side: the least that it can be. A loop over experts'
        rounds says so how many even loads take.
        """
        it = context.computation.instructions.get(name) if context else None
        if context is None or it is None:
            return None
        if it.opcode == "constant":
            return int(it.argument) if re.fullmatch(r"-?\d+", it.argument) else None
        if it.opcode in ("copy", "convert", "bitcast", "broadcast", "reshape"):
            return self._value(it.operands[0], context)
        if it.opcode == "maximum":
            found = [v for v in (self._value(x, context) for x in it.operands) if v is not None]
            return max(found, default=None)
        if it.opcode == "fusion" and it.called and it.called[0] in self.computations:
            inner = self.computations[it.called[0]]
            return self._value(inner.root.name, _Context(inner, context, it))
        if it.opcode in ("add", "subtract", "multiply"):
            a, b = (self._value(x, context) for x in it.operands)
            return None if a is None or b is None else {"add": a + b, "subtract": a - b}.get(it.opcode, a * b)
        if it.opcode == "parameter" and context.call is not None and context.call.opcode in ("fusion", "call"):
            return self._value(context.call.operands[int(it.argument)], context.caller)
        made = context.computation.instructions.get(it.operands[0]) if it.opcode == "get-tuple-element" else None
        if made is not None and made.opcode == "fusion" and made.called and made.called[0] in self.computations:
            inner = self.computations[made.called[0]]
            result = inner.root.operands[int(it.attribute("index") or 0)] if inner.root.opcode == "tuple" else ""
            return self._value(result, _Context(inner, context, made))
        if it.opcode == "get-tuple-element" and context.call is not None and context.call.opcode == "while":
            index, body = int(it.attribute("index") or 0), self.computations.get(context.call.attribute("body") or "")
            if body is not None and context.caller is not None and self._unchanged(body, index):
                return self._element(context.call, index, context.caller)
        return None

    def _unchanged(self, body: Computation, index: int) -> bool:
        root = body.root
        it = body.instructions.get(root.operands[index]) if root.opcode == "tuple" else None
        while it is not None and it.opcode in ("copy", "bitcast"):
            it = body.instructions.get(it.operands[0])
        if it is None:
            return False
        return it.opcode == "constant" or (it.opcode == "get-tuple-element" and it.attribute("index") == str(index))


@dataclasses.dataclass(frozen=True)
class _Context:
    """A computation, and the instruction of another that called it."""

    computation: Computation
    caller: _Context | None
    call: Instruction | None


def parse(text: str) -> Program:
    """The program of an HLO module's text.

    Raises:
      UserError: it is none.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = Computation(head[2], {})
                computations[head[2]] = current
                entry = head[2] if head[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # a kernel's attributes may go over lines
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            current.instructions[instruction.name] = instruction
    if not entry:
        raise UserError("this is no text of a compiled program: no ENTRY computation in it")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.index("\n")])
    replicas = re.search(r"replica_count=(\d+)", text[: text.index("\n")])
    return Program(computations, entry, max(int(m[1]) if m else 1 for m in (partitions, replicas)))


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else _until_space(rest)
    type_, rest = rest[:end], rest[end:].lstrip()
    match = _OPCODE.match(rest)
    if match is None:
        return Instruction(name, type_, rest.split(" ")[0], (), "", "", root)
    end = _closing(rest, match.end() - 1)
    inside = re.sub(r"/\*.*?\*/", "", rest[match.end() : end - 1])
    operands = tuple(_operand(x) for x in _split(inside)) if match[1] not in ("constant", "parameter") else ()
    return Instruction(name, type_, match[1], operands, inside.strip(), rest[end:], root)


def _operand(text: str) -> str:
    """The name of an operand, whose type may stand before it."""
    return text.split(" ")[-1].lstrip("%")


def _split(text: str) -> list[str]:
    """By the commas that stand in no parentheses."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    return len(text)


def _until_space(text: str) -> int:
    space = text.find(" ")
    return len(text) if space < 0 else space


def text_of(compiled: Any) -> str:
    """The text of a compiled program, or the text itself."""
    return compiled if isinstance(compiled, str) else compiled.as_text()
