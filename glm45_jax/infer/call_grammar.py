"""Tool calls in GLM's own form as a grammar: names of tools, their parameters in order, values by their schemas.

    <tool_call>name\\n<arg_key>key</arg_key>\\n<arg_value>value</arg_value>\\n</tool_call>      GLM-4.5 and 4.6
    <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>            GLM-4.7

Strings stand as they are, everything else as JSON. What may stand for a string depends on how the text is read back
(`text.arguments.read_value`): where a parameter may be a number too, text that looks like one is no string. So whatever
the grammar allows is read as a call that its schema allows.

The tags are tokens of their own, which Lark names <arg_key>; tags that are spelled out are kept out of text and values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm45_jax.errors import UserError
from glm45_jax.infer.grammar import MOST_SOURCE, MOST_VALUES, check_schema_size, guided, lark_source, literal
from glm45_jax.text.arguments import Tools, declared_types, read_value, referred

_BLANK = r"[\s\x1c-\x1f]*"  # what str.strip takes away
_NUMBER = rf"~/{_BLANK}-?[0-9][0-9eE+.\-]*{_BLANK}/"
# Text that would be read as another type, where that may come too.
_NOT_READ_AS = {
    "integer": _NUMBER,
    "number": _NUMBER,
    "object": rf"~/{_BLANK}\{{(?s:.*)/",
    "array": rf"~/{_BLANK}\[(?s:.*)/",
    "boolean": rf"~/{_BLANK}(true|True|TRUE|false|False|FALSE){_BLANK}/",
    "null": rf"~/{_BLANK}null{_BLANK}/",
}
_NOT_QUOTED = rf'~/{_BLANK}"(?s:.*)/'  # quotes may be taken away, and then the text is another
_NOT_NUMBER_LIKE = rf"~/{_BLANK}[\-0-9](?s:.*)/"
_SCALARS = {
    "integer": "INTEGER",
    "number": "NUMBER",
    "boolean": '("true" | "false")',
    "null": '"null"',
}
_TERMINALS = r"""ANY: /(?s:.*)/ & ~/(?s:.*)<\/arg_value>(?s:.*)/
KEY: /[^<>\s]([^<>]{0,200}[^<>\s])?/
TEXT: /(?s:.+)/ & ~/(?s:.*)<(tool_call|think)>(?s:.*)/ & ~/(?s:.*)<\/think>(?s:.*)/
INTEGER: /-?(0|[1-9][0-9]{0,17})/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?([eE][+\-]?[0-9]{1,2})?/
"""
_FORMATS = {
    "date": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])",
    "time": r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])",
    "email": r"[A-Za-z0-9_+\-]+(\.[A-Za-z0-9_+\-]+)*@[A-Za-z0-9]([A-Za-z0-9\-]*[A-Za-z0-9])?(\.[A-Za-z0-9]+)+",
}
_FORMATS["date-time"] = f"{_FORMATS['date']}T{_FORMATS['time']}"
_STRING_WORDS = frozenset({"minLength", "maxLength", "pattern", "format"})
_NUMBER_WORDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
# Words of a schema that say which values are allowed; others are notes.
_WORDS = _STRING_WORDS | _NUMBER_WORDS | frozenset(
    "type enum const items prefixItems additionalItems contains minContains maxContains minItems maxItems uniqueItems "
    "properties patternProperties additionalProperties propertyNames minProperties maxProperties required "
    "dependentRequired dependentSchemas dependencies unevaluatedItems unevaluatedProperties anyOf oneOf allOf not if "
    "then else $ref $dynamicRef $recursiveRef".split()
)  # fmt: skip
# Of those, the ones that concern values of a type; all of them, where there is no list.
_CONCERN = {
    "string": _STRING_WORDS, "integer": _NUMBER_WORDS, "number": _NUMBER_WORDS, "boolean": frozenset(),
    "null": frozenset(),
}  # fmt: skip
_HINTS = {"properties": "object", "required": "object", "items": "array", "prefixItems": "array"}
_DEEPEST = 16  # references and alternatives inside one another


def calls_source(
    tools: Sequence[Mapping[str, Any]],
    *,
    newlines: bool,
    required: bool = True,
    parallel: bool = True,
    strict: bool = False,
    content: str | None = None,
) -> str:
    """The source of a grammar for calls of these tools.

    Args:
      tools: function schemas, with OpenAI's wrapper or without.
      newlines: GLM-4.5's layout, not 4.7's.
      required: at least one call and nothing else; otherwise text may stand before, between and after calls.
      parallel: several calls may come.
      strict: of all tools, whether they say so or not: refuse what cannot be enforced, and allow no other parameters.
      content: the source of a grammar for an answer in place of text: it is either that or calls.

    Raises:
      UserError: a schema that is too large, or that cannot be enforced in a strict tool.
    """
    lines: list[str] = []
    names = []
    functions = {function["name"]: function for tool in tools for function in [tool.get("function") or tool]}
    for index, function in enumerate(
        functions.values()
    ):  # of two with one name the last counts, as where calls are read
        strictly = strict or function.get("strict") is True
        names.append(_Tool(index, function, strictly, "\n" if newlines else "").write(lines, free=not required))
    gap = '"\\n" ' if newlines else ""
    more = f"({gap}call)*" if parallel else ""
    calls = f"call {more}"
    if required:
        start = calls
    elif content is not None:
        start = f"{calls} | @content"
    else:
        start = "(TEXT? call)* TEXT?" if parallel else "TEXT? call TEXT? | TEXT"
    head = [f"start: {start}", f"call: <tool_call> ({' | '.join(names)}) </tool_call>"]
    return lark_source("\n".join([*head, *lines]) + "\n" + _TERMINALS, content=None if required else content)


class _Tool:
    """Writes one tool's rules."""

    def __init__(self, index: int, function: Mapping[str, Any], strict: bool, end: str):
        self._name, self._strict, self._rule = function["name"], strict, f"f{index}"
        self._end = f" {literal(end)}" if end else ""
        parameters = function.get("parameters")
        self._root: Mapping[str, Any] = parameters if isinstance(parameters, Mapping) else {}
        check_schema_size(self._root)
        self._types = Tools([{"name": self._name, "parameters": self._root}])
        self._lines: list[str] = []
        self._count = self._size = self._alternatives_seen = 0

    def write(self, lines: list[str], free: bool) -> str:
        """Adds the rules, and gives the first one's name; `free`: calls that are not strict are not held to schemas."""
        self._lines = lines
        schema = self._resolved(self._root)
        unknown = f"({self._pair('KEY', 'ANY')})*"
        arguments = unknown if free and not self._strict else self._arguments(schema)
        lines.append(f"{self._rule}: {literal(self._name)}{self._end} {arguments}")
        return self._rule

    def _arguments(self, schema: Mapping[str, Any]) -> str:
        known = {"type", "properties", "required", "additionalProperties"}
        if self._strict and (others := (schema.keys() & _WORDS) - known):
            raise self._wrong("parameters", f"{sorted(others)[0]!r} cannot be enforced")
        if self._strict and schema.get("type", "object") != "object":
            raise self._wrong("parameters", "its type must be object")
        properties, required = schema.get("properties"), schema.get("required")
        properties = properties if isinstance(properties, Mapping) else {}
        required = [r for r in required if isinstance(r, str)] if isinstance(required, list) else []
        others = {name: True for name in required if name not in properties}
        if others and self._strict:
            raise self._wrong("parameters", f"it requires {next(iter(others))!r}, which it does not describe")
        extra = schema.get("additionalProperties", bool(schema) and "properties" not in schema)
        if not properties and not others and not self._strict and extra is not False:
            return f"({self._pair('KEY', 'ANY')})*"  # any arguments; without a schema there are none
        return self._pairs({**properties, **others}, required)

    def _pairs(self, properties: Mapping[str, Any], required: Sequence[str]) -> str:
        parts = []
        for key, schema in properties.items():
            if not key or key != key.strip() or "<" in key:
                raise self._wrong(key, "a parameter's name must not be empty, begin or end with blanks, or hold '<'")
            if schema is False and key not in required:
                continue
            pair = self._pair(literal(key), self._value(key, schema))
            parts.append(pair if key in required else f"({pair})?")
        return " ".join(parts)

    def _pair(self, key: str, value: str) -> str:
        return f"<arg_key> {key} </arg_key>{self._end} <arg_value> {value} </arg_value>{self._end}"

    # --- values ----------------------------------------------------------------------------------------------------

    def _value(self, key: str, schema: Any) -> str:
        """The rule for what may stand for one parameter."""
        types = self._types.types(self._name, key) or frozenset()
        written: list[str] = []
        in_json: list[dict[str, Any]] = []
        strings: list[Mapping[str, Any]] = []
        for one in self._alternatives(key, schema, 0):
            kind = one.get("type")
            words = (one.keys() & _WORDS) - {"type"}
            if "enum" in one or "const" in one:
                written += self._literals(key, one, types)
            elif kind == "string":
                strings.append(one)
            elif kind is None and not words:
                written.append("ANY")
            elif kind in _SCALARS and not words:
                written.append(_SCALARS[kind])
            else:
                in_json.append(dict(one))
        numbers = any(one.get("type") in (None, "integer", "number") for one in in_json)
        written += [self._string(key, one, types, numbers) for one in strings]
        if in_json:
            written.append(f"%json {json.dumps(self._document(key, in_json), ensure_ascii=False)}")
        if not written:
            raise self._wrong(key, "no value is allowed")
        return self._add("(" + " | ".join(dict.fromkeys(written)) + ")")

    def _add(self, body: str, terminal: bool = False) -> str:
        self._count += 1
        name = f"{self._rule}_{self._count}"
        name = name.upper() if terminal else name
        self._lines.append(f"{name}: {body}")
        self._size += len(body)
        if self._size > MOST_SOURCE:
            raise UserError(f"tool {self._name!r}: its grammar is larger than {MOST_SOURCE} characters")
        return name

    def _alternatives(self, key: str, schema: Any, depth: int) -> Iterator[Mapping[str, Any]]:
        """A schema's alternatives, each of at most one type."""
        if schema is True:
            schema = {}
        self._alternatives_seen += 1
        if not isinstance(schema, Mapping) or depth > _DEEPEST or self._alternatives_seen > MOST_VALUES:
            raise self._wrong(key, "its schema is no object, allows nothing, or refers to itself without end")
        words = schema.keys() & _WORDS
        kind = schema.get("type")
        names = kind if isinstance(kind, list) else [kind] if "type" in schema else []
        if not all(isinstance(name, str if self._strict else str | None) for name in names):  # null is no type's name
            raise self._wrong(key, "its type must be a name or a list of names")
        if "$ref" in words:
            found = referred(schema["$ref"], self._root)
            if found is None or (len(words) > 1 and self._strict):
                raise self._wrong(key, f"$ref {str(schema['$ref'])[:80]!r} leads nowhere, or has words beside it")
            yield from self._alternatives(key, found, depth + 1)
        elif (several := next((w for w in ("anyOf", "oneOf", "allOf") if w in words), None)) is not None:
            yield from self._combined(key, schema, several, depth)
        elif isinstance(kind, list):
            for one in dict.fromkeys(kind):
                yield from self._alternatives(key, self._for_type(schema, one), depth + 1)
        elif kind is None and not words & {"enum", "const"} and words:
            hint = next((_HINTS[word] for word in _HINTS if word in words), None)
            if hint is None and self._strict:
                raise self._wrong(key, "it says what values must be like, but not their type")
            yield {**schema, "type": hint} if hint else {}
        else:
            yield schema
            if schema.get("nullable") is True and kind != "null":
                yield {"type": "null"}

    def _combined(self, key: str, schema: Mapping[str, Any], several: str, depth: int) -> Iterator[Mapping[str, Any]]:
        branches = schema[several]
        if not isinstance(branches, list) or not branches:
            raise self._wrong(key, f"{several} must be a list that is not empty")
        beside = (schema.keys() & _WORDS) - {several}
        if (several == "allOf" and len(branches) > 1) or beside - {"type"}:
            # all must hold together: left to the compiler of JSON schemas, where no string may come
            if "string" in (declared_types([schema], self._root) or ("string",)):
                if self._strict:
                    raise self._wrong(key, f"{several} beside other words cannot be enforced for strings")
                yield {}
            else:
                yield schema
            return
        found = [one for branch in branches for one in self._alternatives(key, branch, depth + 1)]
        kinds = [one.get("type") for one in found]
        if several == "oneOf" and self._strict and len({*kinds}) < len(kinds) and not _distinct(found):
            raise self._wrong(key, "two alternatives of its oneOf may hold at once")
        yield from found
        if schema.get("nullable") is True and "null" not in kinds:
            yield {"type": "null"}

    def _for_type(self, schema: Mapping[str, Any], kind: Any) -> dict[str, Any]:
        """What a schema with several types says of one."""
        words = None if schema.keys() & {"enum", "const"} else _CONCERN.get(kind)
        return {**{k: v for k, v in schema.items() if words is None or k in words}, "type": kind}

    def _literals(self, key: str, schema: Mapping[str, Any], types: frozenset[str]) -> list[str]:
        """Texts that are read as the values of an enum, or as its constant."""
        values = [schema["const"]] if "const" in schema else schema["enum"]
        kind = schema.get("type")
        if not isinstance(values, list) or (self._strict and (schema.keys() & _WORDS) - {"enum", "const", "type"}):
            raise self._wrong(key, "its enum is no list, or has other words beside it")
        return [self._literal(key, value, types) for value in values if kind is None or _is(value, kind)]

    def _literal(self, key: str, value: Any, types: frozenset[str]) -> str:
        as_json = json.dumps(value, ensure_ascii=False)
        texts = [value, as_json, json.dumps(value)] if isinstance(value, str) else [as_json]
        for text in texts:
            if _same(read_value(text, types or None), value) and "</arg_value>" not in text:
                return literal(text) if text else '""'
        raise self._wrong(key, f"the value {as_json[:80]} cannot be written so that it is read back")

    def _string(self, key: str, schema: Mapping[str, Any], types: frozenset[str], numbers: bool) -> str:
        """The terminal for strings of one schema, without what would be read as another value."""
        wanted = self._texts(key, schema)
        others = [_NOT_READ_AS[kind] for kind in sorted(types - {"string"})]
        others += [_NOT_NUMBER_LIKE] * numbers + [_NOT_QUOTED] * bool(wanted or types - {"string"})
        if not wanted and not others:
            return "ANY"
        return self._add(" & ".join(dict.fromkeys(["ANY", *wanted, *others])), terminal=True)

    def _texts(self, key: str, schema: Mapping[str, Any]) -> list[str]:
        """Terminals that all must hold."""
        words = (schema.keys() & _WORDS) - {"type"}
        if self._strict and (others := words - _STRING_WORDS):
            raise self._wrong(key, f"{sorted(others)[0]!r} cannot be enforced")
        found = []
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if not all(type(n) is int and n >= 0 for n in (low, 0 if high is None else high)):
            raise self._wrong(key, "minLength and maxLength must be whole numbers")
        if low or high is not None:
            found.append(rf"/(?s:.){{{low},{'' if high is None else high}}}/")
        if isinstance(schema.get("pattern"), str):
            found.append(f"/{_searched(schema['pattern'])}/")
        form = schema.get("format")
        if isinstance(form, str) and form in _FORMATS:
            found.append(f"/{_FORMATS[form]}/")
        elif form is not None and self._strict:
            raise self._wrong(key, f"the format {str(form)[:40]!r} cannot be enforced; {', '.join(_FORMATS)} can")
        return found

    def _document(self, key: str, schemas: list[dict[str, Any]]) -> dict[str, Any]:
        """One JSON schema of several alternatives, with what they refer to in `$defs`, which has other names there."""
        names: dict[str, str] = {}

        def moved(schema: Any) -> Any:
            if isinstance(schema, list):
                return [moved(item) for item in schema]
            if not isinstance(schema, Mapping):
                return schema
            copy = {word: moved(value) for word, value in schema.items() if word not in ("$defs", "definitions")}
            if isinstance(reference := copy.get("$ref"), str):
                copy["$ref"] = f"#/$defs/{names.setdefault(reference, f'r{len(names)}')}"
            return copy

        document, defs = moved(schemas[0] if len(schemas) == 1 else {"anyOf": schemas}), {}
        while len(defs) < len(names):
            reference, name = [*names.items()][len(defs)]
            found = referred(reference, self._root)
            if found is None:
                raise self._wrong(key, f"$ref {reference[:80]!r} leads nowhere")
            defs[name] = moved(found)
        return guided({**document, "$defs": defs} if defs else document, self._strict)

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        for _ in range(_DEEPEST):
            if "$ref" not in schema:
                return schema
            found = referred(schema["$ref"], self._root)
            if not isinstance(found, Mapping):
                break
            schema = found
        raise self._wrong("parameters", "its $ref leads nowhere, or round in a circle")

    def _wrong(self, key: str, what: str) -> UserError:
        return UserError(f"tool {self._name!r}, {key!r}: {what}")


def _searched(pattern: str) -> str:
    """A pattern of JSON schema, which may match anywhere, as one that matches all of a text."""
    from llguidance import regex_to_lark

    found = []
    for one in _branches(pattern):
        begins, ends = one.startswith("^"), one.endswith("$") and not one.endswith("\\$")
        one = one[begins : len(one) - ends]
        found.append(("" if begins else "(?s:.*)") + f"({one})" + ("" if ends else "(?s:.*)"))
    return regex_to_lark("|".join(found), "dw")


def _branches(pattern: str) -> list[str]:
    """What stands between the `|` that lie in no group or class."""
    parts, depth, escaped, in_class = [""], 0, False, False
    for char in pattern:
        if not escaped:
            in_class = char != "]" if in_class else char == "["
            depth += 0 if in_class else (char == "(") - (char == ")")
            if char == "|" and depth == 0 and not in_class:
                parts.append("")
                continue
        escaped = char == "\\" and not escaped
        parts[-1] += char
    return parts


def _is(value: Any, kind: Any) -> bool:
    kinds = {"string": str, "boolean": bool, "object": dict, "array": list, "null": type(None)}
    if kind in ("integer", "number"):
        return type(value) is int or (type(value) is float and (kind == "number" or value.is_integer()))
    return isinstance(value, kinds.get(kind, ()))


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _distinct(schemas: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all are constants or enums with no value in common."""
    values = [json.dumps(v) for s in schemas for v in ([s["const"]] if "const" in s else s.get("enum") or [None])]
    return all("const" in s or "enum" in s for s in schemas) and len({*values}) == len(values)
