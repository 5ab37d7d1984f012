"""Reading a request's body: strict JSON, and fields of stated types and ranges."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from glm45_jax.serve.errors import refused
from glm45_jax.serve.options import MAX_DEPTH


def read_json(body: bytes) -> dict[str, Any]:
    """The object that `body` holds.

    Raises:
      ApiError: no JSON object, or one with NaN, a number that no float holds, or values nested too deeply.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise refused(f"the body nests values deeper than {MAX_DEPTH}") from error
    except ValueError as error:
        raise refused(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise refused(f"the body must be a JSON object, not {kind_of(value)}")
    if measure(value)[0] > MAX_DEPTH:
        raise refused(f"the body nests values deeper than {MAX_DEPTH}")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def measure(value: Any) -> tuple[int, int]:
    """How deep lists and objects are nested, and how many values there are, keys counted too."""
    deepest, count, todo = 0, 0, [(value, 0)]
    while todo:
        value, depth = todo.pop()
        count += 1
        if isinstance(value, dict):
            count += len(value)
            value = value.values()
        elif not isinstance(value, list):
            continue
        deepest = max(deepest, depth + 1)
        todo += [(item, depth + 1) for item in value]
    return deepest, count


def kind_of(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


class Fields:
    """The fields of an object, each read once with its type and range; `unknown` are those that nobody read.

    A field that is null counts as absent. Everything read raises `ApiError` with status 400 and the field's name.
    """

    def __init__(self, body: Mapping[str, Any], where: str = ""):
        self._body, self._where = body, where
        self.read: set[str] = set()
        self._inside: list[Fields] = []

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self._body.get(name)
        return default if value is None else value

    def path(self, name: str) -> str:
        return f"{self._where}{name}"

    def wrong(self, name: str, what: str, code: str | None = None) -> Exception:
        return refused(f"{self.path(name)}: {what}", self.path(name), code)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, f"expected a number, not {kind_of(value)}")
        if not low <= value <= high:
            raise self.wrong(name, f"it is {_shown(value)}; expected {low} to {high}")
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            found = _shown(value) if isinstance(value, float) else kind_of(value)
            raise self.wrong(name, f"expected a whole number, not {found}")
        if not low <= value <= high:
            raise self.wrong(name, f"it is {_shown(value)}; expected {low} to {high}")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        return self._typed(name, default, bool)

    def text(self, name: str, default: str = "") -> str:
        return self._typed(name, default, str)

    def list(self, name: str) -> list[Any]:
        return self._typed(name, [], list)

    def object(self, name: str) -> Fields:
        """The fields of an object in a field."""
        self._inside.append(Fields(self._typed(name, {}, dict), f"{self.path(name)}."))
        return self._inside[-1]

    def _typed(self, name: str, default: Any, kind: type) -> Any:
        value = self.get(name, default)
        if not isinstance(value, kind):
            raise self.wrong(name, f"expected {kind_of(kind())}, not {kind_of(value)}")
        return value

    @property
    def unknown(self) -> list[str]:
        own = [self.path(name) for name in self._body if name not in self.read]
        return own + [name for fields in self._inside for name in fields.unknown]


def _shown(value: float) -> str:
    return str(value) if abs(value) < 10**20 else "out of range"
