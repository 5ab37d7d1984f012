"""Tool schemas from clients: bounded in size, and no nonsense where something will read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from glm45_jax.serve.errors import refused
from glm45_jax.serve.fields import kind_of, measure
from glm45_jax.serve.options import MAX_PATTERN_LENGTH, MAX_TOOL_VALUES, MAX_TOOLS

_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# How ECMA's regular expressions differ from Python's where both mean something.
_ECMA = re.compile(r"\\[pP]\{[^}]*\}|\\u\{?[0-9a-fA-F]+\}?|\\c[a-zA-Z]|\\[/-]|\\k<\w+>")
_NAMED_GROUP = re.compile(r"\(\?<(?=\w)")


def check_tools(tools: list[Any]) -> None:
    """Raises `ApiError` for tools that are too many, too large or malformed, by their index."""
    if len(tools) > MAX_TOOLS:
        raise refused(f"tools: there are {len(tools)}; expected {MAX_TOOLS} at most", "tools")
    if measure(tools)[1] > MAX_TOOL_VALUES:
        raise refused(f"tools: they hold more than {MAX_TOOL_VALUES} values", "tools")
    for index, tool in enumerate(tools):
        _check_tool(tool, f"tools[{index}]")


def _check_tool(tool: Any, where: str) -> None:
    if not isinstance(tool, dict):
        raise refused(f"{where}: expected an object, not {kind_of(tool)}", where)
    if tool.get("type", "function") != "function":
        raise refused(f"{where}.type: only functions are known", where)
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w.:-]{1,128}", name):
        raise refused(f"{where}: it needs a name of 1 to 128 letters, digits, '_', '-', '.' or ':'", where)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise refused(f"{where}.parameters: expected an object, not {kind_of(parameters)}", where)
    for schema in _schemas(parameters):
        _check_schema(schema, f"{where}.parameters")


def _schemas(root: Any) -> Iterator[dict[str, Any]]:
    """A schema and all inside it; references are not followed, what they lead to stands in the same tree."""
    todo = [root]
    while todo:
        schema = todo.pop()
        if not isinstance(schema, dict):
            continue
        yield schema
        todo += [schema.get(key) for key in _ONE]
        todo += [one for key in _LISTS if isinstance(schema.get(key), list) for one in schema[key]]
        todo += [one for key in _NAMED if isinstance(schema.get(key), dict) for one in schema[key].values()]


def _check_schema(schema: dict[str, Any], where: str) -> None:
    kind = schema.get("type", [])
    kinds = kind if isinstance(kind, list) else [kind]
    if not all(isinstance(name, str) for name in kinds):
        raise refused(f"{where}: a schema's type must be a name or a list of names", where)
    reference = schema.get("$ref", "")
    if not isinstance(reference, str):
        raise refused(f"{where}: a $ref must be a string", where)
    pattern = schema.get("pattern", "")
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_LENGTH:
        raise refused(f"{where}: a pattern must be a string of {MAX_PATTERN_LENGTH} characters at most", where)
    try:
        re.compile(_NAMED_GROUP.sub("(?P<", _ECMA.sub("x", pattern)))
    except (re.error, RecursionError, OverflowError) as error:
        raise refused(f"{where}: the pattern {pattern[:80]!r} is no regular expression: {error}", where) from error
