"""`glm45 serve` as its users meet it: a process on a port, OpenAI's own client, a signal under load."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pydantic
import pytest

from tests.serve.support import CHAT, HELLO, WEATHER, connect, free_port
from tests.support import QUICK_FLAGS, ROOT, small_config, write_checkpoint

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow

KEY = "secret"
LONG = {"messages": HELLO, "max_tokens": 1200, "ignore_eos": True, "stream": True}


class Server:
    """A `glm45 serve` of a small random model."""

    def __init__(self, checkpoint: Path, cache: Path, log: Path):
        self.port, self.log = free_port(), log
        command = [
            sys.executable, "-m", "glm45_jax", "serve", str(checkpoint), "--port", str(self.port), "--no-warm-up",
            "--slots", "4", "--cache-tokens", "4096", "--step-tokens", "32", "--name", "small",
        ]  # fmt: skip
        env = {
            **os.environ, "GLM45_API_KEY": KEY, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FLAGS}",
        }  # fmt: skip
        with log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0)
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def post(self, body: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"http://127.0.0.1:{self.port}{CHAT}", json=body, headers=headers, timeout=120)

    def metric(self, name: str) -> float:
        headers = {"Authorization": f"Bearer {KEY}"}
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", headers=headers).text
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))

    def connect(self) -> socket.socket:
        return connect(self.port)


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("serve")
    config = small_config(
        num_hidden_layers=2, vocab_size=384, max_position_embeddings=2048, eos_token_id=tokenizer.eos_ids
    )
    model = write_checkpoint(folder, config, tokenizer)
    servers: list[Server] = []

    def begin() -> Server:
        servers.append(Server(model, folder / "cache", folder / f"log{len(servers)}"))
        return servers[-1]

    yield begin
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(start) -> Server:
    return start()


def test_openais_client(server) -> None:
    client = server.client
    assert [model.id for model in client.models.list()] == ["small"]
    settings = {"model": "small", "messages": HELLO, "max_tokens": 8, "seed": 3}
    whole = client.chat.completions.create(**settings, logprobs=True, n=2)
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert len(choice.logprobs.content) <= 8 and whole.usage.completion_tokens <= 16 and len(whole.choices) == 2
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content and chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    tools = client.chat.completions.create(**settings, tools=[WEATHER], tool_choice="auto")
    assert tools.choices[0].finish_reason in ("stop", "length", "tool_calls")
    quick = client.chat.completions.create(**settings, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert quick.usage.prompt_tokens != whole.usage.prompt_tokens
    assert client.completions.create(model="small", prompt="the cat", max_tokens=4).choices[0].text is not None


class Trip(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    days: int | None


def test_openais_client_gets_the_form_it_asks_for(server) -> None:
    client, settings = server.client, {"model": "small", "messages": HELLO, "max_tokens": 700, "seed": 3}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 9}}
    parsed = client.chat.completions.parse(**settings, response_format=Trip, extra_body=thinking)
    assert isinstance(parsed.choices[0].message.parsed, Trip)
    assert parsed.usage.completion_tokens_details.reasoning_tokens <= 9 + 2
    tool = openai.pydantic_function_tool(Trip)
    calling = {"tools": [tool], "parallel_tool_calls": False, "extra_body": thinking}
    for choice in ("required", {"type": "function", "function": {"name": "Trip"}}):
        found = client.chat.completions.create(**settings, **calling, tool_choice=choice).choices[0]
        (call,) = found.message.tool_calls
        assert found.finish_reason == "tool_calls" and Trip.model_validate_json(call.function.arguments)
    off = {"reasoning_effort": "none"}
    found = client.chat.completions.create(**settings, **off, extra_body={"guided_regex": "a{3}!"}).choices[0]
    assert found.message.content == "aaa!"
    found = client.chat.completions.create(**settings, **off, logprobs=True, top_logprobs=2).choices[0]
    assert all(len(entry.top_logprobs) == 2 for entry in found.logprobs.content)


def test_its_errors(server) -> None:
    settings = {"model": "small", "messages": HELLO}
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.client.chat.completions.create(**settings, temperature=9)
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        form = {"name": "x", "strict": True, "schema": {"type": "array", "uniqueItems": True}}
        server.client.chat.completions.create(**settings, response_format={"type": "json_schema", "json_schema": form})
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")


def test_a_closed_connection_frees_the_pages(server) -> None:
    before = server.metric("glm45_cancelled_total")
    body = json.dumps(LONG).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + body)
        assert b"200 OK" in connection.recv(1 << 16)
    deadline = time.monotonic() + 30
    while server.metric("glm45_pages_in_use") or server.metric("glm45_cancelled_total") == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_listens_on_loopback_alone(server) -> None:
    """CVE-2025-30202."""
    table = Path("/proc/net/tcp")
    if not table.exists():
        pytest.skip("no /proc/net/tcp here")
    listening = [line.split()[1] for line in table.read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert [a for a in listening if a.endswith(f":{server.port:04X}")] == [f"0100007F:{server.port:04X}"]


def test_headers_without_end_and_noise(server) -> None:
    """CVE-2025-48956, and bytes that are no HTTP (CVE-2024-50050)."""
    with server.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
        for _ in range(64):
            connection.sendall(b"x" * 65536)
        assert b"400" in connection.recv(4096)[:20]
    for size in (1, 100, 10_000):
        with server.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(random.Random(size).randbytes(size))
    assert server.post({"messages": HELLO, "max_tokens": 1}).status_code == 200


def test_a_signal_under_load(start) -> None:
    """Running requests finish, new ones are refused, and the process ends well."""
    server = start()
    stream = server.client.chat.completions.create(
        model="small", messages=HELLO, max_tokens=1200, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    for _ in range(5):
        next(chunks)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    late = server.post({"messages": HELLO, "max_tokens": 1})
    assert late.status_code == 503 and late.headers["retry-after"]
    last = list(chunks)[-1]
    assert last.choices[0].finish_reason == "length"
    assert server.process.wait(30) == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert any(line.get("generated_tokens") == 1200 for line in lines)
