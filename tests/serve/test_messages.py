"""POST /v1/messages: Anthropic's form in, Anthropic's form out, whole and streamed alike."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from glm45_jax.infer import Delta
from glm45_jax.serve import App, ServeOptions
from glm45_jax.serve.answers import EventStream
from tests.serve.support import Visit, ask, scripted, until
from tests.serve.test_chat import CALL, TWO

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HELLO = [{"role": "user", "content": "the cat"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


def message(app: Any, messages: Any = HELLO, **fields: Any) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    response = ask(app, MESSAGES, {"max_tokens": 100, "messages": messages, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(app: Any, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each named by its type."""
    response = ask(app, MESSAGES, {"max_tokens": 100, "messages": HELLO, "stream": True, **fields})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that events make up, as a client puts it together."""
    first, *rest, last = events
    assert first["type"] == "message_start" and last == {"type": "message_stop"}
    found, parts = dict(first["message"]), dict[int, str]()
    for event in rest:
        if event["type"] == "content_block_start":
            assert event["index"] == len(found["content"])
            found["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            (kind, text) = next((k, v) for k, v in event["delta"].items() if k != "type")
            assert event["index"] == len(found["content"]) - 1 and text
            if kind == "partial_json":
                parts[event["index"]] = parts.get(event["index"], "") + text
            else:
                found["content"][-1][kind] += text
        elif event["type"] == "message_delta":
            found |= event["delta"] | {"usage": event["usage"]}
        else:
            assert event == {"type": "content_block_stop", "index": len(found["content"]) - 1}
    for index, text in parts.items():
        found["content"][index]["input"] = json.loads(text)
    return found


def alike(message: dict[str, Any]) -> dict[str, Any]:
    content = [block | ({"id": ""} if "id" in block else {}) for block in message["content"]]
    return message | {"id": "", "content": content}


def test_blocks_of_an_answer(engine) -> None:
    app, fake = scripted(engine, CALL, CALL, TWO)
    found = message(app, tools=[WEATHER], system="Be brief.", **THINK)
    thought, text, call = found["content"]
    assert thought == {"type": "thinking", "thinking": "They ask.", "signature": ""}
    assert text == {"type": "text", "text": "Let me look."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "get_weather", {"city": "Paris", "days": 3})
    assert found["id"].startswith("msg_") and (found["type"], found["role"]) == ("message", "assistant")
    assert (found["stop_reason"], found["stop_sequence"], found["model"]) == ("tool_use", None, "scripted")
    assert found["usage"]["input_tokens"] == len(fake.requests[0].sequence.tokens)
    assert found["usage"]["output_tokens"] == len(fake.requests[0].logprobs)
    assert found["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    assert alike(joined(streamed(app, tools=[WEATHER], system="Be brief.", **THINK))) == alike(found)
    assert "<|system|>\nBe brief.<|user|>\nthe cat<|assistant|>" in fake.prompts[0]
    assert '"parameters": {"type": "object"' in fake.prompts[0]
    assert [b["type"] for b in message(app, tools=[WEATHER])["content"]] == ["thinking", "text", "tool_use", "tool_use"]


@pytest.mark.slow
def test_what_the_engine_gives(app) -> None:
    settings = {"max_tokens": 12, "temperature": 1, "seed": 3}
    whole = message(app, **settings)
    pieces = joined(streamed(app, **settings))
    assert pieces["content"] == whole["content"] and pieces["stop_reason"] == whole["stop_reason"]
    assert whole["usage"]["output_tokens"] == pieces["usage"]["output_tokens"] <= 12
    long = [{"role": "user", "content": "the dog ran and the cat sat on the mat " * 4}]
    message(app, long, max_tokens=1)
    usage = message(app, long, max_tokens=1)["usage"]
    assert usage["cache_read_input_tokens"] > 0
    everything = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert ask(app, COUNT, {"messages": long}).json() == {"input_tokens": everything}


@pytest.mark.slow
def test_why_it_ended(app, engine) -> None:
    fake_app, fake = scripted(engine, "one two")
    found = message(fake_app, stop_sequences=["three"], top_k=40, top_p=0.5, temperature=0.3)
    assert {**fake.asked[0], "top_k": 40, "top_p": 0.5, "temperature": 0.3} == fake.asked[0]
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    reasons = {message(app, max_tokens=2, seed=seed)["stop_reason"] for seed in range(4)}
    assert "max_tokens" in reasons <= {"max_tokens", "end_turn"}


def test_a_stop_sequence_is_named(engine) -> None:
    app, fake = scripted(engine, held=True)

    async def go() -> dict[str, Any]:
        visit = Visit(app, MESSAGES, {"max_tokens": 9, "messages": HELLO, "stop_sequences": ["x", "cat"]})
        task = visit.begin()
        await until(lambda: fake.requests)
        request = fake.requests[0]
        assert request.text is not None
        for token in fake.tokenizer.encode("the cat sat"):
            request.logprobs.append(-1.0)
            if text := request.text.push(token):
                request.push(Delta((token,), (-1.0,), text))
        request.push(Delta(finish_reason="stop"))
        await task
        return json.loads(b"".join(visit.chunks))

    found = asyncio.run(go())
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "cat")
    assert found["content"] == [{"type": "text", "text": "the"}]


def test_a_conversation_with_tools(engine) -> None:
    app, fake = scripted(engine, "Sunny.")
    text = lambda words: {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}  # noqa: E731
    conversation = [
        {"role": "user", "content": [text("Weather?"), text("Now.")]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Ask.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                text("Let me look."),
                {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "b", "name": "get_weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [text("sun"), text("wind")]},
                {"type": "tool_result", "tool_use_id": "b", "content": "rain", "is_error": True},
            ],
        },
    ]
    system = [text("Be brief."), text("Be kind.")]
    message(app, conversation, system=system, tools=[WEATHER], tool_choice={"type": "auto"}, **THINK)
    (prompt,) = fake.prompts
    assert prompt.endswith(
        "<|system|>\nBe brief.\nBe kind.<|user|>\nWeather?\nNow.<|assistant|>\n<think>Ask.</think>\nLet me look.\n"
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n"
        "<tool_call>get_weather\n</tool_call><|observation|>\n<tool_response>\nsun\nwind\n</tool_response>\n"
        "<tool_response>\nrain\n</tool_response><|assistant|>"
    )


def test_choices_of_tools(engine) -> None:
    app, fake = scripted(engine, TWO, CALL)
    one = message(app, tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block["type"] for block in one["content"]] == ["thinking", "text", "tool_use"]
    none = message(app, tools=[WEATHER], tool_choice={"type": "none"})
    assert [block["type"] for block in none["content"]] == ["thinking", "text"]
    assert none["stop_reason"] == "end_turn" and "get_weather" not in fake.prompts[1]


@pytest.mark.parametrize(
    ("thinking", "thinks"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "enabled"}, True),
        ({"type": "enabled", "budget_tokens": 2000}, True),
        ({"type": "adaptive"}, True),
    ],
    ids=str,
)
def test_nothing_is_thought_unless_asked_for(engine, thinking, thinks) -> None:
    app, fake = scripted(engine, "Hello.")
    assert message(app, thinking=thinking)["content"] == [{"type": "text", "text": "Hello."}]
    assert fake.prompts[0].endswith("<think></think>") is not thinks


IMAGE = {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens: it is needed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]: only text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, "the last one must not be the assistant's"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": 1}]}]}, "content[0].input"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
        ({"system": 5}, "system"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f f", "input_schema": {}}]}, "tools[0]"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "no"}}, "thinking"),
        ({"stop_sequences": [""]}, "stop_sequences: each"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refusals(app, fields, said) -> None:
    for path in (MESSAGES, COUNT):
        response = ask(app, path, {"max_tokens": 9, "messages": HELLO, **fields})
        if path == COUNT and response.status_code == 200:
            continue  # it does not look at what only an answer needs
        assert response.status_code == 400, response.text
        error = response.json()
        assert set(error) == {"type", "error"} and error["type"] == "error"
        assert error["error"]["type"] == "invalid_request_error" and said in error["error"]["message"]


def test_errors_have_its_form(engine) -> None:
    app = App(engine, "small", ServeOptions(api_keys=("right",), max_body_bytes=100))
    assert ask(app, MESSAGES, {}).json()["error"]["type"] == "authentication_error"
    key = {"headers": {"x-api-key": "right"}}
    assert ask(app, MESSAGES, b"x" * 200, **key).json()["error"]["type"] == "request_too_large"
    assert ask(app, MESSAGES, b"{", **key).json()["error"]["type"] == "invalid_request_error"
    assert ask(app, MESSAGES, method="GET", **key).json()["type"] == "error"
    assert ask(app, f"{MESSAGES}/none", {}, **key).json()["error"]["type"] == "not_found_error"
    app.gate.draining = True
    late = ask(app, MESSAGES, {}, **key)
    assert (late.status_code, late.json()["error"]["type"]) == (503, "overloaded_error") and late.headers["retry-after"]


def test_an_engine_that_fails(engine) -> None:
    app, fake = scripted(engine, "", "")
    fake._answer = lambda request, tokens: request.push(Delta(finish_reason="error", error="broken"))
    response = ask(app, MESSAGES, {"max_tokens": 9, "messages": HELLO})
    assert response.status_code == 500 and response.json()["error"] == {"type": "api_error", "message": "broken"}
    assert streamed(app) == [{"type": "error", "error": {"type": "api_error", "message": "broken"}}]


def test_a_ping_while_nothing_comes(engine, monkeypatch) -> None:
    monkeypatch.setattr(EventStream, "idle_seconds", 0.02)
    app, fake = scripted(engine, held=True)

    async def go() -> None:
        visit = Visit(app, MESSAGES, {"max_tokens": 9, "messages": HELLO, "stream": True})
        task = visit.begin()
        await until(lambda: visit.chunks.count(b'event: ping\ndata: {"type": "ping"}\n\n') > 2)
        fake.requests[0].push(Delta(text="a", finish_reason="stop"))
        await task
        assert b"message_stop" in visit.chunks[-2]
        gone = Visit(app, MESSAGES, {"max_tokens": 9, "messages": HELLO, "stream": True})
        task = gone.begin()
        await until(lambda: len(gone.chunks) > 2)
        gone.leave()
        await asyncio.wait_for(task, 30)
        assert fake.requests[1].finish_reason == "cancelled" and app.gate.inside == 0

    asyncio.run(go())


def test_unknown_fields_are_named(app) -> None:
    body = {"max_tokens": 1, "messages": HELLO, "metadata": {"user_id": "u"}, "mcp_servers": [], "model": "claude"}
    said = ask(app, MESSAGES, body).headers["x-glm45-warning"]
    assert said == 'ignored: "mcp_servers", "model"'


def test_the_model_has_fields_of_both_forms(app) -> None:
    (card,) = ask(app, "/v1/models").json()["data"]
    assert (card["type"], card["object"], card["display_name"]) == ("model", "model", "small")
    assert ask(app, "/v1/models").json()["has_more"] is False
