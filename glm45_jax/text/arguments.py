"""Values of tool-call arguments: what the schema says, what the text says, and JSON written while the text comes.

GLM writes strings as they are and everything else as JSON, so the text alone does not tell `5` from `"5"`: the tool's
schema does, and where it is silent, JSON is read as JSON. Nothing is ever evaluated. Whatever a model writes, the
result is JSON that every parser reads: no NaN or infinity, no deep nesting, surrogates only as escapes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm45_jax.errors import UserError
from glm45_jax.text.messages import check_is_list

MAX_DEPTH = 64  # of a value in JSON; deeper ones stay strings, so that no reader runs out of stack

_KINDS = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}
# Names that other languages' tools write into schemas.
_ALIASES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
}
_BOOLEANS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_NUMBERS = ("-", *"0123456789")
# What the text of each type may begin with; a string in quotes waits too, see `_unquoted`.
_STARTS = {
    "string": ('"',),
    "null": ("null",),
    "boolean": tuple(_BOOLEANS),
    "integer": _NUMBERS,
    "number": _NUMBERS,
    "object": ("{",),
    "array": ("[",),
}
_NOT_JSON = object()
_QUOTED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_END_QUOTE = re.compile(r'(?<!\\)"')
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")

Types = frozenset[str] | None  # of a value: names of JSON schema; None where nothing is known


class Tools:
    """The tools of a request: their names, and the types of their arguments.

    Each tool is a function schema with or without the `{"type": "function"}` wrapper. Without tools every name is known
    and nothing is known of the arguments.

    Raises:
      UserError: `tools` is no list of objects, or one has no name.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None):
        check_is_list(tools or [], "tools")
        self._parameters: dict[str, Mapping[str, Any]] = {}
        self._properties: dict[str, dict[str, list[Any]]] = {}
        self._types: dict[tuple[str, str], Types] = {}
        for index, tool in enumerate(tools or []):
            function = tool.get("function") or tool
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise UserError(f"tools[{index}]: a tool needs a name, at `name` or at `function.name`")
            parameters = function.get("parameters")
            self._parameters[function["name"]] = parameters if isinstance(parameters, Mapping) else {}

    def __contains__(self, name: str) -> bool:
        return not self._parameters or name in self._parameters

    def takes_arguments(self, name: str) -> bool:
        """Whether the schema of the tool `name` has properties."""
        return bool(self._properties_of(name))

    def types(self, name: str, key: str) -> Types:
        """Types that the schema of the tool `name` allows for the argument `key`."""
        schemas = self._properties_of(name).get(key, [])
        if schemas and (name, key) not in self._types:
            self._types[name, key] = declared_types(schemas, self._parameters[name])
        return self._types.get((name, key))

    def _properties_of(self, name: str) -> dict[str, list[Any]]:
        if name not in self._properties:
            self._properties[name] = _properties(self._parameters.get(name, {}))
        return self._properties[name]


def declared_types(schemas: Sequence[Any], root: Mapping[str, Any]) -> Types:
    """Every type that one of `schemas` names: by type, enum or const, in any branch, through references into `root`."""
    types: set[str] = set()
    for schema in _branches(schemas, root):
        named = schema.get("type")
        for name in named if isinstance(named, list) else [named]:
            name = _ALIASES.get(name.lower(), name.lower()) if isinstance(name, str) else ""
            types |= {name} & _STARTS.keys()
        enum = schema.get("enum")
        values = [*(enum if isinstance(enum, list) else []), *([schema["const"]] if "const" in schema else [])]
        types |= {_KINDS[type(value)] for value in values if type(value) in _KINDS}
        types |= {"null"} if schema.get("nullable") is True else set()
    return frozenset(types) or None


def _properties(root: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Schemas of each argument, from all branches of the parameters' schema."""
    found: dict[str, list[Any]] = {}
    for schema in _branches([root], root):
        properties = schema.get("properties")
        for key, value in properties.items() if isinstance(properties, Mapping) else ():
            found.setdefault(key, []).append(value)
    return found


def _branches(schemas: Sequence[Any], root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """`schemas`, what they refer to and their alternatives, each once: circles and bombs of references end."""
    todo, seen = list(schemas), set()
    while todo:
        schema = todo.pop()
        if not isinstance(schema, Mapping) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        todo.append(referred(schema.get("$ref"), root))
        for word in ("anyOf", "oneOf", "allOf"):
            branches = schema.get(word)
            todo += branches if isinstance(branches, list) else []


def referred(reference: Any, root: Any) -> Any:
    """What a JSON pointer into the same schema (`#/$defs/Name`) stands for; None for anything else."""
    if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
        return None
    for step in reference.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        root = root.get(step) if isinstance(root, Mapping) else None
    return root


def read_value(text: str, types: Types = None) -> Any:
    """The value that `text` stands for in an argument of these types.

    A string keeps its whitespace. Other types may come as JSON, as JSON in quotes or with escaped quotes, and as
    Python's `True`, `False` and `None`; what fits no type asked for stays JSON if it is JSON, and else a string.
    """
    bare = text.strip()
    value = _json(bare)
    if types is None:
        return text if value is _NOT_JSON else value
    kind = _KINDS.get(type(value))
    if kind in types - {"string"} or (kind == "integer" and "number" in types):
        return value
    if kind == "number" and "integer" in types and value.is_integer():
        return int(value)
    if "boolean" in types and bare in _BOOLEANS:
        return _BOOLEANS[bare]
    if "string" in types:
        return _unquoted(text, types)
    if "null" in types and bare == "None":
        return None
    if "boolean" in types and kind == "integer" and value in (0, 1):
        return bool(value)
    if kind == "string":
        return read_value(value, types)
    return text if value is _NOT_JSON else value


def _unquoted(text: str, types: frozenset[str]) -> str:
    """A string; without its quotes if they show that it is a literal.

    Quotes are part of a string (`"exact words"` is a search), except around escapes (`"a\\.b"`), or around what would
    be another type without them (`"null"` where null may come).
    """
    if not _QUOTED.fullmatch(text):
        return text
    if "\\" in text:
        value = _json(text)
        return value if isinstance(value, str) else text[1:-1]
    inner = read_value(text[1:-1], types - {"string"}) if types != {"string"} else text
    return text if isinstance(inner, str) else text[1:-1]


def _json(text: str) -> Any:
    value = _decoded(text)
    if value is _NOT_JSON and '\\"' in text:  # quotes escaped once too often
        inner = _decoded(f'"{text}"')
        value = _decoded(inner) if isinstance(inner, str) else value
    return value


def _decoded(text: str) -> Any:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):  # huge integers are ValueErrors
        return _NOT_JSON
    too_large = isinstance(value, float) and math.isinf(float(text))
    return _NOT_JSON if too_large or _depth(text) > MAX_DEPTH else value


def _depth(text: str) -> int:
    """How deep valid JSON nests."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    for bracket in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket.group(), 0)
        deepest = max(deepest, depth)
    return deepest


def _finite(text: str) -> float:
    """A number inside of a list or an object; one that no float holds becomes the largest."""
    return min(max(float(text), -sys.float_info.max), sys.float_info.max)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


# Text over several lines inside of JSON strings is common in what models write: not strict.
_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant, strict=False)


def to_json(value: Any) -> str:
    """JSON that can be encoded as UTF-8: readable, with escapes for surrogates alone."""
    return _SURROGATE.sub(lambda char: f"\\u{ord(char.group()):04x}", json.dumps(value, ensure_ascii=False))


class ArgumentsWriter:
    """JSON of a call's arguments, piece by piece: `begin` a value, `add` its text, `end` it; `close` at the end.

    The pieces joined are one object, whatever the text and however it is cut. A string comes out as it comes in; text
    that may still turn out to be of another type, or a literal in quotes, is held until that is known.
    """

    def __init__(self, name: str, tools: Tools):
        self._name, self._tools = name, tools
        self._empty = True

    def begin(self, key: str) -> None:
        self._lead = ("{" if self._empty else ", ") + to_json(key) + ": "
        self._empty = False
        self._types = self._tools.types(self._name, key)
        kinds = _STARTS if self._types is None else self._types
        self._starts = tuple(start for kind in kinds for start in _STARTS[kind])
        self._mode = "waits" if "string" in kinds else "holds"
        self._held: list[str] = []
        self._head = self._last = ""
        self._quote_ended = False

    def add(self, text: str) -> str:
        if self._mode == "streams":
            return to_json(text)[1:-1]
        self._held.append(text)
        if self._mode == "waits":
            self._head = (self._head + text).lstrip()
            if self._head.startswith('"'):
                self._mode, text = "quoted", self._head[1:]
            elif self._head.startswith(self._starts):
                self._mode = "holds"
            elif not any(start.startswith(self._head) for start in self._starts):
                self._mode = "streams"
        if self._mode == "quoted" and self._goes_on(text):
            self._mode = "streams"
        return self._lead + to_json("".join(self._held))[:-1] if self._mode == "streams" else ""

    def _goes_on(self, text: str) -> bool:
        """Whether text follows the second quote of a value that began with one: then the quotes are its own."""
        if not self._quote_ended:
            text, known = self._last + text, len(self._last)
            quote = _END_QUOTE.search(text, known)
            if quote is None:
                self._last = text[-1:]
                return False
            self._quote_ended, text = True, text[quote.end() :]
        return bool(text.strip())

    def end(self) -> str:
        if self._mode == "streams":
            return '"'
        return self._lead + to_json(read_value("".join(self._held), self._types))

    def close(self) -> str:
        return "{}" if self._empty else "}"
