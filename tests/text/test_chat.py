"""The built-in chat formats: what each kind of message renders to, and what is refused."""

import threading
import time

import pytest

from glm45_jax.errors import UserError
from glm45_jax.text import builtin_template, render_chat

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
HEAD_45, HEAD_47 = "[gMASK]<sop><|user|>\nq", "[gMASK]<sop><|user|>q"


def user(content):
    return {"role": "user", "content": content}


def assistant(content: object = "", **fields: object):
    return {"role": "assistant", "content": content, **fields}


def tool(content):
    return {"role": "tool", "content": content}


def call(name, arguments):
    return {"id": "c0", "type": "function", "function": {"name": name, "arguments": arguments}}


def both(messages, **kwargs):
    """The conversation in both formats, without the generation prompt unless asked for."""
    kwargs = {"add_generation_prompt": False} | kwargs
    return tuple(render_chat(messages, template=name, **kwargs) for name in ("glm-4.5", "glm-4.7"))


def turns(*messages, **kwargs):
    """What follows the user's question `q`, in both formats."""
    old, new = both([user("q"), *messages], **kwargs)
    assert old.startswith(HEAD_45) and new.startswith(HEAD_47)
    return old[len(HEAD_45) :], new[len(HEAD_47) :]


@pytest.mark.parametrize(
    ("thinking", "old", "new"),
    [
        (True, "<|assistant|>", "<|assistant|><think>"),
        (False, "/nothink<|assistant|>\n<think></think>", "<|assistant|></think>"),
        (None, "/nothink<|assistant|>\n<think></think>", "<|assistant|></think>"),
    ],
)
def test_generation_prompt(thinking, old, new):
    assert turns(add_generation_prompt=True, enable_thinking=thinking) == (old, new)


def test_defaults_are_glm45_with_prompt_and_thinking():
    assert render_chat([user("Hello")]) == "[gMASK]<sop><|user|>\nHello<|assistant|>"


def test_nothink_goes_on_every_user_turn_once_and_only_at_its_end():
    old, new = both([user("a"), assistant("b"), user("c/nothink"), user("/nothink d")], enable_thinking=False)
    assert old == (
        "[gMASK]<sop><|user|>\na/nothink<|assistant|>\n<think></think>\nb<|user|>\nc/nothink"
        "<|user|>\n/nothink d/nothink"
    )
    assert new == "[gMASK]<sop><|user|>a<|assistant|></think>b<|user|>c/nothink<|user|>/nothink d"


def test_empty_conversation():
    assert both([]) == ("[gMASK]<sop>",) * 2


def test_tools_block():
    tools = [{"name": "find", "description": 'a <b> & "ü"'}, WEATHER]
    old, new = both([{"role": "system", "content": "S"}, user("q")], tools=tools)
    signatures = (
        "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"name": "find", "description": "a <b> & \\"ü\\""}\n'
        '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}\n'
        "</tools>\n\n"
        "For each function call, output the function name and arguments within the following XML format:\n"
    )
    assert old == (
        f"[gMASK]<sop>{signatures}<tool_call>{{function-name}}\n<arg_key>{{arg-key-1}}</arg_key>\n"
        "<arg_value>{arg-value-1}</arg_value>\n<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n"
        "...\n</tool_call><|system|>\nS<|user|>\nq"
    )
    assert new == (
        f"[gMASK]<sop>{signatures}<tool_call>{{function-name}}<arg_key>{{arg-key-1}}</arg_key>"
        "<arg_value>{arg-value-1}</arg_value><arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>"
        "...</tool_call><|system|>S<|user|>q"
    )
    assert both([user("q")], tools=[]) == both([user("q")]) == both([user("q")], tools=None)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("image", [[], [{"type": "image_url", "image_url": {"url": "u"}}], [{"type": "text"}]])
def test_list_content_is_its_text(role, image):
    parts = [{"type": "text", "text": "x "}, *image, "y"]
    assert both([{"role": role, "content": parts}]) == both([{"role": role, "content": "x y"}])


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_null_and_missing_content_render_nothing(role):
    assert both([{"role": role, "content": None}]) == both([{"role": role}]) == both([{"role": role, "content": ""}])


def test_whitespace_is_the_users_own_and_stripped_from_the_assistant():
    old, new = both([{"role": "system", "content": " s\n"}, user("\n u "), assistant("\n a \n"), tool(" t\n")])
    assert old == (
        "[gMASK]<sop><|system|>\n s\n<|user|>\n\n u <|assistant|>\n<think></think>\na"
        "<|observation|>\n<tool_response>\n t\n\n</tool_response>"
    )
    assert new == (
        "[gMASK]<sop><|system|> s\n<|user|>\n u <|assistant|></think>a"
        "<|observation|><tool_response> t\n</tool_response>"
    )


@pytest.mark.parametrize(
    ("message", "old", "new"),
    [
        (assistant("a", reasoning_content=" r\n"), "<think>r</think>\na", "<think>r</think>a"),
        (assistant("a", reasoning_content=""), "<think></think>\na", "</think>a"),
        (assistant("a", reasoning_content=None), "<think></think>\na", "</think>a"),
        (assistant("a", reasoning_content=" "), "<think></think>\na", "<think></think>a"),
        (assistant("<think>\nr\n</think>\n\na"), "<think>r</think>\na", "<think>r</think>a"),
        (assistant("<think>\n\n</think>a"), "<think></think>\na", "</think>a"),
        (assistant("r</think>a"), "<think>r</think>\na", "<think>r</think>a"),
        (assistant("pre<think>r</think>a"), "<think>r</think>\na", "<think>r</think>a"),
        (assistant("<think>r</think>m</think>a"), "<think>r</think>\na", "<think>r</think>a"),
        (assistant("<think>open"), "<think></think>\n<think>open", "</think><think>open"),
        (assistant("x</think>a", reasoning_content="r"), "<think>r</think>\nx</think>a", "<think>r</think>x</think>a"),
        (assistant([{"type": "text", "text": "r</think>a"}]), "<think>r</think>\na", "<think>r</think>a"),
        (assistant("", reasoning_content="r"), "<think>r</think>", "<think>r</think>"),
    ],
)
def test_reasoning_of_the_last_turn_is_kept(message, old, new):
    assert turns(message) == ("<|assistant|>\n" + old, "<|assistant|>" + new)


def test_reasoning_of_earlier_turns_is_dropped_unless_clear_thinking_is_off():
    history = [assistant("a", reasoning_content="r"), user("next"), assistant("b", reasoning_content="s")]
    forgotten = (
        "<|assistant|>\n<think></think>\na<|user|>\nnext<|assistant|>\n<think>s</think>\nb",
        "<|assistant|></think>a<|user|>next<|assistant|><think>s</think>b",
    )
    kept = "<|assistant|><think>r</think>a<|user|>next<|assistant|><think>s</think>b"
    assert turns(*history) == turns(*history, clear_thinking=True) == forgotten
    assert turns(*history, clear_thinking=False) == (forgotten[0], kept)


def test_tool_results_do_not_end_the_turn_whose_reasoning_is_kept():
    old, new = turns(
        assistant(reasoning_content="r1", tool_calls=[call("f", {})]), tool("1"), assistant("a", reasoning_content="r2")
    )
    assert old == (
        "<|assistant|>\n<think>r1</think>\n<tool_call>f\n</tool_call><|observation|>\n<tool_response>\n1\n"
        "</tool_response><|assistant|>\n<think>r2</think>\na"
    )
    assert new == (
        "<|assistant|><think>r1</think><tool_call>f</tool_call><|observation|><tool_response>1</tool_response>"
        "<|assistant|><think>r2</think>a"
    )


ARGUMENTS = {"s": 'a "b"\n <c> ', "n": 1.5, "b": True, "z": None, "o": {"k": ["é", {}]}, "e": ""}


@pytest.mark.parametrize(
    "arguments",
    [ARGUMENTS, '{"s": "a \\"b\\"\\n <c> ", "n": 1.5, "b": true, "z": null, "o": {"k": ["\\u00e9", {}]}, "e": ""}'],
)
def test_tool_call_arguments(arguments):
    old, new = turns(assistant("t", tool_calls=[call("f", arguments), {"name": "g", "arguments": {}}]))
    values = [
        ("s", 'a "b"\n <c> '),
        ("n", "1.5"),
        ("b", "true"),
        ("z", "null"),
        ("o", '{"k": ["é", {}]}'),
        ("e", ""),
    ]
    lines = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values)
    assert old == (f"<|assistant|>\n<think></think>\nt\n<tool_call>f\n{lines}</tool_call>\n<tool_call>g\n</tool_call>")
    pairs = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in values)
    assert new == f"<|assistant|></think>t<tool_call>f{pairs}</tool_call><tool_call>g</tool_call>"


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_calls_without_arguments(arguments):
    assert turns(assistant(tool_calls=[call("f", arguments)])) == turns(assistant(tool_calls=[{"name": "f"}]))
    assert turns(assistant("a", tool_calls=None)) == turns(assistant("a", tool_calls=[])) == turns(assistant("a"))


def test_observation_once_per_run_of_tool_messages():
    results = ("1", "2")
    old = "".join(f"\n<tool_response>\n{r}\n</tool_response>" for r in results)
    new = "".join(f"<tool_response>{r}</tool_response>" for r in results)
    expected = ("<|observation|>" + old, "<|observation|>" + new)
    assert turns(tool("1"), tool("2")) == expected
    assert turns(tool([{"type": "text", "text": "1"}]), tool([{"type": "text", "text": "2"}])) == expected
    assert turns(tool([{"output": "1"}, {"output": "2"}])) == turns(tool(["1", "2"])) == expected
    apart = turns(tool("1"), assistant("a"), tool("2"))
    assert all(text.count("<|observation|>") == 2 for text in apart)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}], "ab"),
        ([{"output": {"é": True}}], '{"é": true}'),
        ([{"type": "function_call_output", "output": "o"}], "o"),
        ([{"temp": 21}], '{"temp": 21}'),
        ([], ""),
        (7, "7"),
    ],
)
def test_tool_content_is_text_and_never_a_python_repr(content, text):
    assert turns(tool(content)) == turns(tool(text))


@pytest.mark.parametrize(
    ("names", "same_as"),
    [
        (("glm-4.5-air", "glm-4.6", "glm45", "GLM-4.5-Air-Base", "zai-org/GLM-4.5-FP8", "glm46"), "glm-4.5"),
        (("glm47", "zai-org/GLM-4.7", "glm-4.7-fp8"), "glm-4.7"),
    ],
)
def test_template_names(names, same_as):
    for name in names:
        assert render_chat([user("q")], template=name) == render_chat([user("q")], template=same_as)
    assert render_chat([user("q")], template=builtin_template(same_as)) == render_chat([user("q")], template=same_as)


@pytest.mark.parametrize("name", ["glm-4", "glm-4.5v", "glm-4.7-flash", "llama", ""])
def test_unknown_template(name):
    with pytest.raises(UserError, match="no chat template"):
        render_chat([user("q")], template=name)


CYCLE: list = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", r"messages: expected a list of objects, got str"),
        ({"role": "user"}, r"messages: expected a list"),
        ([user("a"), "b"], r"messages\[1\]: expected an object, got str"),
        ([user("a"), {"content": "b"}], r"messages\[1\]: it has no role"),
        ([{"role": "developer", "content": "b"}], r"messages\[0\]: unknown role 'developer'; expected one of system"),
        ([user({"a": 1})], r"messages\[0\].content: expected a string, a list of parts or null, got dict"),
        ([user(["a", 3])], r"messages\[0\].content\[1\]: expected a string or an object, got int"),
        ([assistant(tool_calls=[call("f", "{bad")])], r"messages\[0\].tool_calls\[0\].arguments: not valid JSON"),
        ([assistant(tool_calls=[call("f", "[1]")])], r"messages\[0\].tool_calls\[0\].arguments: expected an object"),
        ([assistant(tool_calls=[call("f", "[" * 10**5)])], r"messages\[0\].tool_calls\[0\].arguments: not valid JSON"),
        ([assistant(tool_calls=[call("f", 3)])], r"arguments: expected an object or a JSON string of one, got int"),
        ([assistant(tool_calls=[{"function": {"arguments": {}}}])], r"tool_calls\[0\]: a tool call needs a name"),
        ([assistant(tool_calls={"name": "f"})], r"messages\[0\].tool_calls: expected a list"),
        ([user("a"), assistant(tool_calls=[call("f", {"x": {1}})])], r"messages\[1\]: not plain JSON.*set"),
        ([user("a"), assistant(tool_calls=[call("f", {"x": CYCLE})])], r"messages\[1\]: not plain JSON"),
    ],
)
@pytest.mark.parametrize("template", ["glm-4.5", "glm-4.7"])
def test_malformed_messages_are_refused_by_index(messages, match, template):
    with pytest.raises(UserError, match=match):
        render_chat(messages, template=template)


def test_malformed_tools_are_refused():
    with pytest.raises(UserError, match=r"tools\[1\]: expected an object, got str"):
        render_chat([user("q")], tools=[WEATHER, "f"])
    with pytest.raises(UserError, match=r"tools\[0\]: not plain JSON"):
        render_chat([user("q")], tools=[{"name": object()}])


def test_messages_are_not_modified():
    messages = [user("q"), assistant(None, tool_calls=[call("f", '{"a": 1}')]), tool([{"type": "text", "text": "x"}])]
    copy = [user("q"), assistant(None, tool_calls=[call("f", '{"a": 1}')]), tool([{"type": "text", "text": "x"}])]
    both(messages)
    assert messages == copy


def test_rendering_is_quick_and_safe_to_share_between_threads():
    messages = [user("q"), assistant("a", tool_calls=[call("f", ARGUMENTS)]), tool("1")] * 10
    expected = both(messages, tools=[WEATHER])
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(both(messages, tools=[WEATHER]) == expected for _ in range(10)))
        for _ in range(4)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    assert results == [True] * 40
    assert seconds / 80 < 0.05  # about a millisecond each; wide, for machines that do other work too


def test_cost_grows_linearly():
    def seconds(count):
        messages = [user("q" * 50), assistant("<think>r</think>a"), tool("x" * 50)] * count
        start = time.perf_counter()
        both(messages)
        return time.perf_counter() - start

    seconds(10)
    few, many = min(seconds(100) for _ in range(5)), min(seconds(800) for _ in range(3))
    assert many < 8 * few * 4
