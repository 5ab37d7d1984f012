"""Anthropic's own client against a running server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.serve.served import KEY, Opened, Served, eventually, served
from tests.serve.test_chat import CALL, TWO
from tests.serve.test_messages import HELLO, WEATHER

anthropic = pytest.importorskip("anthropic")

THINK = {"type": "enabled", "budget_tokens": 1024}


def client_of(server: Served, **options: Any) -> Any:
    return anthropic.Anthropic(base_url=server.url, **{"api_key": KEY, "max_retries": 0, **options})


@pytest.fixture
def client(script) -> Any:
    return client_of(script)


@pytest.fixture
def random(small) -> Any:
    """The client of a server whose model is random."""
    return client_of(small)


def create(client: Any, **fields: Any) -> Any:
    return client.messages.create(**{"model": "m", "messages": HELLO, "max_tokens": 200, **fields})


def test_a_message_with_a_thought(script, client) -> None:
    script.says("<think>They ask.</think>Hello!")
    found = create(client, thinking=THINK, system="Be brief.", extra_body={"temperature": 0.5})
    assert [block.type for block in found.content] == ["thinking", "text"]
    assert (found.content[0].thinking, found.content[1].text) == ("They ask.", "Hello!")
    assert (found.stop_reason, found.role) == ("end_turn", "assistant") and found.usage.output_tokens > 0
    assert script.engine.asked[0]["temperature"] == 0.5


def test_stream(script, client) -> None:
    script.says("<think>They ask.</think>Hello there!")
    with client.messages.stream(model="m", messages=HELLO, max_tokens=100, thinking=THINK) as stream:
        assert "".join(stream.text_stream) == "Hello there!"
        final = stream.get_final_message()
    assert final.content[0].thinking == "They ask." and final.stop_reason == "end_turn"
    assert final.usage.output_tokens == len(script.engine.requests[0].logprobs)
    assert final.usage.input_tokens == len(script.engine.requests[0].sequence.tokens)


def test_raw_events(script, client) -> None:
    script.says(CALL)
    kinds = [event.type for event in create(client, stream=True, tools=[WEATHER])]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3


def test_the_asynchronous_client(script) -> None:
    script.says("Hello!")

    async def go() -> str:
        async with anthropic.AsyncAnthropic(base_url=script.url, api_key=KEY) as client:
            return (await create(client)).content[0].text

    assert asyncio.run(go()) == "Hello!"


def test_tools_auto_and_parallel(script, client) -> None:
    script.says(TWO, TWO)
    found = create(client, tools=[WEATHER])
    calls = [block for block in found.content if block.type == "tool_use"]
    assert [call.input["city"] for call in calls] == ["Paris", "Rome"] and found.stop_reason == "tool_use"
    with client.messages.stream(
        model="m", messages=HELLO, max_tokens=100, tools=[WEATHER],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    ) as stream:  # fmt: skip
        calls = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert [call.input for call in calls] == [{"city": "Paris", "days": 3}]


def test_tools_none(script, client) -> None:
    script.says(CALL)
    found = create(client, tools=[WEATHER], tool_choice={"type": "none"})
    assert "tool_use" not in [block.type for block in found.content]


def test_tools_over_several_turns(script, client) -> None:
    script.says(TWO, "Sun in Paris, rain in Rome.")
    first = create(client, tools=[WEATHER], thinking=THINK)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": f"weather of {block.input['city']}"}
        for block in first.content
        if block.type == "tool_use"
    ]
    messages = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = create(client, messages=messages, tools=[WEATHER], thinking=THINK)
    assert second.content[0].text.startswith("Sun in Paris")
    prompt = script.engine.prompts[1]
    assert "<think>They ask.</think>" in prompt and "weather of Rome" in prompt and "(no content)" not in prompt


@pytest.mark.slow
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=str)
def test_tools_that_must_be_called(random, choice) -> None:
    found = create(random, tools=[WEATHER], tool_choice=choice, max_tokens=300, extra_body={"seed": 1})
    calls = [block for block in found.content if block.type == "tool_use"]
    assert calls and all(call.name == "get_weather" and isinstance(call.input, dict) for call in calls)


def test_thinking_is_switched(script, client) -> None:
    script.says("a", "a", "a")
    create(client)
    create(client, thinking={"type": "disabled"})
    create(client, thinking=THINK)
    assert [prompt.endswith("<think></think>") for prompt in script.engine.prompts] == [True, True, False]


@pytest.mark.slow
def test_thinking_with_a_budget(engine) -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 8}, "extra_body": {"seed": 1}}
    with served(Opened(engine), "small") as server:
        found = create(client_of(server), **thinking, max_tokens=60)
    assert found.usage.output_tokens_details.thinking_tokens <= 12


@pytest.mark.slow
def test_a_schema(random) -> None:
    schema = {
        "type": "object", "properties": {"large": {"type": "boolean"}}, "required": ["large"],
        "additionalProperties": False,
    }  # fmt: skip
    form = {"format": {"type": "json_schema", "schema": schema}}
    found = create(random, output_config=form, extra_body={"seed": 1})
    assert set(json.loads(found.content[0].text)) == {"large"}


@pytest.mark.slow
def test_limits_and_stops(random) -> None:
    one = create(random, max_tokens=2, extra_body={"seed": 3})
    assert one.stop_reason in ("max_tokens", "end_turn") and one.usage.output_tokens <= 2
    whole = create(random, max_tokens=6, extra_body={"seed": 3}).content[0].text
    found = create(random, max_tokens=6, extra_body={"seed": 3}, stop_sequences=[whole[-1:]])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", whole[-1:])


def test_tokens_are_counted(script, client) -> None:
    script.says("a")
    counted = client.messages.count_tokens(model="m", messages=HELLO, system="Be brief.", tools=[WEATHER]).input_tokens
    assert create(client, system="Be brief.", tools=[WEATHER]).usage.input_tokens == counted


def test_errors(script, client) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature") as caught:
        create(client, extra_body={"temperature": 9})  # newest versions have no such argument
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.AuthenticationError):
        create(client_of(script, api_key="wrong"))
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("other")
    script.says("a")
    assert create(client_of(script, api_key=None, auth_token=KEY)).content[0].text == "a"
    assert [model.id for model in client.models.list()] == ["scripted"]


def test_cancellation(script, client) -> None:
    script.says()
    script.engine.held = True
    try:
        stream = create(client, stream=True)
        eventually(lambda: script.engine.requests)
        stream.close()
        eventually(lambda: script.engine.requests[0].finish_reason == "cancelled")
    finally:
        script.engine.held = False
