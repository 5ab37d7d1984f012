"""POST /v1/responses: OpenAI's items in and out, their typed events, and answers that are kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glm45_jax.infer import Delta
from glm45_jax.serve import App, ServeOptions
from glm45_jax.serve.stored import Store, Stored
from tests.serve.support import ask, refusal, scripted
from tests.serve.test_chat import CALL, TWO

RESPONSES = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "strict": None,
}


def respond(app: Any, given: Any = "the cat", **fields: Any) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    response = ask(app, RESPONSES, {"input": given, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(app: Any, given: Any = "the cat", **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, named by their types and numbered."""
    response = ask(app, RESPONSES, {"input": given, "stream": True, **fields})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(value: Any) -> Any:
    """Without what differs from answer to answer."""
    if isinstance(value, dict):
        own = ("id", "call_id", "created_at", "completed_at")
        return {k: without_ids(v) for k, v in value.items() if k not in own}
    return [without_ids(v) for v in value] if isinstance(value, list) else value


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response, after every event was held to what came before it."""
    created, going, *rest, last = events
    assert created["type"] == "response.created" and going["type"] == "response.in_progress"
    assert created["response"]["status"] == "in_progress" and created["response"]["output"] == []
    assert (
        last["type"] == f"response.{last['response']['status']}" and last["response"]["id"] == going["response"]["id"]
    )
    texts, items = dict[int, str](), []
    for event in rest:
        index, kind = event["output_index"], event["type"]
        if kind == "response.output_item.added":
            assert index == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == items[index]["id"]
            items[index] = event["item"]
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[index]["id"] and event["delta"]
            texts[index] = texts.get(index, "") + event["delta"]
        elif kind.endswith("_part.added"):
            assert event["part"]["text"] == "" and event["content_index"] == 0
        elif kind.endswith("_part.done"):
            assert event["part"]["text"] == texts[index]
        else:
            assert (event.get("text") or event.get("arguments")) == texts[index]
    assert items == last["response"]["output"]
    for index, item in enumerate(items):
        assert texts[index] == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
    return last["response"]


def test_items_of_an_answer(engine) -> None:
    app, fake = scripted(engine, CALL, CALL, TWO, TWO)
    found = respond(app, tools=[WEATHER], instructions="Be brief.", metadata={"a": "b"})
    thought, message, call = found["output"]
    assert thought["type"] == "reasoning" and thought["content"] == [{"type": "reasoning_text", "text": "They ask."}]
    (part,) = message["content"]
    assert (message["role"], part["type"], part["text"]) == ("assistant", "output_text", "Let me look.")
    assert (call["type"], call["name"], call["status"]) == ("function_call", "get_weather", "completed")
    assert json.loads(call["arguments"]) == {"city": "Paris", "days": 3} and call["call_id"] != call["id"]
    assert (found["object"], found["status"], found["error"]) == ("response", "completed", None)
    assert found["tools"] == [WEATHER] and found["instructions"] == "Be brief." and found["metadata"] == {"a": "b"}
    assert found["usage"]["input_tokens"] == len(fake.requests[0].sequence.tokens)
    assert found["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + found["usage"]["output_tokens"]
    again = joined(streamed(app, tools=[WEATHER], instructions="Be brief.", metadata={"a": "b"}))
    assert without_ids(again) == without_ids(found)
    assert "<|system|>\nBe brief.<|user|>\nthe cat<|assistant|>" in fake.prompts[0]
    assert len(respond(app, tools=[WEATHER])["output"]) == 4
    assert len(respond(app, tools=[WEATHER], parallel_tool_calls=False)["output"]) == 3


@pytest.mark.slow
def test_what_the_engine_gives(app) -> None:
    settings = {"max_output_tokens": 5, "seed": 3, "include": ["message.output_text.logprobs"]}
    whole, pieces = respond(app, **settings), joined(streamed(app, **settings))
    assert whole["output"][0]["content"][0]["text"] == pieces["output"][0]["content"][0]["text"]
    if whole["status"] == "incomplete":
        assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
        assert whole["output"][-1]["status"] == "incomplete"
    entries = whole["output"][0]["content"][0]["logprobs"]
    assert entries and all(set(e) == {"token", "logprob", "bytes", "top_logprobs"} for e in entries)
    assert respond(app, max_output_tokens=2)["output"][0]["content"][0]["logprobs"] == []


def test_a_conversation_of_items(engine) -> None:
    app, fake = scripted(engine, "Sunny.")
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": "Weather?"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}]},
        {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call", "call_id": "b", "name": "get_weather", "arguments": ""},
        {"type": "function_call_output", "call_id": "a", "output": "sun"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    respond(app, items, tools=[WEATHER], tool_choice="auto")
    assert fake.prompts[0].endswith(
        "<|system|>\nBe brief.<|user|>\nWeather?<|assistant|>\n<think>Ask.</think>\nLet me look.\n"
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n"
        "<tool_call>get_weather\n</tool_call><|observation|>\n<tool_response>\nsun\n</tool_response>\n"
        "<tool_response>\nrain\n</tool_response><|assistant|>"
    )


def test_two_messages_stay_two(engine) -> None:
    app, fake = scripted(engine, "c")
    respond(app, [*({"role": "assistant", "content": text} for text in "ab"), {"role": "user", "content": "x"}])
    assert fake.prompts[0].count("<|assistant|>") == 3


def test_an_answer_that_is_kept(engine) -> None:
    app, fake = scripted(engine, CALL, "Sunny.", "a", "b")
    first = respond(app, "Weather?", tools=[WEATHER], store=True, instructions="Be brief.")
    assert ask(app, f"{RESPONSES}/{first['id']}").json() == first and first["store"] is True
    call = first["output"][-1]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
    second = joined(streamed(app, [output], previous_response_id=first["id"], tools=[WEATHER], store=True))
    assert second["previous_response_id"] == first["id"]
    asked, _, rest = fake.prompts[1].partition("Weather?")
    assert "Be brief." not in asked and "<arg_value>Paris</arg_value>" in rest and "sun" in rest
    respond(app, "And now?", previous_response_id=second["id"])
    assert "Sunny.<|user|>\nAnd now?" in fake.prompts[2]
    gone = ask(app, f"{RESPONSES}/{first['id']}", method="DELETE").json()
    assert gone == {"id": first["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        assert ask(app, f"{RESPONSES}/{first['id']}", method=method).status_code == 404
    error = refusal(app, RESPONSES, {"input": "a", "previous_response_id": first["id"]})
    assert error["code"] == "previous_response_not_found" and "store: true" in error["message"]
    unkept = respond(app, "a")
    assert unkept["store"] is False and ask(app, f"{RESPONSES}/{unkept['id']}").status_code == 404


def test_the_store_has_bounds() -> None:
    store, words = Store(1000), [{"role": "user", "content": "x" * 300}]
    for name in "abc":
        store.put(name, Stored({}, words))
        assert store.get("a")  # used last, so it stays
    assert [name for name in "abc" if store.get(name)] == ["a", "c"]
    store.put("large", Stored({}, words * 4))
    assert not any(store.get(name) for name in ("a", "c", "large"))
    store.put("d", Stored({}, words))
    assert store.drop("d") and not store.drop("d") and store._bytes == 0
    many = Store(1 << 20)
    for number in range(2000):
        many.put(str(number), Stored({}, []))
    assert len(many._kept) == 1024
    nothing = Store(0)
    nothing.put("a", Stored({}, []))
    assert nothing.get("a") is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a"]}, "input[0]"),
        ({"input": [{"role": "king", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]},
         "input[0].content[0]"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": {}}]}, None),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"reasoning": "high"}, "reasoning"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": []}, "text"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"metadata": 5}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, None),
        ({"instructions": 5}, "instructions"),
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"store": "yes"}, "store"),
        ({"temperature": 5}, "temperature"),
        ({"include": "a"}, "include"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_refusals(app, fields, param) -> None:
    error = refusal(app, RESPONSES, {"input": "a", "max_output_tokens": 2, **fields})
    assert param is None or (error["param"] == param and param in error["message"])


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("low", True), (None, True)])
def test_effort(engine, effort, thinks) -> None:
    app, fake = scripted(engine, "Hello.")
    respond(app, reasoning={"effort": effort})
    assert fake.prompts[0].endswith("<think></think>") is not thinks


def test_an_engine_that_fails(engine) -> None:
    app, fake = scripted(engine, "", "")
    fake._answer = lambda request, tokens: request.push(Delta(finish_reason="error", error="broken"))
    assert refusal(app, RESPONSES, {"input": "a"}, 500)["message"] == "broken"
    *_, last = streamed(app)
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "broken"}


def test_unknown_fields_are_named(app) -> None:
    body = {
        "input": "a", "max_output_tokens": 1, "user": "u", "extra": 1, "reasoning": {"mode": "pro"}, "model": "gpt",
        "include": ["reasoning.encrypted_content"],
    }  # fmt: skip
    said = ask(app, RESPONSES, body).headers["x-glm45-warning"]
    assert said == 'ignored: "extra", "reasoning.mode", "model", "include: reasoning.encrypted_content"'


def test_a_server_may_keep_nothing(engine) -> None:
    _, fake = scripted(engine, "a")
    closed = App(fake, "x", ServeOptions(store_bytes=0))  # pyright: ignore[reportArgumentType]
    kept = respond(closed, store=True)
    assert kept["store"] is False
    assert ask(closed, f"{RESPONSES}/{kept['id']}").status_code == 404
