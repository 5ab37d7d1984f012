"""POST /v1/chat/completions: the engine's answers, taken apart, whole and streamed alike."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from glm45_jax.serve import App
from glm45_jax.serve.chat import join
from glm45_jax.text import Tokenizer
from tests.serve.support import CHAT, HELLO, WEATHER, ask, chat, events, scripted

CALL = (
    "\n<think>They ask.</think>\nLet me look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
    "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
TWO = CALL + "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{**call, "id": ""} for call in message.get("tool_calls", [])]
    return {**message, "tool_calls": calls}


def streamed(chunks: list[dict[str, Any]], index: int = 0) -> tuple[dict[str, Any], str]:
    """The message that chunks make up, and why it ended."""
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    *before, last = choices
    assert last["finish_reason"] and last["delta"] == {} and not any(c["finish_reason"] for c in before)
    return join(c["delta"] for c in choices[1:]), last["finish_reason"]


def test_the_engines_answer(app, engine, tokenizer) -> None:
    found = chat(app, max_tokens=12, temperature=0)
    prompt = tokenizer.encode_chat(HELLO)
    wanted = engine.submit(prompt, 12, stop_ids=tokenizer.eos_ids).result(60)
    assert found["object"] == "chat.completion" and found["model"] == "small" and found["id"].startswith("chatcmpl-")
    (choice,) = found["choices"]
    assert choice["message"]["content"] == (wanted.text or "").strip() and choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == wanted.finish_reason and choice["logprobs"] is None
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(prompt) and usage["completion_tokens"] == len(wanted.answer)
    assert usage["total_tokens"] == len(prompt) + len(wanted.answer)


def test_a_stream_gives_the_same(app) -> None:
    settings = {"max_tokens": 15, "seed": 5, "n": 2, "logprobs": True}
    whole = chat(app, **settings)
    chunks = events(app, **settings, stream_options={"include_usage": True})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == [] and all(chunk["usage"] is None for chunk in chunks[:-1])
    for field in ("prompt_tokens", "completion_tokens", "completion_tokens_details"):
        assert chunks[-1]["usage"][field] == whole["usage"][field]
    for index, choice in enumerate(whole["choices"]):
        message, reason = streamed(chunks, index)
        assert (message, reason) == (choice["message"], choice["finish_reason"])
        found = [
            entry
            for chunk in chunks
            for c in chunk["choices"]
            if c["index"] == index and c["logprobs"]
            for entry in c["logprobs"]["content"]
        ]
        assert [e["token"] for e in found] == [e["token"] for e in choice["logprobs"]["content"]]
        assert [e["logprob"] for e in found] == pytest.approx(
            [e["logprob"] for e in choice["logprobs"]["content"]], abs=1e-4
        )
    assert "usage" not in events(app, max_tokens=1)[0]


def test_seeds_decide(app) -> None:
    def texts(**fields: Any) -> list[str]:
        return [c["message"]["content"] for c in chat(app, max_tokens=12, **fields)["choices"]]

    both = texts(seed=7, n=2)
    assert both == texts(seed=7) + texts(seed=8) and both[0] != both[1]
    assert texts() != texts()  # without one each answer has its own


def test_logprobs_bias_and_stop(app, tokenizer) -> None:
    (the,) = tokenizer.encode("the")
    found = chat(app, max_tokens=4, logit_bias={str(the): 100}, logprobs=True, temperature=0)["choices"][0]
    assert found["message"]["content"] == "the" * 4 and found["finish_reason"] == "length"
    entries = found["logprobs"]["content"]
    assert [e["token"] for e in entries] == ["the"] * 4 and bytes(entries[0]["bytes"]) == b"the"
    assert all(e["logprob"] <= 0 and math.isfinite(e["logprob"]) and e["top_logprobs"] == [] for e in entries)
    stopped = chat(app, max_tokens=8, logit_bias={str(the): 100}, stop=["hethe"])["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("t", "stop")


def test_a_beginning_that_is_known_is_counted(app) -> None:
    messages = [{"role": "user", "content": "the dog ran and the cat sat on the mat " * 4}]
    chat(app, messages, max_tokens=1)
    assert chat(app, messages, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_thinking_content_and_calls(engine) -> None:
    app, fake = scripted(engine, CALL, CALL, TWO)
    found = chat(app, tools=[WEATHER])
    message, reason = found["choices"][0]["message"], found["choices"][0]["finish_reason"]
    assert (message["reasoning_content"], message["content"], reason) == ("They ask.", "Let me look.", "tool_calls")
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"] and call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "days": 3}
    thought = len(fake.tokenizer.encode("<think>They ask.</think>"))
    assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    chunks = events(app, tools=[WEATHER])
    joined, why = streamed(chunks)
    assert without_ids(joined) == without_ids(message) and why == "tool_calls"
    named = [
        piece
        for chunk in chunks
        for piece in chunk["choices"][0]["delta"].get("tool_calls", [])
        if "name" in piece["function"]
    ]
    assert len(named) == 1 and named[0]["id"] and named[0]["index"] == 0
    assert len(chat(app, tools=[WEATHER])["choices"][0]["message"]["tool_calls"]) == 2
    assert '"name": "get_weather"' in fake.prompts[0]


def test_one_call_where_several_are_not_wanted(engine) -> None:
    app, _ = scripted(engine, TWO, TWO)
    choice = chat(app, tools=[WEATHER], parallel_tool_calls=False)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] == "Paris" and choice["finish_reason"] == "tool_calls"
    message, reason = streamed(events(app, tools=[WEATHER], parallel_tool_calls=False))
    assert without_ids(message) == without_ids(choice["message"]) and reason == "tool_calls"


def test_no_calls_where_none_are_wanted(engine) -> None:
    app, fake = scripted(engine, CALL)
    choice = chat(app, tools=[WEATHER], tool_choice="none")["choices"][0]
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"
    assert "tool_call" not in choice["message"]["content"] and "get_weather" not in fake.prompts[0]


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"reasoning_effort": "none"}, False),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True}}, True),
    ],
    ids=str,
)
def test_thinking_is_switched(engine, fields, thinks) -> None:
    app, fake = scripted(engine, "Hello.")
    assert chat(app, **fields)["choices"][0]["message"]["content"] == "Hello."
    assert fake.prompts[0].endswith("<think></think>") is not thinks


def test_the_prompt_of_glm47_opens_the_thought(engine, tokenizer) -> None:
    _, fake = scripted(engine, "They ask.</think>Hello.", "Hello.")
    fake.tokenizer = Tokenizer(tokenizer.backend, chat_template="glm-4.7")
    app = App(fake, "scripted")  # pyright: ignore[reportArgumentType]
    found = chat(app)
    message = found["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("They ask.", "Hello.")
    thought = len(tokenizer.encode("They ask.</think>"))
    assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert chat(app, reasoning_effort="none")["choices"][0]["message"]["content"] == "Hello."
    kept = {"role": "assistant", "content": "Hi.", "reasoning_content": "They greet."}
    fake.texts = ["a", "b"]
    for clear, there in ((True, False), (False, True)):
        chat(app, [HELLO[0], kept, HELLO[0]], chat_template_kwargs={"clear_thinking": clear})
        assert ("They greet." in fake.prompts[-1]) is there


def test_a_conversation_goes_on(engine) -> None:
    app, fake = scripted(engine, "It is sunny.")
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    chat(
        app,
        [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "Weather? <|assistant|>"},
            {"role": "assistant", "content": None, "reasoning_content": "Ask.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        ],
        tools=[WEATHER],
    )
    assert "<|system|>\nBe brief." in fake.prompts[0] and "<arg_value>Paris</arg_value>" in fake.prompts[0]
    assert "<tool_response>\nsunny\n</tool_response>" in fake.prompts[0]


def test_unknown_fields_are_named(app) -> None:
    body = {
        "messages": HELLO, "max_tokens": 1, "user": "u", "extra_body": {}, "model": "gpt",
        "chat_template_kwargs": {"tokenize": True}, "in\r\nvalid": 1,
    }  # fmt: skip
    response = ask(app, CHAT, body)
    assert response.status_code == 200
    said = response.headers["x-glm45-warning"]
    assert said == 'ignored: "model", "extra_body", "in\\r\\nvalid", "chat_template_kwargs.tokenize"'
    assert "x-glm45-warning" not in ask(app, CHAT, {"messages": HELLO, "max_tokens": 1, "model": "small"}).headers
