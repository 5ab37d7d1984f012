"""OpenAI's own client against a running server: chat, and responses."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Literal

import pytest

from tests.serve.served import KEY, Opened, Served, eventually, served
from tests.serve.support import HELLO, WEATHER
from tests.serve.test_chat import CALL, TWO

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

FLAT = {"type": "function", "strict": None, **WEATHER["function"]}


class City(pydantic.BaseModel):
    """What a constrained answer must be."""

    size: Literal["small", "large"]
    capital: bool


def client_of(server: Served, **options: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": KEY, "max_retries": 0, **options})


@pytest.fixture
def client(script) -> Any:
    return client_of(script)


@pytest.fixture
def random(small) -> Any:
    """The client of a server whose model is random."""
    return client_of(small)


def create(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "m", "messages": HELLO, **fields})


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_with_a_thought(script, client) -> None:
    script.says("<think>They ask.</think>Hello!")
    found = create(client)
    message = found.choices[0].message
    assert (message.content, message.reasoning_content, message.role) == ("Hello!", "They ask.", "assistant")
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens_details.reasoning_tokens > 0


def test_stream(script, client) -> None:
    script.says("<think>They ask.</think>Hello there!")
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(d.content or "" for d in deltas) == "Hello there!" and len(deltas) > 5
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "They ask."
    assert chunks[-1].usage.completion_tokens == len(script.engine.requests[0].logprobs)


def test_its_stream_helper(script, client) -> None:
    script.says(CALL)
    with client.chat.completions.stream(model="m", messages=HELLO, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds and message.content == "Let me look."
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris", "days": 3}


def test_the_asynchronous_client(script) -> None:
    script.says("Hello!", "Hello!")

    async def go() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{script.url}/v1", api_key=KEY) as client:
            return [(await create(client)).choices[0].message.content for _ in range(2)]

    assert asyncio.run(go()) == ["Hello!"] * 2


def test_tools_auto_and_parallel(script, client) -> None:
    script.says(TWO, TWO)
    found = create(client, tools=[WEATHER], tool_choice="auto").choices[0]
    cities = [json.loads(call.function.arguments)["city"] for call in found.message.tool_calls]
    assert cities == ["Paris", "Rome"] and found.finish_reason == "tool_calls"
    assert len(create(client, tools=[WEATHER], parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_tools_none(script, client) -> None:
    script.says(CALL)
    found = create(client, tools=[WEATHER], tool_choice="none").choices[0]
    assert found.message.tool_calls is None and found.finish_reason == "stop"


def test_tools_over_several_turns(script, client) -> None:
    script.says(TWO, "Sun in Paris, rain in Rome.")
    messages: list[Any] = [*HELLO]
    first = create(client, messages=messages, tools=[WEATHER]).choices[0].message
    messages.append(first)
    for call, weather in zip(first.tool_calls, ("sun", "rain")):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": weather})
    assert create(client, messages=messages, tools=[WEATHER]).choices[0].message.content.startswith("Sun in")
    prompt = script.engine.prompts[1]
    assert "<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response>" in prompt
    assert "<think>They ask.</think>" in prompt and "<arg_value>Rome</arg_value>" in prompt


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_tools_required_and_named(random, choice) -> None:
    found = create(random, tools=[WEATHER], tool_choice=choice, max_tokens=300, seed=1).choices[0]
    assert found.message.tool_calls and all(c.function.name == "get_weather" for c in found.message.tool_calls)
    assert isinstance(json.loads(found.message.tool_calls[0].function.arguments), dict)


def test_thinking_is_switched(script, client) -> None:
    script.says("a", "a", "a")
    create(client, reasoning_effort="none")
    create(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    create(client, extra_body={"thinking": {"type": "enabled"}})
    ends = [prompt.endswith("<think></think>") for prompt in script.engine.prompts]
    assert ends == [True, True, False]


@pytest.mark.slow
def test_thinking_with_a_budget(engine) -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 8}}
    with served(Opened(engine), "small") as server:
        found = create(client_of(server), extra_body=thinking, max_tokens=60, seed=1)
    assert found.usage.completion_tokens_details.reasoning_tokens <= 12


@pytest.mark.slow
def test_a_schema(random) -> None:
    found = random.chat.completions.parse(
        model="m", messages=HELLO, response_format=City, max_tokens=200, seed=1,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )  # fmt: skip
    assert isinstance(found.choices[0].message.parsed, City)


@pytest.mark.slow
def test_json_and_a_regular_expression(random) -> None:
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    free = create(random, response_format={"type": "json_object"}, max_tokens=400, seed=1, extra_body=quiet)
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(free.choices[0].message.content), dict)
    body = {**quiet, "structured_outputs": {"regex": r"\d{4}-\d{2}"}}
    found = create(random, max_tokens=100, seed=1, extra_body=body)
    assert re.fullmatch(r"\d{4}-\d{2}", found.choices[0].message.content)


@pytest.mark.slow
def test_logprobs_n_seed_and_stop(random) -> None:
    settings = {"max_tokens": 6, "seed": 3, "temperature": 1}
    two = create(random, **settings, n=2, logprobs=True)
    assert [choice.index for choice in two.choices] == [0, 1] and len(two.choices[0].logprobs.content) <= 6
    assert all(entry.logprob <= 0 for choice in two.choices for entry in choice.logprobs.content)
    assert create(random, **settings).choices[0].message.content == two.choices[0].message.content
    whole = two.choices[0].message.content
    stopped = create(random, **settings, stop=whole[-1:]).choices[0]
    assert whole[-1:] not in stopped.message.content and stopped.finish_reason == "stop"


@pytest.mark.slow
def test_top_logprobs(random) -> None:
    found = create(random, max_tokens=3, logprobs=True, top_logprobs=4).choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 4 for entry in found)


def test_errors(script, client) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        create(client, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client_of(script, api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
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


# --- responses -------------------------------------------------------------------------------------------------------


def respond(client: Any, **fields: Any) -> Any:
    return client.responses.create(**{"model": "m", "input": "the cat", **fields})


def test_a_response(script, client) -> None:
    script.says("<think>They ask.</think>Hello!")
    found = respond(client, instructions="Be brief.")
    assert found.output_text == "Hello!" and found.output[0].content[0].text == "They ask."
    assert found.status == "completed" and found.usage.output_tokens_details.reasoning_tokens > 0


def test_a_stream_of_events(script, client) -> None:
    script.says(CALL)
    with client.responses.stream(model="m", input="the cat", tools=[FLAT]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert {"response.reasoning_text.delta", "response.output_text.delta"} < set(kinds)
    assert final.output_text == "Let me look." and json.loads(final.output[2].arguments)["days"] == 3
    assert final.output[2].name == "get_weather"


def test_responses_over_several_turns(script, client) -> None:
    script.says(CALL, "Sunny.", "Still.")
    items: list[Any] = [*HELLO]
    first = respond(client, input=items, tools=[FLAT])
    items += first.output
    items.append({"type": "function_call_output", "call_id": first.output[2].call_id, "output": "sun"})
    second = respond(client, input=items, tools=[FLAT], store=True)
    assert second.output_text == "Sunny." and "<think>They ask.</think>" in script.engine.prompts[1]
    third = respond(client, input="And now?", previous_response_id=second.id)
    assert third.output_text == "Still." and "Sunny." in script.engine.prompts[2]
    assert client.responses.retrieve(second.id).output_text == "Sunny."
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


@pytest.mark.slow
def test_an_incomplete_response(random) -> None:
    found = respond(random, max_output_tokens=2, extra_body={"seed": 3}, reasoning={"effort": "none"})
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.slow
def test_a_response_by_a_schema(random) -> None:
    quiet = {"effort": "none"}
    found = random.responses.parse(
        model="m", input="the cat", text_format=City, reasoning=quiet, max_output_tokens=200, extra_body={"seed": 1}
    )
    assert isinstance(found.output_parsed, City)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
    ids=str,
)
def test_a_response_that_must_call(random, choice) -> None:
    found = respond(random, tools=[FLAT], tool_choice=choice, max_output_tokens=300, extra_body={"seed": 1})
    assert "get_weather" in [item.name for item in found.output if item.type == "function_call"]


def test_errors_of_responses(client) -> None:
    with pytest.raises(openai.BadRequestError, match="max_output_tokens"):
        respond(client, max_output_tokens=0)
    with pytest.raises(openai.BadRequestError, match="store: true"):
        respond(client, previous_response_id="resp_none")


def test_completions_and_their_stream(random) -> None:
    settings = {"model": "m", "prompt": "the cat", "max_tokens": 4, "seed": 3}
    whole = random.completions.create(**settings).choices[0].text
    assert "".join(c.choices[0].text for c in random.completions.create(**settings, stream=True)) == whole
