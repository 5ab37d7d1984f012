"""Values of arguments by the types that schemas name."""

import json
import subprocess
import sys

import pytest

from glm45_jax.text import parse_output
from glm45_jax.text.arguments import MAX_DEPTH, Tools, read_value

STRING, INTEGER, NUMBER, BOOLEAN, NULL, OBJECT, ARRAY = "string integer number boolean null object array".split()


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        (" a ", [STRING], " a "),
        ("5", [STRING], "5"),
        ("null", [STRING], "null"),
        ('{"a": 1}', [STRING], '{"a": 1}'),
        ('"exact words"', [STRING], '"exact words"'),
        ('"a" or "b\\""', [STRING], '"a" or "b\\""'),
        ('"C:\\Users"', [STRING], "C:\\Users"),  # quotes and escapes, not JSON's
        ('"a\\nb"', [STRING], "a\nb"),  # a JSON literal
        ("5", [INTEGER], 5),
        (" 5\n", [INTEGER], 5),
        ("5.0", [INTEGER], 5),
        ("5.5", [INTEGER], 5.5),
        ("5", [NUMBER], 5),
        ("1e5", [NUMBER], 1e5),
        ('"42"', [NUMBER], 42),
        ('\\"42\\"', [NUMBER], 42),
        ("123456789012345678901234567890", [NUMBER], 123456789012345678901234567890),
        ("007", [NUMBER], "007"),
        ("NaN", [NUMBER], "NaN"),
        ("-Infinity", [NUMBER], "-Infinity"),
        ("1e999", [NUMBER], "1e999"),
        ("[1e999, -1e999]", [ARRAY], [sys.float_info.max, -sys.float_info.max]),
        ("[NaN]", [ARRAY], "[NaN]"),
        ("9" * 5000, [NUMBER], "9" * 5000),
        ("1_000", [NUMBER], "1_000"),
        ("true", [BOOLEAN], True),
        ("True", [BOOLEAN], True),
        ("FALSE", [BOOLEAN], False),
        ("0", [BOOLEAN], False),
        ("maybe", [BOOLEAN], "maybe"),
        ("null", [NULL, STRING], None),
        ('"null"', [NULL, STRING], "null"),
        ('"nulls"', [NULL, STRING], '"nulls"'),
        ("None", [NULL, INTEGER], None),
        ("None", [NULL, STRING], "None"),
        ("5", [INTEGER, STRING], 5),
        ("5 apples", [INTEGER, STRING], "5 apples"),
        ("5.5", [INTEGER, STRING], "5.5"),
        ('"5"', [INTEGER, STRING], "5"),
        ("True", [BOOLEAN, STRING], True),
        ("[1, 2]", [ARRAY], [1, 2]),
        ('[{\\"a\\": \\"b\\"}]', [ARRAY], [{"a": "b"}]),
        ('"[1]"', [ARRAY], [1]),
        ('["a\nb"]', [ARRAY], ["a\nb"]),
        ("[1, NaN]", [ARRAY], "[1, NaN]"),
        ('{"a": [1, {"b": null}]}', [OBJECT], {"a": [1, {"b": None}]}),
        ("{'a': 1}", [OBJECT], "{'a': 1}"),
        ("[1]", [OBJECT, STRING], "[1]"),
        ("__import__('os').system('false')", [OBJECT], "__import__('os').system('false')"),
        ("", [NUMBER], ""),
        ("", [STRING], ""),
        ("5", None, 5),
        ("5a", None, "5a"),
        (" a ", None, " a "),
        ('"a"', None, "a"),
        ('{"a": 1}', None, {"a": 1}),
        ("True", None, "True"),
    ],
)
def test_values(text, types, value):
    types = types and frozenset(types)
    assert json.dumps(read_value(text, types)) == json.dumps(value)
    schema = {} if types is None else {"type": sorted(types)}
    tools = [{"name": "f", "parameters": {"properties": {"x": schema}}}]
    arg = f"<tool_call>f<arg_key>x</arg_key><arg_value>{text}</arg_value></tool_call>"
    (call,) = parse_output(arg, tools).tool_calls
    assert json.dumps(call.arguments) == json.dumps({"x": value})


def types(schema, **root):
    return Tools([{"name": "f", "parameters": {"properties": {"x": schema}, **root}}]).types("f", "x")


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, {STRING}),
        ({"type": ["integer", "null"]}, {INTEGER, NULL}),
        ({"type": "int"}, {INTEGER}),
        ({"type": "Dict"}, {OBJECT}),
        ({"enum": ["a", 1, None, 1.5, True]}, {STRING, INTEGER, NULL, NUMBER, BOOLEAN}),
        ({"const": [1]}, {ARRAY}),
        (
            {"anyOf": [{"type": "string"}, {"oneOf": [{"type": "null"}, {"allOf": [{"enum": [1]}]}]}]},
            {STRING, NULL, INTEGER},
        ),
        ({"type": "string", "nullable": True}, {STRING, NULL}),
        ({"$ref": "#/$defs/a~1b~0c"}, {NUMBER}),
        ({"$ref": "#/definitions/deep/inner"}, {ARRAY}),
        ({"anyOf": [{"$ref": "#/$defs/circle"}, {"type": "string"}]}, {STRING, BOOLEAN}),
    ],
)
def test_types_of_schemas(schema, expected):
    defs = {"a/b~c": {"type": "number"}, "circle": {"anyOf": [{"$ref": "#/$defs/circle"}, {"type": "boolean"}]}}
    root = {"$defs": defs, "definitions": {"deep": {"inner": {"type": "array"}}}}
    assert types(schema, **root) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        None,
        "string",
        {"type": 123},
        {"type": "file"},
        {"type": [["string"], None]},
        {"enum": "abc"},
        {"anyOf": {"type": "string"}},
        {"anyOf": ["string"]},
        {"$ref": "https://example.org/schema"},
        {"$ref": "#/$defs/none"},
        {"$ref": "#circle"},
        {"$ref": 5},
        {"pattern": "("},
    ],
)
def test_schemas_that_say_nothing(schema):
    assert types(schema) is None


def test_parameters_in_branches():
    branches = [{"$ref": "#/$defs/a"}, {"properties": {"x": {"type": "integer"}}}]
    defs = {"a": {"properties": {"x": {"type": "null"}}}}
    tools = Tools([{"function": {"name": "f", "parameters": {"oneOf": branches, "$defs": defs}}}])
    assert tools.types("f", "x") == {INTEGER, NULL}
    assert tools.types("f", "y") is None and tools.types("g", "x") is None
    for parameters in (None, [], "x", {"properties": ["x"]}):
        assert Tools([{"name": "f", "parameters": parameters}]).types("f", "x") is None


def test_hostile_schemas_end():
    deep: dict = {"type": "string"}
    for _ in range(100_000):
        deep = {"anyOf": [deep]}
    assert types(deep) == {STRING}
    while "anyOf" in deep:  # freed bit by bit: a nested free is deep as well
        (deep,) = deep.pop("anyOf")
    doubling = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(100)}
    assert types({"$ref": "#/$defs/d0"}, **{"$defs": {**doubling, "d100": {"type": "null"}}}) == {NULL}
    assert types({"anyOf": [{"const": i} for i in range(100_000)]}) == {INTEGER}


def test_nesting_has_an_end():
    def nested(depth):
        return "[" * depth + "]" * depth

    assert isinstance(read_value(nested(MAX_DEPTH)), list)
    assert isinstance(read_value("[" + "[]," * 1000 + '"[[["]'), list)
    for depth in (MAX_DEPTH + 1, 900, 1_000_000):
        assert read_value(nested(depth)) == nested(depth)
    assert read_value('{"a":' * 100_000) == '{"a":' * 100_000


def test_nothing_depends_on_how_deep_the_caller_stands():
    """At the recursion limit of a deep caller a value is the same as elsewhere."""
    text = "<tool_call>f<arg_key>x</arg_key><arg_value>" + "[" * MAX_DEPTH + "]" * MAX_DEPTH

    def at(depth):
        return at(depth - 1) if depth else parse_output(text, new_id=lambda: "")

    assert at(700) == at(0)
    assert at(0).tool_calls[0].json != ""


def test_values_are_never_run():
    code = (
        "import sys; from glm45_jax.text import parse_output; ran = []\n"
        "sys.addaudithook(lambda event, _: ran.append(event) if event in ('exec', 'compile', 'os.system') else None)\n"
        "text = \"<tool_call>f<arg_key>x</arg_key><arg_value>__import__('os').system('true')</arg_value>\"\n"
        "for tools in (None, [{'name': 'f', 'parameters': {'properties': {'x': {'type': 'object'}}}}]):\n"
        "    call, = parse_output(text, tools).tool_calls\n"
        "    assert call.arguments == {'x': \"__import__('os').system('true')\"}\n"
        "assert not ran, ran\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
