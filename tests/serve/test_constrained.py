"""Answers of a stated form, calls that must come, thoughts that must end, and what else could have been said."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest

from glm45_jax.infer import Engine, EngineClosed
from glm45_jax.serve import App
from glm45_jax.text import Tokenizer
from tests.serve.support import CHAT, COMPLETIONS, HELLO, WEATHER, ask, chat, events, refusal, scripted
from tests.serve.test_chat import CALL, streamed, without_ids

NO_THOUGHT = {"thinking": {"type": "disabled"}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 30}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
TRIP = {"type": "function", "function": {"name": "book", "parameters": SCHEMA, "strict": True}}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [TRIP, NOW]


def choice(app: App, **fields: Any) -> dict[str, Any]:
    return chat(app, **{"max_tokens": 700, "seed": 1, **fields})["choices"][0]


def check_calls(message: dict[str, Any]) -> list[str]:
    """Names of the calls, whose arguments must be what their schemas allow."""
    for call in message["tool_calls"]:
        schema = SCHEMA if call["function"]["name"] == "book" else {"type": "object", "maxProperties": 0}
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    return [call["function"]["name"] for call in message["tool_calls"]]


# --- forms of the content --------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("temperature", [0, 1])
def test_json_by_a_schema(app, temperature) -> None:
    found = choice(app, response_format=FORM, temperature=temperature, **NO_THOUGHT)
    jsonschema.validate(json.loads(found["message"]["content"]), SCHEMA)
    assert found["finish_reason"] == "stop"


def test_a_schema_too_rich_to_follow_is_the_requests_error(app) -> None:
    """It compiles, but what may come next is more than llguidance's limits allow."""
    rich = {"type": "object", "properties": {f"p{i}": {} for i in range(900)}}
    form = {"type": "json_schema", "json_schema": {"name": "rich", "schema": rich}}
    error = refusal(app, CHAT, {"messages": HELLO, "response_format": form, **NO_THOUGHT}, 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", "grammar_error")
    assert "grammar cannot go on" in error["message"]
    assert choice(app, response_format=FORM, **NO_THOUGHT)["finish_reason"] == "stop"


def test_the_schema_follows_the_thought(app) -> None:
    found = choice(app, response_format=FORM, thinking={"type": "enabled", "budget_tokens": 20})
    jsonschema.validate(json.loads(found["message"]["content"]), SCHEMA)
    assert found["message"]["reasoning_content"] and found["finish_reason"] == "stop"


def test_a_stream_is_the_same(app) -> None:
    fields = {"seed": 3, "max_tokens": 700, "thinking_token_budget": 10}
    for more in ({"response_format": FORM}, {"tools": TOOLS, "tool_choice": "required"}):
        whole = chat(app, **fields, **more)
        chunks = events(app, **fields, **more, stream_options={"include_usage": True})
        message, reason = streamed(chunks)
        assert without_ids(message) == without_ids(whole["choices"][0]["message"])
        assert reason == whole["choices"][0]["finish_reason"]
        details = "completion_tokens_details"
        assert chunks[-1]["usage"][details] == whole["usage"][details]


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"structured_outputs": {"regex": "(yes|no)!"}}, {"yes!", "no!"}),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, {"red", "blue"}),
        ({"structured_outputs": {"json": {"enum": [1, 2]}}}, {"1", "2"}),
        ({"structured_outputs": {"json": '{"const": "a"}'}}, {'"a"'}),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, {"a", "b"}),
        ({"guided_regex": "x{3}"}, {"xxx"}),
        ({"guided_choice": ["one"]}, {"one"}),
        ({"guided_json": {"const": None}}, {"null"}),
        ({"guided_grammar": 'root ::= "c" | "d"'}, {"c", "d"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 5}}}}, {"5"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value)[:50],  # sets have no order
)
def test_other_forms(app, fields, fits) -> None:
    assert choice(app, **fields, **NO_THOUGHT)["message"]["content"] in fits
    body = {"prompt": "the cat", "max_tokens": 40, "seed": 1, **fields}
    found = ask(app, COMPLETIONS, body).json()["choices"][0]
    assert (found["text"], found["finish_reason"]) in {(text, "stop") for text in fits}


def test_any_object(app) -> None:
    bias = {str(app_token(app, char)): 5 for char in '"}:'}
    found = choice(app, response_format={"type": "json_object"}, logit_bias=bias, **NO_THOUGHT)
    assert found["finish_reason"] == "length" or isinstance(json.loads(found["message"]["content"]), dict)
    assert found["message"]["content"].startswith("{")


def app_token(app: App, char: str) -> int:
    return ask(app, "/tokenize", {"prompt": char}).json()["tokens"][0]


def test_a_schema_that_is_not_strict_leaves_out_what_cannot_be_enforced(app) -> None:
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(choice(app, response_format=form, **NO_THOUGHT)["message"]["content"]) == [1, 1]
    form["json_schema"] = {**form["json_schema"], "strict": True}  # type: ignore[dict-item]
    assert "uniqueItems" in refusal(app, CHAT, {"messages": HELLO, "response_format": form})["message"]


def test_each_answer_has_its_own_place(app) -> None:
    found = chat(app, n=3, seed=5, max_tokens=700, response_format=FORM, **NO_THOUGHT)["choices"]
    values = [json.loads(one["message"]["content"]) for one in found]
    for value in values:
        jsonschema.validate(value, SCHEMA)
    assert len({json.dumps(value) for value in values}) > 1


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("template", ["glm-4.5", "glm-4.7"])
@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "enabled", "budget_tokens": 8}], ids=["off", "on"])
def test_calls_that_must_come(engine, tokenizer, monkeypatch, template, thinking) -> None:
    monkeypatch.setattr(engine, "tokenizer", Tokenizer(tokenizer.backend, chat_template=template))
    app = App(engine, "small")
    for seed in range(3):
        found = choice(app, tools=TOOLS, tool_choice="required", thinking=thinking, seed=seed, max_tokens=900)
        assert found["message"]["content"] is None and found["finish_reason"] in ("tool_calls", "length")
        assert found["finish_reason"] == "length" or check_calls(found["message"])
        one = choice(app, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, thinking=thinking, seed=seed)
        assert len(check_calls(one["message"])) == 1 and one["finish_reason"] == "tool_calls"
        for name in ("book", "now"):
            named = {"type": "function", "function": {"name": name}}
            found = choice(app, tools=TOOLS, tool_choice=named, parallel_tool_calls=False, thinking=thinking, seed=seed)
            assert check_calls(found["message"]) == [name] and found["finish_reason"] == "tool_calls"


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.slow
def test_only_allowed_tools_are_called(app, tokenizer) -> None:
    """All tools stand in the prompt, whose beginning stays the same; some may be called, or one of them must be."""
    call = {str(tokenizer.token_id("<tool_call>")): 100}
    for seed in range(3):
        fields: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False, "seed": seed, **NO_THOUGHT}
        must = choice(app, tool_choice=allowed("required", "now"), **fields)
        assert check_calls(must["message"]) == ["now"]
        may = choice(app, tool_choice=allowed("auto", "now"), logit_bias=call, **fields)
        assert [call["function"]["name"] for call in may["message"]["tool_calls"]] == ["now"]
    bias = {str(tokenizer.token_id("<tool_call>")): -100, str(tokenizer.eos_ids[0]): 3}
    silent = choice(app, tools=TOOLS, tool_choice=allowed("auto", "now"), logit_bias=bias, **NO_THOUGHT)
    assert "tool_calls" not in silent["message"]
    for wrong in (allowed("maybe", "now"), allowed("auto"), allowed("auto", "none"), {"type": "allowed_tools"}):
        error = refusal(app, CHAT, {"messages": HELLO, "tools": TOOLS, "tool_choice": wrong}, 400)
        assert "tool_choice" in error["message"]


def test_strict_tools_may_be_left_alone(app, tokenizer) -> None:
    """With tool_choice auto text may come; a call is one that the schema allows."""
    bias = {str(tokenizer.token_id("<tool_call>")): 100}
    found = choice(app, tools=[TRIP], parallel_tool_calls=False, logit_bias=bias, **NO_THOUGHT)
    assert check_calls(found["message"]) == ["book"]
    bias = {str(tokenizer.token_id("<tool_call>")): -100, str(tokenizer.eos_ids[0]): 3}
    found = choice(app, tools=[TRIP], logit_bias=bias, **NO_THOUGHT)
    assert "tool_calls" not in found["message"] and found["message"]["content"]
    for push, calls in ((100, True), (-100, False)):
        bias = {str(tokenizer.token_id("<tool_call>")): push}
        fields = {"tools": [TRIP], "response_format": FORM, "logit_bias": bias, "parallel_tool_calls": False}
        message = choice(app, **fields, **NO_THOUGHT)["message"]
        if calls:
            assert check_calls(message) == ["book"]
        else:
            jsonschema.validate(json.loads(message["content"]), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "no tool 'other'"),
        ({"tool_choice": "required"}, "no tools to call"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "expected auto, none, required"),
        (
            {"tools": [{"function": {"name": "f", "strict": True, "parameters": {"properties": {"x": {"not": {}}}}}}]},
            "tool 'f'",
        ),
        ({"response_format": FORM, "guided_regex": "a"}, "asks for another form"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "allows nothing"),
        ({"top_logprobs": 3}, "logprobs must be true"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_refused(app, fields, part) -> None:
    assert part in refusal(app, CHAT, {"messages": HELLO, "max_tokens": 1, **fields})["message"]


def test_calls_without_tools_are_text(engine) -> None:
    app, _ = scripted(engine, CALL, CALL)
    found = chat(app)["choices"][0]
    message = found["message"]
    assert message["reasoning_content"] == "They ask." and "tool_calls" not in message
    assert message["content"] == CALL.split("</think>")[1].strip() and found["finish_reason"] == "stop"
    assert streamed(events(app))[0] == message


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 7}},
        {"chat_template_kwargs": {"thinking_budget": 7}},
        {"thinking_token_budget": 7},
        {"thinking_budget": 7, "thinking_token_budget": 900},
    ],
    ids=str,
)
@pytest.mark.parametrize("template", ["glm-4.5", "glm-4.7"])
def test_budgets(engine, tokenizer, monkeypatch, fields, template) -> None:
    """A model that would think for ever: the thought has its tokens, and its tags."""
    monkeypatch.setattr(engine, "tokenizer", Tokenizer(tokenizer.backend, chat_template=template))
    bias = {str(tokenizer.token_id("</think>")): -90, str(tokenizer.token_id("<tool_call>")): -90}
    if template == "glm-4.5":
        bias[str(tokenizer.token_id("<think>"))] = 30  # or it would not begin
    body = {"messages": HELLO, "max_tokens": 40, "logit_bias": bias, "logprobs": True, "ignore_eos": True, **fields}
    response = ask(App(engine, "x"), CHAT, body)
    assert response.status_code == 200 and "x-glm45-warning" not in response.headers
    found = response.json()
    tokens = [entry["token"] for entry in found["choices"][0]["logprobs"]["content"]]
    begun = tokens.index("<think>") + 1 if template == "glm-4.5" else 0
    assert tokens.index("</think>") == begun + 7
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 7 + 1 + begun


def test_no_budget_at_all(app) -> None:
    found = chat(app, thinking={"type": "enabled", "budget_tokens": 0}, response_format=FORM, max_tokens=700)
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2  # the tags alone
    assert "reasoning_content" not in found["choices"][0]["message"]
    free = chat(app, thinking_token_budget=-1, max_tokens=3)
    assert free["choices"][0]["finish_reason"] in ("length", "stop")


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_the_likeliest_tokens_of_a_chat(app) -> None:
    fields = {"logprobs": True, "top_logprobs": 3, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    entries = choice(app, **fields)["logprobs"]["content"]
    assert len(entries) == 5
    for entry in entries:
        top = entry["top_logprobs"]
        assert len(top) == 3 and {"token", "logprob", "bytes"} == top[0].keys()
        assert (top[0]["token"], top[0]["logprob"]) == (entry["token"], entry["logprob"])
        assert [one["logprob"] for one in top] == sorted((one["logprob"] for one in top), reverse=True)
        assert sum(math.exp(one["logprob"]) for one in top) <= 1.001
    parts = [c["logprobs"] for chunk in events(app, seed=1, **fields) for c in chunk["choices"] if c["logprobs"]]
    assert [e["top_logprobs"] for part in parts for e in part["content"]] == [e["top_logprobs"] for e in entries]


def test_the_likeliest_tokens_of_a_completion(app) -> None:
    body = {"prompt": "the cat", "max_tokens": 6, "logprobs": 4, "temperature": 2, "seed": 2, "ignore_eos": True}
    found = ask(app, COMPLETIONS, body).json()["choices"][0]["logprobs"]
    assert len(found["top_logprobs"]) == 6
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"]):
        assert 4 <= len(top) <= 5 and list(top.values()) == sorted(top.values(), reverse=True)
        assert logprob in top.values() and (token in top or "\ufffd" in token)
    body["logprobs"] = 0
    assert ask(app, COMPLETIONS, body).json()["choices"][0]["logprobs"]["top_logprobs"] == [None] * 6


# --- the end ---------------------------------------------------------------------------------------------------------


def test_a_closed_engine_is_no_fault_of_the_clients(engine: Engine, monkeypatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise EngineClosed("the engine is closed")

    monkeypatch.setattr(engine, "submit", closed)
    error = refusal(App(engine, "x"), CHAT, {"messages": HELLO}, 503)
    assert error["type"] == "server_error" and error["code"] == "draining"
