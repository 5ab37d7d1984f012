"""Grammars: whatever they allow is what was asked for, and what cannot be enforced is refused."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glm45_jax.errors import UserError
from glm45_jax.infer.call_grammar import calls_source
from glm45_jax.infer.grammar import (
    Grammar,
    Grammars,
    choice_source,
    grammar_source,
    json_source,
    lark_source,
    regex_source,
)
from glm45_jax.text import parse_output
from tests.support import small_tokenizer

TOKENIZER = small_tokenizer()
END_IDS = TOKENIZER.eos_ids
GRAMMARS = Grammars(TOKENIZER, END_IDS)
SPECIAL = {*TOKENIZER.special_ids.values()}
CLOSING = [{*END_IDS}, SPECIAL, *({TOKENIZER.token_id(char) for char in chars} for chars in ('"]}b', ":,e0"))]


def bits(mask: np.ndarray) -> list[int]:
    return np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist()


def walk(grammar: Grammar, rng: random.Random, most: int = 3000) -> str:
    """Text of a random way through a grammar to its end; what closes things is likelier, the longer it goes on."""
    matcher, tokens = grammar.matcher(), list[int]()
    for step in range(most):
        allowed = bits(matcher.mask())
        assert allowed and not matcher.error, (TOKENIZER.decode(tokens), matcher.error)
        ends = [token for token in allowed if token in END_IDS]
        assert not ends or len(ends) == 3
        closing = next((found for kind in CLOSING if (found := [t for t in allowed if t in kind])), [])
        likelier = closing and rng.random() < min(0.7, 0.2 + step / 300)
        token = rng.choice(closing if likelier else allowed)
        assert matcher.take(token)
        if token in END_IDS:
            assert matcher.stopped
            return TOKENIZER.decode(tokens)
        tokens.append(token)
    raise AssertionError(f"no end: {TOKENIZER.decode(tokens)[:300]}")


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a text, with names of control tokens standing for the tokens, is one the grammar allows."""
    matcher = grammar.matcher()
    return all(matcher.take(token) for token in [*TOKENIZER.encode(text), END_IDS[0]])


# --- plain grammars --------------------------------------------------------------------------------------------------

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"],
     "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", 1, None, {"y": [2]}]}, "minItems": 1, "maxItems": 4},
    {"type": "object", "properties": {"n": {"type": "number", "minimum": -1.5, "maximum": 2}}, "required": ["n"]},
    {"$defs": {"node": {"type": "object", "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [
        {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}},
     "$ref": "#/$defs/node"},
    {"type": "string", "pattern": "^[a-c]{2,5}$", "maxLength": 4},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_json_by_a_schema(schema) -> None:
    grammar, rng = GRAMMARS.compile(json_source(schema)), random.Random(0)
    for _ in range(25):
        text = walk(grammar, rng)
        jsonschema.validate(json.loads(text), schema)
        assert accepts(grammar, text)


def test_any_object() -> None:
    grammar, rng = GRAMMARS.compile(json_source()), random.Random(1)
    assert all(isinstance(json.loads(walk(grammar, rng)), dict) for _ in range(10))
    assert accepts(grammar, '{\n  "a": [1, {"b": null}]\n}')
    assert not accepts(grammar, "[1]") and not accepts(grammar, "{} ") and not accepts(grammar, '{"a": 1')
    assert not accepts(grammar, "{" + " " * 200 + "}")  # blanks do not go on for ever


def test_regex_choice_and_grammars() -> None:
    regex = GRAMMARS.compile(regex_source(r"(the|a) [0-9]{2,3}/\d"))
    assert accepts(regex, "the 123/4") and not accepts(regex, "the 1/4") and not accepts(regex, "the 12/45")
    choice = GRAMMARS.compile(choice_source(["yes", 'no "really"', "y"]))
    assert [accepts(choice, text) for text in ("yes", 'no "really"', "y", "ye", "no")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert {walk(choice, random.Random(seed)) for seed in range(20)} == {"yes", 'no "really"', "y"}
    lark = GRAMMARS.compile(lark_source('start: "a" start "b" | "c"'))
    assert accepts(lark, "aacbb") and not accepts(lark, "aacb")
    gbnf = GRAMMARS.compile(grammar_source('root ::= "x" [0-9]+'))
    assert accepts(gbnf, "x12") and not accepts(gbnf, "x")


def test_control_tokens_are_no_text() -> None:
    """Not even where all text is allowed: the names of control tokens may be spelled, the tokens may not come."""
    grammar = GRAMMARS.compile(regex_source("(?s:.)*"))
    allowed = set(bits(grammar.matcher().mask()))
    assert allowed & SPECIAL == {*END_IDS}
    matcher = grammar.matcher()
    assert all(matcher.take(token) for token in TOKENIZER.encode("<tool_call><|user|>", allow_special=False))
    assert not grammar.matcher().take(TOKENIZER.token_id("<tool_call>"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: json_source({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: json_source({"not": {"type": "string"}}), "not"),
        (lambda: json_source({"type": "string", "format": "colour"}), "colour"),
        (lambda: json_source({"$ref": "http://127.0.0.1/x"}), "cannot be compiled"),
        (lambda: json_source({"type": "nonsense"}), "nonsense"),
        (lambda: json_source({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (lambda: json_source({"enum": []}), "cannot be compiled"),
        (lambda: json_source({"x-guidance": {"lenient": True}}), "x-guidance"),
        (lambda: json_source({"enum": [*range(20_000)]}), "more than 10000 values"),
        (lambda: json_source({"properties": {str(i): {} for i in range(2001)}}), "more than 2000 properties"),
        (lambda: json_source(objects(5, 900)), "more than 2000 properties"),
        (lambda: regex_source("((("), "cannot be compiled"),
        (lambda: regex_source("a" * 5000), "5000 characters"),
        (lambda: json_source({"type": "integer", "multipleOf": 999_983}), "multipleOf of more than 2000"),
        (lambda: json_source({"type": "integer", "multipleOf": 10**5000}), "multipleOf of more than 2000"),
        (lambda: json_source({"type": "number", "multipleOf": 0.12345}), "multipleOf of more than 2000"),
        (lambda: json_source({"$ref": "#"}), "allows nothing"),
        (lambda: lark_source("start: nothing"), "cannot be compiled"),
        (lambda: lark_source('start: "' + "a" * 300_000 + '"'), "larger than"),
        (lambda: choice_source([]), "1 to 1024 choices"),
        (lambda: lark_source('start: "\ud800"'), "cannot be compiled"),
    ],
)
def test_what_cannot_be_enforced_is_refused(source, message) -> None:
    with pytest.raises(UserError, match=message):
        GRAMMARS.compile(source())


def objects(count: int, size: int) -> dict[str, Any]:
    """A schema of so many objects, each with so many properties that may be missing."""
    of = {"type": "object", "properties": {f"p{i}": True for i in range(size)}}
    return {"type": "object", "properties": {f"o{i}": of for i in range(count)}}


@pytest.mark.parametrize("schema", [objects(1, 1990), objects(4, 990), objects(90, 90)])
def test_the_largest_schemas_compile_soon(schema) -> None:
    """The time grows with the square of an object's properties: about half a second here."""
    began = time.process_time()
    GRAMMARS.compile(json_source(schema))
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "source",
    [
        lambda: regex_source("((a{1,1000}){1,1000}){1,1000}b"),
        lambda: regex_source("(a|b)*a(a|b){200}"),
        lambda: json_source({"type": "array", "items": {"type": "string"}, "minItems": 10**9}),
        lambda: json_source({"enum": [f"value number {i}" for i in range(9000)]}),
        lambda: json_source({"$defs": doubling("anyOf"), "$ref": "#/$defs/0"}),
        lambda: json_source({"$defs": doubling("allOf"), "$ref": "#/$defs/0"}),
        lambda: lark_source('start: start start | "a" |'),
        lambda: lark_source("start: " + "(" * 5000 + '"a"' + ")" * 5000),
    ],
)
def test_grammars_made_to_be_slow(source) -> None:
    began = time.monotonic()
    try:
        matcher = GRAMMARS.compile(source()).matcher()
    except UserError:
        matcher = None
    rng = random.Random(0)
    for _ in range(50 if matcher else 0):
        allowed = bits(matcher.mask())
        if matcher.error or matcher.stopped:
            break
        assert matcher.take(rng.choice(allowed))
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("word", ["anyOf", "oneOf", "allOf"])
def test_tools_made_to_be_slow(word) -> None:
    """Each definition refers to the next twice, or a hundred times, in a parameter of a tool."""
    wide = {str(i): {word: [{"$ref": f"#/$defs/{i + 1}"}] * 100} for i in range(12)} | {"12": {"type": "integer"}}
    began = time.monotonic()
    for defs in (doubling(word), wide):
        root = {"type": "object", "properties": {f"p{i}": {"$ref": "#/$defs/0"} for i in range(50)}, "$defs": defs}
        for strict in (False, True):
            try:
                GRAMMARS.compile(calls_source([tool(root, strict=strict)], newlines=True))
            except UserError:
                continue
    assert time.monotonic() - began < 10


def test_of_two_tools_of_one_name_the_last_counts() -> None:
    tools = [tool(CITY), tool({"type": "object", "properties": {"n": {"type": "integer"}}})]
    grammar = GRAMMARS.compile(calls_source(tools, newlines=True))
    assert accepts(grammar, call(("n", "5"))) and not accepts(grammar, call(("city", "a")))


def doubling(word: str) -> dict[str, Any]:
    """Each refers to the next twice."""
    return {str(i): {word: [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(25)} | {"25": {"type": "integer"}}


def test_lenient_schemas_leave_out_what_cannot_be_enforced() -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    assert accepts(GRAMMARS.compile(json_source(schema, strict=False)), "[1, 1]")


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        schema = {"type": "array", "items": schema, "properties": {"a": schema}}
    with pytest.raises(UserError, match="the schema"):
        json_source(schema)


def test_compiled_grammars_are_kept_within_bounds() -> None:
    kept = Grammars(TOKENIZER, END_IDS)
    first = kept.compile(choice_source(["0"]))
    for i in range(300):
        kept.compile(choice_source([str(i)]))
        assert kept.compile(choice_source(["0"])) is first  # the one used last stays
    assert len(kept) <= 64


def test_places_in_one_grammar_are_apart() -> None:
    grammar = GRAMMARS.compile(regex_source("ab|cd"))
    one, other = grammar.matcher(), grammar.matcher()
    assert one.take(TOKENIZER.token_id("a"))
    assert bits(one.mask()) == [TOKENIZER.token_id("b")] and len(bits(other.mask())) == 2


# --- tool calls ------------------------------------------------------------------------------------------------------


def tool(parameters: Any, name: str = "look_up", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


LEAVES: list[dict[str, Any]] = [
    {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"},
    {"type": "string", "minLength": 2, "maxLength": 5}, {"type": "string", "enum": ["a", "5", "true", '"q"', ""]},
    {"type": "string", "pattern": "^a|b+"}, {"type": "string", "pattern": r"^\d{2}/\w$"},
    {"type": "integer", "minimum": 3, "maximum": 40}, {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": ["string", "null"]}, {"type": ["integer", "string"]}, {"type": ["number", "null"]},
    {"enum": ["x", 1, None, True, {"k": [1]}, "1.5"]}, {"const": 7}, {"const": "seven"},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 5}]},
    {"anyOf": [{"type": "boolean"}, {"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
    {"anyOf": [{"type": "string", "minLength": 1}, {"type": "object", "properties": {"n": {"type": "integer"}},
     "required": ["n"], "additionalProperties": False}]},
    {"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, {"$ref": "#/$defs/level"}, {"$ref": "#/$defs/tree"},
    {"type": "string", "format": "date"}, {"type": "string", "format": "email"}, {},
]  # fmt: skip
DEFS = {
    "level": {"type": "string", "enum": ["low", "high"]},
    "tree": {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "sub": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        "required": ["v"],
        "additionalProperties": False,
    },
}


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.random()
    if depth == 0 or kind < 0.6:
        return rng.choice(LEAVES)
    if kind < 0.8:
        return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": rng.randint(1, 3)}
    return random_parameters(rng, depth - 1) | {"additionalProperties": False}


def random_parameters(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["city", "days", "a b", "x-1", "käse", "o"], rng.randint(0, 4))
    properties = {name: random_schema(rng, depth) for name in names}
    return {"type": "object", "properties": properties, "required": [n for n in names if rng.random() < 0.6]}


@pytest.mark.few(4)
@pytest.mark.parametrize("newlines", [True, False], ids=["4.5", "4.7"])
@pytest.mark.parametrize("seed", range(6))
def test_calls_are_valid_by_their_schemas(newlines, seed) -> None:
    """Random tools, random ways through their grammar: what is read back is what the schemas allow."""
    rng = random.Random(seed)
    for _ in range(4):
        schemas = {f"f{i}": random_parameters(rng, 2) | {"$defs": DEFS} for i in range(rng.randint(1, 3))}
        tools = [tool(schema, name, strict=True) for name, schema in schemas.items()]
        parallel = rng.random() < 0.5
        grammar = GRAMMARS.compile(calls_source(tools, newlines=newlines, parallel=parallel))
        for _ in range(8):
            text = walk(grammar, rng)
            found = parse_output(text, tools, thinking=False, compact=not newlines)
            assert found.tool_calls and not found.truncated and found.content is None and not found.unknown_tools, text
            assert len(found.tool_calls) == text.count("<tool_call>") and (parallel or len(found.tool_calls) == 1)
            assert ("\n<arg_value>" in text) == (newlines and "<arg_value>" in text)
            for call in found.tool_calls:
                schema = schemas[call.name]
                assert call.arguments.keys() <= schema["properties"].keys(), text
                jsonschema.validate(call.arguments, schema)


@pytest.mark.few(9)
@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: json.dumps(leaf)[:40])
def test_each_kind_of_value(leaf) -> None:
    tools = [tool({"type": "object", "properties": {"x": leaf}, "required": ["x"], "$defs": DEFS}, strict=True)]
    grammar, rng = GRAMMARS.compile(calls_source(tools, newlines=True)), random.Random(3)
    for _ in range(30):
        text = walk(grammar, rng)
        for call in parse_output(text, tools, thinking=False).tool_calls:
            jsonschema.validate(call.arguments["x"], {**leaf, "$defs": DEFS})


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": ["integer", "string"]}, ["5", "-7", "5 km", "true", "[5]"], ["5.5", " 5", "05", '"5"']),
        ({"type": ["number", "string"]}, ["1.5", "-2e5", "x1", "1 2 x"], ["1.5 ", "007", "\u00a05", "1e999"]),
        ({"type": ["string", "null"]}, ["null", "nulls", "", "5"], [" null"]),
        ({"enum": ["x", 1, None, {"k": [1]}]}, ["x", "1", "null", '{"k": [1]}'], ["2", '"x"', "X", ""]),
        ({"enum": ["5", 5, "null", None, True]}, ["5", "null", "true"], []),
        ({"type": "string", "maxLength": 3}, ["", "abc", "äöü"], ["abcd", '"a"']),
        ({"type": "string", "pattern": "b|c$"}, ["abx", "ac", "b"], ["", "a", "ca"]),
        ({"type": "array", "items": {"type": "string"}}, ['["a", "b"]', "[]", '[ "a" ]'], ["a", "[1]", '["a"']),
        ({"anyOf": [{"type": "integer", "minimum": 5}, {"type": "string"}]}, ["5", "x5"], ["4", "-1", "5x"]),
        ({"type": "boolean"}, ["true", "false"], ["True", "1"]),
        ({"type": "string", "nullable": True, "enum": ["a"]}, ["a", "null"], ["b"]),
        ({"anyOf": [{"type": "object", "required": ["n"]}, {"type": "string"}]}, ['{"n": 1}', "n", "[1]"], ["{", "{}"]),
        (
            {"type": ["array", "string", "boolean"], "items": {"type": "integer"}},
            ["[1]", "a", "true"],
            ["[", '["a"]', " true", "TRUE"],
        ),
    ],
    ids=str,
)
def test_values_one_by_one(schema, good, bad) -> None:
    tools = [tool({"type": "object", "properties": {"x": schema}, "required": ["x"]})]
    grammar = GRAMMARS.compile(calls_source(tools, newlines=True))
    assert [text for text in good if not accepts(grammar, call(("x", text)))] == []
    assert [text for text in bad if accepts(grammar, call(("x", text)))] == []


def call(*pairs: tuple[str, str], name: str = "look_up") -> str:
    body = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in pairs)
    return f"<tool_call>{name}\n{body}</tool_call>"


CITY = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}, "required": ["city"]}


def test_what_calls_must_look_like() -> None:
    tools = [tool(CITY), tool(None, "now")]
    grammar = GRAMMARS.compile(calls_source(tools, newlines=True))
    good = [call(("city", "Paris")), call(("city", ' "x" <b> {1}\n'), ("n", "-5")), call(name="now")]
    assert all(accepts(grammar, text) for text in [*good, "\n".join(good)])
    bad = [
        "", "Paris", call(), call(("n", "5")), call(("city", "a"), ("n", "5.5")), call(("city", "a"), ("m", "5")),
        call(("n", "5"), ("city", "a")), call(("city", "a"), name="look"), good[0] + good[0], "\n" + good[0],
        good[0].replace("\n", ""), call(("city", "a"), ("city", "b")),
    ]  # fmt: skip
    assert not any(accepts(grammar, text) for text in bad)
    one = GRAMMARS.compile(calls_source(tools, newlines=True, parallel=False))
    assert accepts(one, good[0]) and not accepts(one, "\n".join(good))


def test_tags_that_are_spelled_out_end_no_value() -> None:
    grammar = GRAMMARS.compile(calls_source([tool(CITY)], newlines=True))
    matcher = grammar.matcher()
    head = TOKENIZER.encode("<tool_call>look_up\n<arg_key>city</arg_key>\n<arg_value>x</arg_value")
    *_, last = spelled = TOKENIZER.encode("</arg_value>", allow_special=False)
    assert all(matcher.take(t) for t in [*head[: -len(TOKENIZER.encode("</arg_value"))], *spelled[:-1]])
    assert last not in bits(matcher.mask()) and TOKENIZER.token_id("</arg_value>") in bits(matcher.mask())


def test_text_beside_calls_that_are_strict() -> None:
    tools = [tool({**CITY, "additionalProperties": False}, strict=True), tool(CITY, "loose")]
    grammar = GRAMMARS.compile(calls_source(tools, newlines=True, required=False))
    good = call(("city", "Paris"))
    free = call(("anything", "at all"), name="loose")
    assert all(accepts(grammar, text) for text in ("", "Hello.", good, f"Hm.\n{good}", f"{good}\n{good} Done", free))
    assert not any(accepts(grammar, text) for text in (call(("m", "1")), f"Hm. {call()}", "<tool_call>", "<think>"))
    spelled = TOKENIZER.encode("<tool_call>", allow_special=False)
    matcher = grammar.matcher()
    assert all(matcher.take(token) for token in spelled[:-1]) and not matcher.take(spelled[-1])
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    for source, right in ((json_source(schema), '{"a": 1}'), (regex_source("ab?"), "ab")):
        either = GRAMMARS.compile(calls_source(tools, newlines=True, required=False, content=source))
        assert accepts(either, right) and accepts(either, good) and not accepts(either, "Hello.")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "colour"}, "format 'colour'"),
        ({"type": "string", "not": {"const": "a"}}, "'not' cannot be enforced"),
        ({"minLength": 3}, "not their type"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "may hold at once"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"$ref": "#/properties/x"}, "without end"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"enum": []}, "no value"),
    ],
)
def test_strict_tools_refuse_what_cannot_be_enforced(schema, message) -> None:
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    with pytest.raises(UserError, match=message):
        GRAMMARS.compile(calls_source([tool(parameters, strict=True)], newlines=True))


WORDS = (
    "type properties required items enum const anyOf oneOf allOf $ref minLength pattern format minimum multipleOf not "
    "additionalProperties nullable prefixItems $defs"
).split()
SCALARS = ["string", "integer", "object", "array", "null", "#", "#/properties/a", "date", "^a", "(", "a|b$", '"q"', ""]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10) | st.floats(allow_nan=False) | st.sampled_from(SCALARS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=200, deadline=None)
@example(properties={"a": {"const": None, "type": None}}, strict=True)
@given(properties=st.dictionaries(st.sampled_from(["a", "b c", "<", ""]), ODD, max_size=3), strict=st.booleans())
def test_any_schema_is_kept_to_or_refused(properties, strict) -> None:
    schema = {"type": "object", "properties": properties, "required": ["a"]}
    tools = [tool(schema, strict=strict)]
    try:
        grammar = GRAMMARS.compile(calls_source(tools, newlines=True))
    except UserError:
        return
    for found in parse_output(walk(grammar, random.Random(0)), tools, thinking=False).tool_calls:
        if strict:
            jsonschema.Draft202012Validator(schema).validate(found.arguments)


def test_tools_that_are_not_strict_leave_it_out() -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}, "minProperties": 1}
    grammar = GRAMMARS.compile(calls_source([tool(parameters)], newlines=True))
    assert accepts(grammar, call(("x", "[1, 1]"))) and not accepts(grammar, call(("x", "1")))
    free = GRAMMARS.compile(calls_source([tool({"type": "object"})], newlines=True))
    assert accepts(free, call(("any", "5"), ("thing", "x"))) and accepts(free, call())
    for nothing in (None, {}, {"type": "object", "properties": {}}):
        none = GRAMMARS.compile(calls_source([tool(nothing)], newlines=True))
        assert accepts(none, call()) and not accepts(none, call(("any", "5")))
