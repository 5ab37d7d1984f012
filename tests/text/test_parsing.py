"""Reasoning, content and tool calls out of text: what counts as what, streams, hostile texts."""

import itertools
import json
import re
import time
from pathlib import Path

import prove_parsing
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.errors import UserError
from glm45_jax.text import StreamParser, parse_output, render_chat

TOOLS = prove_parsing.TOOLS


def parsed(text, thinking=False, tools=TOOLS):
    """Reasoning, content and calls of a text that gives the same for every cut."""
    whole = prove_parsing.check(text, thinking, tools, every_cut=True)
    return whole.reasoning, whole.content, [(call.name, call.arguments) for call in whole.tool_calls]


def call(key, value):
    return f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>"


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("\n<think>\na\n</think>\n\nb\n", True, "a", "b"),  # GLM-4.5 opens the thought itself
        ("a</think>b", True, "a", "b"),  # GLM-4.7's prompt has opened it
        ("<think></think>\nb", True, None, "b"),
        ("</think>b", True, None, "b"),
        ("a <think> b</think>c", True, "a <think> b", "c"),
        ("no end", True, "no end", None),
        ("", True, None, None),
        (" \n ", False, None, None),
        ("a</thin", True, "a</thin", None),
        ("no thought", False, None, "no thought"),
        (" <think>a</think>b", False, "a", "b"),  # asked not to think, it did
        ("b</think>c", False, None, "bc"),
        (
            "a</think>the tags <think> and </think> are text here</think>",
            True,
            "a",
            "the tags <think> and </think> are text here",
        ),
        ("  two\n\n  lines  ", False, None, "two\n\n  lines"),
        ("a < b > c </arg_value> <arg_key> </tool_call>", False, None, "a < b > c </arg_value> <arg_key> </tool_call>"),
    ],
)
def test_reasoning_and_content(text, thinking, reasoning, content):
    assert parsed(text, thinking) == (reasoning, content, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("<tool_call>get_time</tool_call>", None, [("get_time", {})]),
        ("<tool_call>get_time\n</tool_call>", None, [("get_time", {})]),
        ("<tool_call>\n get_time \n</tool_call>", None, [("get_time", {})]),
        ("a\n" + call("i", "1") + "\nb\n" + call("i", "2") + "\nc", "a\n\nb\n\nc", [("f", {"i": 1}), ("f", {"i": 2})]),
        # two arguments, indented, with a key that has no value and a value that has no key
        (
            "<tool_call>f\n  <arg_key>s</arg_key>\n  <arg_value> x </arg_value>\n  <arg_key>i</arg_key>\n  "
            "<arg_key>b</arg_key>\n<arg_value>true</arg_value>\n<arg_value>y</arg_value></tool_call>",
            None,
            [("f", {"s": " x ", "b": True})],
        ),
        (call("", "1"), None, [("f", {})]),
        (call(" s ", "1"), None, [("f", {"s": "1"})]),
        ("<tool_call>f<arg_key>s<arg_value>x</arg_value></tool_call>", None, [("f", {})]),
        ("<tool_call>f<arg_key>s</tool_call>a", "a", [("f", {})]),
        ("<tool_call></tool_call>", None, []),
        # unknown tools are left out, the text around them is not
        ("a <tool_call>g</tool_call> b " + call("i", "1"), "a  b", [("f", {"i": 1})]),
        ("<tool_call>g<arg_key>s</arg_key><arg_value>x</arg_value></tool_call>", None, []),
        # tags in prose are prose
        ("write <tool_call> and a name", "write <tool_call> and a name", []),
        ("a <tool_call>\n" + call("i", "1"), "a <tool_call>", [("f", {"i": 1})]),
        (
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
            [],
        ),
        ("<tool_call>f<b></tool_call>", "<tool_call>f<b></tool_call>", []),
        ("<tool_call>  ", "<tool_call>", []),
        ("<tool_call>get_tim", "<tool_call>get_tim", []),
        ("<tool_call>get_time\n", "<tool_call>get_time", []),
        # tags in values are text, unless they end it
        (call("s", "<tool_call>f</tool_call> <arg_key>"), None, [("f", {"s": "<tool_call>f</tool_call> <arg_key>"})]),
        (call("s", "a</arg_value>b"), None, [("f", {"s": "a</arg_value>b"})]),
        (call("s", "a</arg_value>\n\\n b"), None, [("f", {"s": "a</arg_value>\n\\n b"})]),
        (call("s", "a</arg_value></arg_value>"), None, [("f", {"s": "a</arg_value></arg_value>"})]),
        (call("s", "a</arg_val"), None, [("f", {"s": "a</arg_val"})]),
        # forgotten ends
        (
            "<tool_call>f<arg_key>s</arg_key><arg_value>x</arg_value>" + call("i", "1"),
            None,
            [("f", {"s": "x"}), ("f", {"i": 1})],
        ),
        ("<tool_call>f<arg_key>s</arg_key><arg_value>x</arg_value>", None, [("f", {"s": "x"})]),
        ("<tool_call>f<arg_key>s</arg_key><arg_value>x</tool_call>\n", None, [("f", {"s": "x"})]),
        ("<tool_call>f<arg_key>s</arg_key><arg_value>x</arg_v", None, [("f", {"s": "x</arg_v"})]),
        ("<tool_call>f<arg_key>o</arg_key><arg_value>{", None, [("f", {"o": "{"})]),
        ("<tool_call>f<arg_key>s</arg_key>", None, [("f", {})]),
        ("<tool_call>f<arg_key>s", None, [("f", {})]),
        # newlines written as two characters
        ("<tool_call>f\\n<arg_key>s</arg_key>\\n<arg_value>x</arg_value>\\n</tool_call>", None, [("f", {"s": "x"})]),
    ],
)
def test_calls(text, content, calls):
    assert parsed(text) == (None, content, calls)


def test_calls_end_the_thought():
    assert parsed("<think>I see " + call("i", "1") + " b</think>c", True) == ("I see", "bc", [("f", {"i": 1})])
    assert parsed("about <tool_call> tags</think>c", True) == ("about <tool_call> tags", "c", [])
    assert parsed("<tool_call></tool_call>a</think>c", True) == ("a", "c", [])


def test_without_tools_every_call_counts():
    assert parsed(call("x", "1") + call("y", "a"), tools=None) == (None, None, [("f", {"x": 1}), ("f", {"y": "a"})])
    assert parsed("<tool_call>a.b-c/d</tool_call>", tools=[]) == (None, None, [("a.b-c/d", {})])


def test_what_was_left_out_and_cut_short_is_told():
    whole = parse_output("<tool_call>g</tool_call><tool_call>h<arg_key>", TOOLS)
    assert whole.unknown_tools == ("g", "h") and whole.truncated and whole.tool_calls == ()
    assert not parse_output("a<tool_call>", TOOLS).truncated


def test_a_name_alone():
    """GLM-4.7 calls so without arguments; in GLM-4.5's layout the newline is missing, and with it what would follow."""
    optional = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tools = [{"name": "f", "parameters": optional}, {"name": "now"}]
    for blank, compact in itertools.product(("", "\n", " ", "\\n"), (False, True)):
        text = f"<tool_call>f{blank}</tool_call><tool_call>now{blank}</tool_call>"
        found = prove_parsing.check(text, False, tools, every_cut=True, compact=compact)
        kept = bool(blank) or compact
        assert [call.name for call in found.tool_calls] == (["f", "now"] if kept else ["now"])
        assert found.unfinished_names == (() if kept else ("f",)) and found.content is None
    (one,) = parse_output("<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>", tools).tool_calls
    assert one.arguments == {"x": 1}


def test_a_key_that_comes_twice():
    (only,) = parse_output("<tool_call>f" + 2 * "<arg_key>i</arg_key><arg_value>1</arg_value>", TOOLS).tool_calls
    assert only.json == '{"i": 1, "i": 1}' and only.arguments == {"i": 1}


def test_ids():
    ids = [call.id for call in parse_output(call("i", "1") * 100, TOOLS).tool_calls]
    assert len(set(ids)) == 100 and all(id_.startswith("call_") for id_ in ids)
    numbers = map(str, itertools.count(7)).__next__
    assert [call.id for call in parse_output(call("i", "1") * 2, TOOLS, new_id=numbers).tool_calls] == ["7", "8"]


def test_the_message_goes_back_into_a_conversation():
    whole = parse_output("a</think>b" + call("s", "x"), TOOLS, new_id=lambda: "1")
    assert whole.message() == {
        "role": "assistant",
        "content": "b",
        "reasoning_content": "a",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"s": "x"}'}}],
    }
    text = render_chat(
        [{"role": "user", "content": "x"}, whole.message()], template="glm-4.7", add_generation_prompt=False
    )
    assert text.endswith("<|assistant|><think>a</think>b" + call("s", "x"))
    assert parse_output("", TOOLS).message() == {"role": "assistant", "content": None}


@pytest.mark.parametrize("tools", [{"name": "f"}, "f", [1], [{}], [{"function": {"name": 1}}], [{"function": "f"}]])
def test_bad_tools_are_refused(tools):
    with pytest.raises(UserError, match="tools"):
        parse_output("", tools)


def test_the_example_of_the_docs_runs():
    page = Path(__file__).parents[2] / "docs" / "parsing.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    scope: dict = {}
    exec(example, scope)
    assert (scope["out"].reasoning, scope["out"].content) == ("They want a forecast.", "Let me look.")
    assert scope["out"].tool_calls[0].arguments == {"city": "Paris", "days": 3}


# --- streams ---------------------------------------------------------------------------------------------------------


def deltas(*chunks, thinking=False):
    """What each chunk gives, in short: pieces of text, (name, arguments) of calls."""
    parser = StreamParser(TOOLS, thinking)

    def short(delta):
        (value,) = delta.values()
        if isinstance(value, str):
            return value
        (part,) = value
        return part["function"].get("name", part["index"]), part["function"]["arguments"]

    return [[short(delta) for delta in parser.feed(chunk)] for chunk in chunks] + [[*map(short, parser.finish())]]


def test_the_form_of_deltas():
    parser = StreamParser(TOOLS, new_id=lambda: "1")
    assert parser.feed("a</think>b") == [{"reasoning_content": "a"}, {"content": "b"}]
    assert parser.feed("<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>x") == [
        {
            "tool_calls": [
                {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": '{"s": "x'}}
            ]
        }
    ]
    assert parser.feed("y") == [{"tool_calls": [{"index": 0, "function": {"arguments": "y"}}]}]
    assert parser.feed("") == []
    assert parser.finish() == [{"tool_calls": [{"index": 0, "function": {"arguments": '"}'}}]}]
    assert parser.finish() == []
    with pytest.raises(ValueError, match="finished"):
        parser.feed("more")


def test_text_comes_at_once_but_for_what_may_begin_a_tag():
    assert deltas("a", " b", " ", "<", "c </tool", "_cal", "m>") == [
        ["a"],
        [" b"],
        [],
        [],
        [" <c"],
        [],
        [" </tool_calm>"],
        [],
    ]
    assert deltas("a\n", "\n", "b\n") == [["a"], [], ["\n\nb"], []]
    assert deltas(" ", "\na", thinking=True) == [[], ["a"], []]


def test_names_come_whole_and_strings_as_they_come():
    chunks = [
        "<tool_call>get",
        "_time\n",
        "</tool_call>",
        "<tool_call>f",
        "<arg_key>s</arg_key>",
        "<arg_value>a\n",
        '"',
        "b</",
        "arg_value>",
    ]
    assert deltas(*chunks, "</tool_call>") == [
        [],
        [],
        [("get_time", "{}")],
        [],
        [("f", "")],
        [(1, '{"s": "a\\n')],
        [(1, '\\"')],
        [(1, "b")],
        [],
        [(1, '"}')],
        [],
    ]


@pytest.mark.parametrize(
    ("key", "pieces", "first"),
    [
        ("s", ['"""Doc', "string"], '"\\"\\"\\"Docstring'),  # quotes that text follows are text
        ("s", ['"', "use strict", '"', ";"], '"\\"use strict\\";'),
        ("s", ["  indented"], '"  indented'),
        ("m", ["no", "t"], '"not'),  # may be null no more
        ("m", ["nul", "ls"], None),
        ("s", ['"a', "b"], None),
        ("i", ["1", "2"], None),
        ("u", ["text"], '"text'),
        ("u", ["tr", "y"], '"try'),
        ("u", ["[not", " JSON"], None),
    ],
)
def test_what_is_held(key, pieces, first):
    """The first piece of JSON that comes before the end of a value."""
    parser = StreamParser(TOOLS)
    parser.feed(f"<tool_call>f<arg_key>{key}</arg_key><arg_value>")
    found = [delta for piece in pieces for delta in parser.feed(piece)]
    text = "".join(delta["tool_calls"][0]["function"]["arguments"] for delta in found)
    assert text == ("" if first is None else f'{{"{key}": {first}')


# --- any text --------------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.sampled_from([*prove_parsing.FRAGMENTS, "s</arg_key>"]) | st.text(max_size=4), max_size=25).map(
    "".join
)


@given(text=TEXTS, thinking=st.booleans(), tools=st.sampled_from([TOOLS, None]), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=500)
def test_any_text(text, thinking, tools, seed):
    prove_parsing.check(text, thinking, tools, seed)


@given(value=TEXTS, key=st.sampled_from([*prove_parsing.PROPERTIES, "z"]))
@settings(deadline=None, max_examples=500)
def test_any_value(value, key):
    prove_parsing.check(f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>", False)


@given(data=st.binary(max_size=300))
@settings(deadline=None, max_examples=500)
def test_any_bytes(data):
    prove_parsing.check_bytes(data)


@given(message=prove_parsing.messages(), template=st.sampled_from(["glm-4.5", "glm-4.7"]))
@settings(deadline=None, max_examples=200)
def test_conversations_come_back(message, template):
    prove_parsing.check_message(message, template)


@pytest.mark.parametrize("seed", prove_parsing.SEEDS)
@pytest.mark.parametrize("thinking", [False, True])
def test_seeds_of_the_fuzzer(seed, thinking):
    prove_parsing.check(seed, thinking, every_cut=True)


@pytest.mark.few(6)
@pytest.mark.parametrize("name", prove_parsing.HOSTILE)
def test_time_grows_with_the_length(name):
    """Eight times the text: eight times the time if linear, sixty-four if quadratic."""
    make = prove_parsing.HOSTILE[name]
    for chunk, length in ((None, 2**14), (3, 2**12)):
        short, long = (prove_parsing.seconds_for(make(n), chunk or n * 2) for n in (length, length * 8))
        assert long < 24 * short + 0.005, (chunk, short, long)


def test_a_megabyte_in_small_chunks():
    text = "a</think>" + call("s", "words and <tags> " * 60_000) + "b" * 50_000
    parser, begin = StreamParser(TOOLS), time.process_time()
    pieces = [delta for at in range(0, len(text), 8) for delta in parser.feed(text[at : at + 8])]
    assert len(pieces) > 100_000 and parser.finish() == []
    assert time.process_time() - begin < 10
    joined = "".join(d["tool_calls"][0]["function"]["arguments"] for d in pieces if "tool_calls" in d)
    assert json.loads(joined) == {"s": "words and <tags> " * 60_000}
