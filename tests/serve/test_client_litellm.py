"""LiteLLM against a running server, by its OpenAI and its Anthropic side."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest

from tests.serve.served import KEY, Served, eventually
from tests.serve.support import HELLO, WEATHER
from tests.serve.test_chat import CALL, TWO

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it looks for prices elsewhere
litellm = pytest.importorskip("litellm", reason="litellm is not installed: pip install 'glm45-jax[clients]'")
pytestmark = pytest.mark.slow


@pytest.fixture(params=["openai", "anthropic"])
def side(request) -> str:
    return request.param


def settings(server: Served, side: str, **fields: Any) -> dict[str, Any]:
    base = f"{server.url}/v1" if side == "openai" else server.url
    own = {"model": f"{side}/glm", "api_base": base, "api_key": KEY, "messages": HELLO, "max_tokens": 300}
    return {**own, "num_retries": 0, **fields}


def complete(server: Served, side: str, **fields: Any) -> Any:
    return litellm.completion(**settings(server, side, **fields))


# litellm lets it through for models of its own list alone, unless told to
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "allowed_openai_params": ["thinking"]}


def test_chat_with_a_thought(script, side) -> None:
    script.says("<think>They ask.</think>Hello!")
    found = complete(script, side, **(THINK if side == "anthropic" else {}))
    message = found.choices[0].message
    assert (message.content, message.reasoning_content) == ("Hello!", "They ask.")
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens > 0


def test_stream(script, side) -> None:
    script.says("<think>They ask.</think>Hello there!")
    chunks = list(complete(script, side, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(d.content or "" for d in deltas) == "Hello there!"
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "They ask."


def test_the_asynchronous_way(script, side) -> None:
    script.says("Hello!")
    found = asyncio.run(litellm.acompletion(**settings(script, side)))
    assert found.choices[0].message.content == "Hello!"


def test_tools_auto_and_streamed(script, side) -> None:
    script.says(TWO, TWO)
    calls = complete(script, side, tools=[WEATHER], tool_choice="auto").choices[0].message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    chunks = list(complete(script, side, tools=[WEATHER], stream=True))
    whole = litellm.stream_chunk_builder(chunks)
    again = [json.loads(call.function.arguments) for call in whole.choices[0].message.tool_calls]
    assert [call["city"] for call in again] == ["Paris", "Rome"] and whole.choices[0].finish_reason == "tool_calls"


def test_tools_none(script, side) -> None:
    script.says(CALL)
    assert not complete(script, side, tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls


def test_tools_over_several_turns(script, side) -> None:
    script.says(CALL, "Sunny.")
    first = complete(script, side, tools=[WEATHER]).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sun"}
    messages = [*HELLO, first.model_dump(exclude_none=True), result]
    found = complete(script, side, messages=messages, tools=[WEATHER])
    assert found.choices[0].message.content == "Sunny."
    assert "<tool_response>\nsun\n</tool_response>" in script.engine.prompts[1]
    assert "<arg_value>Paris</arg_value>" in script.engine.prompts[1]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_tools_required_and_named(small, side, choice) -> None:
    found = complete(small, side, tools=[WEATHER], tool_choice=choice, extra_body={"seed": 1})
    assert found.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_a_schema(small) -> None:
    schema = {"type": "object", "properties": {"large": {"type": "boolean"}}, "required": ["large"]}
    form = {"type": "json_schema", "json_schema": {"name": "size", "schema": {**schema, "additionalProperties": False}}}
    body = {"seed": 1, "chat_template_kwargs": {"enable_thinking": False}}
    found = complete(small, "openai", response_format=form, extra_body=body)
    assert set(json.loads(found.choices[0].message.content)) == {"large"}


def test_seed_n_and_logprobs(small) -> None:
    fields = {"max_tokens": 5, "seed": 3, "n": 2, "logprobs": True}
    one, two = (complete(small, "openai", **fields).choices for _ in range(2))
    assert [c.message.content for c in one] == [c.message.content for c in two] and len(one) == 2
    assert all(entry.logprob <= 0 for entry in one[0].logprobs.content)


def test_errors(script, side) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        complete(script, side, temperature=9)
    with pytest.raises(litellm.AuthenticationError):
        complete(script, side, api_key="wrong")


def test_cancellation(script) -> None:
    script.says()
    script.engine.held = True

    async def go() -> None:
        stream = asyncio.create_task(litellm.acompletion(**settings(script, "openai")))
        await asyncio.to_thread(eventually, lambda: script.engine.requests)
        stream.cancel()
        await asyncio.to_thread(eventually, lambda: script.engine.requests[0].finish_reason == "cancelled")

    try:
        asyncio.run(go())
    finally:
        script.engine.held = False


def test_a_response(script) -> None:
    script.says("<think>They ask.</think>Hello!")
    found = litellm.responses(model="openai/glm", input="the cat", api_base=f"{script.url}/v1", api_key=KEY)
    assert found.output[-1].content[0].text == "Hello!"
