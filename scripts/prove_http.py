"""Proves the HTTP layer: any body to any route gets an answer or a refusal in the route's own form, in bounded time.

    pip install atheris    # on Linux; without it the inputs are hypothesis's, which do not follow coverage
    python scripts/prove_http.py --json docs/proofs/http.json

The application runs in this process, over an engine that answers with texts of the input too. For any input: status 2xx
or 4xx; JSON that strict readers take; events that number and nest as they should; no answer is left on its way. For
hostile bodies of four sizes: the time grows with the size. `tests/serve/test_fuzz.py` runs the same checks briefly.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro
from circumstances import circumstances, write_figures
from fuzzing import examined, guided, guided_apart
from hypothesis import HealthCheck
from hypothesis import strategies as st
from rich.console import Console

from glm45_jax.infer.grammar import Grammars
from glm45_jax.serve import App, ServeOptions
from tests.serve.support import Scripted
from tests.support import small_config, small_tokenizer

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
ROUTES = (CHAT, MESSAGES, RESPONSES, "/v1/completions", "/v1/messages/count_tokens", "/tokenize", "/detokenize")
CALL = "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
TEXTS = ("Hello.", f"<think>a</think>b{CALL}c{CALL}", "<think>", CALL, "")

# --- one request -----------------------------------------------------------------------------------------------------


class Http:
    """The application over a scripted engine, asked without a network."""

    def __init__(self) -> None:
        tokenizer = small_tokenizer()
        like = SimpleNamespace(config=small_config(vocab_size=384), tokenizer=tokenizer, room=2048, stats=dict)
        like.grammars = Grammars(tokenizer, tokenizer.eos_ids)
        self.engine = Scripted(like)  # pyright: ignore[reportArgumentType]
        options = ServeOptions(max_tokens=4096, queue=1000, store_bytes=1 << 16)
        self.app = App(self.engine, "m", options)  # pyright: ignore[reportArgumentType]
        self.loop = asyncio.new_event_loop()

    def post(self, path: str, body: bytes, text: str = "Hello.") -> tuple[int, str, bytes]:
        """Status, content type and body of the response; the model says `text`."""
        self.engine.texts = [text] * 4096
        for made in (self.engine.requests, self.engine.prompts, self.engine.asked):
            made.clear()
        return self.loop.run_until_complete(asyncio.wait_for(self._post(path, body), 30))

    async def _post(self, path: str, body: bytes) -> tuple[int, str, bytes]:
        status, kind, chunks, sent, gone = 0, "", list[bytes](), False, asyncio.Event()
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [], "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "root_path": "", "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await gone.wait()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status, kind
            if message["type"] == "http.response.start":
                status = message["status"]
                kind = dict(message["headers"]).get(b"content-type", b"").decode()
            chunks.append(message.get("body", b""))

        await self.app(scope, receive, send)
        return status, kind, b"".join(chunks)


@functools.cache
def http() -> Http:
    return Http()


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def check(path: str, body: bytes, text: str = "Hello.") -> int:
    """All that must hold for any body. Returns the status."""
    status, kind, said = http().post(path, body, text)
    assert http().app.gate.inside == 0
    if kind.startswith("text/event-stream"):
        assert status == 200
        check_events(path, said.decode())
        return status
    value = json.loads(said.decode(), parse_constant=refuse)
    assert status == 200 or 400 <= status < 500, (status, value)
    if status != 200:
        own = {"type", "message"} if path.startswith(MESSAGES) else {"type", "message", "param", "code"}
        assert set(value["error"]) == own and value["error"]["message"], value
        assert ("type" in value) is path.startswith(MESSAGES)
    return status


def check_events(path: str, said: str) -> None:
    """A stream is whole: each event JSON, each begun block or item ended before the next, and the last one last."""
    *events, rest = said.split("\n\n")
    assert rest == ""
    datas = [event[event.index("data: ") + 6 :] for event in events]
    if path in (CHAT, "/v1/completions"):
        assert datas.pop() == "[DONE]"
    values = [json.loads(data, parse_constant=refuse) for data in datas]
    assert not any("error" in value for value in values if path != RESPONSES), values
    kinds = [value.get("type", "") for value in values]
    if path == MESSAGES:
        nested([kind for kind in kinds if kind.startswith("content_block_")], "content_block_start", "_stop")
        assert (kinds[0], *kinds[-2:]) == ("message_start", "message_delta", "message_stop")
    if path == RESPONSES:
        assert [value["sequence_number"] for value in values] == list(range(len(values)))
        nested([kind for kind in kinds if "output_item" in kind], "response.output_item.added", ".done")
        assert kinds[0] == "response.created" and kinds[-1] == f"response.{values[-1]['response']['status']}"


def nested(kinds: Sequence[str], begin: str, end: str) -> None:
    """Each begin is followed by its end before the next one."""
    is_open = False
    for kind in kinds:
        if kind == begin or kind.endswith(end):
            assert is_open is not (kind == begin)
            is_open = kind == begin
    assert not is_open


# --- inputs ----------------------------------------------------------------------------------------------------------

NAMES = (
    "messages", "role", "content", "tool_calls", "tool_call_id", "reasoning_content", "type", "text", "function",
    "name", "parameters", "properties", "arguments", "$ref", "anyOf", "pattern", "enum", "tools", "tool_choice", "stop",
    "logit_bias", "stream", "stream_options", "include_usage", "logprobs", "top_logprobs", "n", "seed", "max_tokens",
    "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "prompt", "response_format", "json_schema", "schema", "thinking", "budget_tokens", "model",
    "chat_template_kwargs", "enable_thinking", "parallel_tool_calls", "echo", "system", "input_schema", "tool_use_id",
    "stop_sequences", "output_config", "format", "disable_parallel_tool_use", "id", "input", "instructions", "output",
    "call_id", "previous_response_id", "store", "reasoning", "effort", "summary", "include", "max_output_tokens",
    "metadata", "tokens", "return_token_strs", "reasoning_effort", "ignore_eos", "signature", "strict",
    "structured_outputs", "regex", "choice", "grammar", "guided_json", "thinking_token_budget", "required",
    "additionalProperties", "items",
)  # fmt: skip
WORDS = (
    "user", "assistant", "tool", "system", "developer", "function", "auto", "none", "required", "any", "f", "text",
    "tool_use", "tool_result", "enabled", "disabled", "json_object", "json_schema", "regex", "string", "object",
    "message", "function_call", "function_call_output", "input_text", "output_text", "{}", "[",
    "message.output_text.logprobs",
)  # fmt: skip
SNIPPETS = [f'"{word}"' for word in dict.fromkeys((*NAMES, *WORDS))]
SNIPPETS += [
    '{"role": "user", "content": "a"}',
    "true",
    "false",
    "null",
    "\\ud800",
    "1e999",
    '{"',
    '"}',
    '": "',
    '", "',
]
# Bytes that are no ASCII stand for what requests are made of, so that a fuzzer finds it.
BYTES = {0x80 + i: snippet for i, snippet in enumerate(SNIPPETS[:128])}

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}
USER = {"role": "user", "content": "a"}
SEEDS: list[tuple[str, Any]] = [
    (CHAT, {"messages": [USER], "stream": True, "n": 2, "logprobs": True, "stop": ["a"], "logit_bias": {"1": 1}}),
    (CHAT, {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                         {"role": "tool", "content": "a"}], "tools": [TOOL], "parallel_tool_calls": False}),
    (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "thinking": {"type": "enabled"}}),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}}}),
    (CHAT, {"messages": [USER], "structured_outputs": {"regex": "a+"}, "top_logprobs": 2, "logprobs": True}),
    (MESSAGES, {"max_tokens": 9, "stream": True, "messages": [
        USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "a"}]}],
        "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "any"}, "system": "a"}),
    (MESSAGES, {"max_tokens": 9, "messages": [USER], "thinking": {"type": "enabled", "budget_tokens": 9}}),
    (RESPONSES, {"input": "a", "stream": True, "store": True, "reasoning": {"effort": "none"}, "metadata": {"a": "a"}}),
    (RESPONSES, {"input": [USER, {"type": "reasoning", "summary": [], "content": []},
                           {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                           {"type": "function_call_output", "call_id": "a", "output": "a"}],
                 "tools": [{"type": "function", "name": "f", "parameters": {}}], "instructions": "a"}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 0, "stream": True}),
    ("/v1/messages/count_tokens", {"messages": [USER], "system": [{"type": "text", "text": "a"}]}),
    ("/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2]}),
]  # fmt: skip


def check_bytes(data: bytes) -> None:
    """Any bytes: one for the route, one for what the model says, the others a body in ASCII and snippets."""
    path, script = ROUTES[data[0] % len(ROUTES)] if data else CHAT, data[1] if data[1:] else 0
    body = data[2:].decode("latin-1").translate(BYTES)
    check(path, body.encode(), TEXTS[script] if script < len(TEXTS) else body[-80:])


def seeds() -> list[bytes]:
    """Requests that are answered, as the fuzzer's bytes."""
    found = []
    for number, (path, value) in enumerate(SEEDS):
        body = json.dumps(value)
        for byte, snippet in sorted(BYTES.items(), key=lambda item: -len(item[1])):
            body = body.replace(snippet, chr(byte))
        found.append(bytes([ROUTES.index(path), number % len(TEXTS)]) + body.encode("latin-1"))
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.sampled_from(NAMES), inner),
    max_leaves=12,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes, str]:
    """A request that would be answered, with some of its fields replaced or more of them, and what the model says."""
    path, value = draw(st.sampled_from(SEEDS))
    fields = draw(st.dictionaries(st.sampled_from([*NAMES, *value]), JSON, max_size=3))
    return path, json.dumps({**value, **fields}).encode(), draw(st.sampled_from(TEXTS))


# --- times -----------------------------------------------------------------------------------------------------------

FRESH = itertools.count(10**9)  # so that no grammar has been compiled before
HOSTILE: dict[str, Callable[[int], tuple[str, Any]]] = {
    "one long text": lambda n: (CHAT, {"messages": [{"role": "user", "content": "a" * n}]}),
    "messages": lambda n: (CHAT, {"messages": [USER] * (n // 32)}),
    "parts": lambda n: (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * (n // 32)}]}),
    "calls": lambda n: (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}] * (n // 16)}]}),
    "unknown fields": lambda n: (CHAT, {"messages": [USER], **{f"x{i}": 0 for i in range(n // 10)}}),
    "stop": lambda n: (CHAT, {"messages": [USER], "stop": ["a"] * (n // 5)}),
    "logit_bias": lambda n: (CHAT, {"messages": [USER], "logit_bias": {str(i): 1 for i in range(n // 10)}}),
    "tools": lambda n: (CHAT, {"messages": [USER], "tools": [TOOL] * (n // 100)}),
    "properties of a schema": lambda n: (CHAT, {"messages": [USER], "response_format": {
        "type": "json_schema", "json_schema": {"schema": {"properties": {
            f"a{i}": {} for i in (*range(n // 12), next(FRESH))}}}}}),
    "choices": lambda n: (CHAT, {"messages": [USER], "structured_outputs": {
        "choice": [f"{i}" for i in range(n // 10)] + [f"{next(FRESH)}"]}}),
    "an expression": lambda n: (CHAT, {"messages": [USER], "structured_outputs": {
        "regex": "(a|b)*c" * (n // 7) + f"{next(FRESH)}"}}),
    "Anthropic's blocks": lambda n: (MESSAGES, {"max_tokens": 1, "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "tool_result", "tool_use_id": "a"}]
         * (n // 80)}]}),
    "Anthropic's thoughts": lambda n: (MESSAGES, {"max_tokens": 1, "messages": [
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}] * (n // 40)}, USER]}),
    "items": lambda n: (RESPONSES, {"input": [{"type": "function_call", "call_id": "a", "name": "f"}] * (n // 60)}),
    "thoughts": lambda n: (RESPONSES, {"input": [{"type": "reasoning", "summary": []}] * (n // 36)}),
    "token ids": lambda n: ("/detokenize", {"tokens": [1] * (n // 3)}),
    "prompts": lambda n: ("/v1/completions", {"prompt": [[1, 1, 1]] * (n // 11)}),
}  # fmt: skip


def seconds_for(name: str, size: int) -> float:
    """Of a hostile body, which is answered or refused; the best of three."""

    def once() -> float:
        path, value = HOSTILE[name](size)
        body = json.dumps(value).encode()
        begin = time.perf_counter()
        http().post(path, body)
        return time.perf_counter() - begin

    return min(once() for _ in range(3))


# --- the proof -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Proof:
    """Fuzzing and times of the HTTP layer."""

    json: Path | None = None
    """Where to write the figures."""
    seconds: float = 600.0
    """How long to fuzz; a tenth of it goes to hypothesis's requests, on top."""


def fuzz(folder: str, seconds: float) -> None:
    """Coverage-guided, in this process, which ends with it."""
    http()
    guided(folder, seeds(), check_bytes, seconds, longest=400, timeout=20)


def fuzzed(seconds: float) -> dict[str, Any]:
    """Runs `fuzz` in a process of its own; raises with its output if it found something."""
    watched = ["glm45_jax.serve", "glm45_jax.text.messages", "glm45_jax.text.chat", "glm45_jax.text.parsing"]
    instrumented = f"import atheris\nwith atheris.instrument_imports(include={watched!r}):\n    import prove_http\n"
    return guided_apart(lambda folder: f"{instrumented}prove_http.fuzz({folder!r}, {seconds})")


def main() -> None:
    args, console = tyro.cli(Proof), Console(stderr=True)
    try:
        importlib.import_module("atheris")
        packages, has_atheris = ("hypothesis", "atheris", "starlette"), True
    except ImportError:
        packages, has_atheris = ("hypothesis", "starlette"), False
    figures: dict[str, Any] = {"circumstances": circumstances(*packages)}
    sizes = [2**14, 2**16, 2**18, 2**20]
    figures["milliseconds for bodies of about 16, 64, 256 and 1024 KiB"] = {
        name: [round(seconds_for(name, size) * 1e3, 1) for size in sizes] for name in HOSTILE
    }
    console.print("times", figures)
    figures["requests with some fields replaced"] = examined(
        requests(), lambda one: check(*one), args.seconds / 10, list(HealthCheck)
    )
    console.print("requests", figures["requests with some fields replaced"])
    if has_atheris:
        figures["fuzzing"] = fuzzed(args.seconds)
    else:
        inputs = examined(st.binary(max_size=400), check_bytes, args.seconds, list(HealthCheck))
        figures["fuzzing"] = {"engine": "hypothesis", "inputs": inputs, "failures": 0}
    figures["fuzzing"]["seconds"] = args.seconds
    console.print("fuzzing", figures["fuzzing"])
    write_figures(args.json, figures)


if __name__ == "__main__":
    main()
