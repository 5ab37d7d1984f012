"""Asking an application in the same process, and an engine whose words are written beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx

from glm45_jax.infer import Delta, Engine, EngineOptions, Request, sampling_params
from glm45_jax.infer.schedule import Sequence
from glm45_jax.infer.text_stop import StoppableText
from glm45_jax.serve import App

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "the cat"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


def ask(app: Any, path: str, body: Any = None, method: str | None = None, **options: Any) -> httpx.Response:
    """One request. A body that is no bytes goes as JSON."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
            return await client.request(method, path, content=body, **options)

    return asyncio.run(go())


def chat(app: Any, messages: Any = HELLO, **fields: Any) -> dict[str, Any]:
    """The answer to a chat request that must succeed."""
    response = ask(app, CHAT, {"messages": messages, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events(app: Any, path: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
    """The events of a streamed answer, which must end as they should."""
    if path == CHAT:
        fields = {"messages": HELLO, **fields}
    response = ask(app, path, {"stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = response.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def refusal(app: Any, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error of a request that must be refused."""
    response = ask(app, path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


class Scripted:
    """In place of an engine: answers with given texts, one token a delta, or leaves the requests to the test."""

    def __init__(self, engine: Engine, *texts: str, held: bool = False, slots: int = 4):
        self.config, self.tokenizer, self.room, self.failure = engine.config, engine.tokenizer, engine.room, None
        self.options, self.stats, self.grammars = EngineOptions(slots=slots), engine.stats, engine.grammars
        self.texts, self.held = list(texts), held
        self.requests: list[Request] = []
        self.prompts: list[str] = []
        self.asked: list[dict[str, Any]] = []

    def submit(self, prompt: list[int], max_new_tokens: int, *, stop_ids: Any, stop_strings: Any, **sampling: Any):
        assert self.tokenizer is not None
        self.asked.append({"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, **sampling})
        for name in ("grammar", "thought", "thought_budget", "top_logprobs"):
            sampling.pop(name, None)
        self.prompts.append(self.tokenizer.decode(prompt))
        params = sampling_params(1, self.config.vocab_size, None, sampling)  # pyright: ignore[reportArgumentType]
        sequence = Sequence(len(prompt), list(prompt), max_new_tokens)
        text = StoppableText(self.tokenizer, stop_strings)
        request = Request(sequence, params, frozenset(stop_ids), text, self._cancel)
        self.requests.append(request)
        if not self.held:
            self._answer(request, self.tokenizer.encode(self.texts.pop(0)))
        return request

    def _answer(self, request: Request, tokens: list[int]) -> None:
        for token in tokens:
            request.logprobs.append(-1.0)
            assert request.text is not None
            request.push(Delta((token,), (-1.0,), request.text.push(token)))
        request.push(Delta(text=request.text.finish(), finish_reason="stop"))

    def _cancel(self, request: Request) -> None:
        request.push(Delta(finish_reason="cancelled"))


def scripted(engine: Engine, *texts: str, **options: Any) -> tuple[App, Scripted]:
    """An application over an engine that answers with these texts."""
    fake = Scripted(engine, *texts, **options)
    return App(fake, "scripted"), fake  # pyright: ignore[reportArgumentType]


class Visit:
    """One request, spoken to the application by hand, so that its client can go away at any time."""

    def __init__(self, app: Any, path: str, body: dict[str, Any], unfinished: bool = False):
        self.status, self.chunks = 0, list[bytes]()
        self._app, self._body, self._sent = app, json.dumps(body).encode(), False
        self._gone, self._unfinished = asyncio.Event(), unfinished
        self._scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [], "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "root_path": "",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip

    def begin(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._app(self._scope, self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": self._unfinished}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.chunks.append(message.get("body", b""))


async def until(holds: Callable[[], Any], seconds: float = 60) -> None:
    """Waits for something to hold."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def connect(port: int) -> socket.socket:
    """A connection to a server that may be starting."""
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        time.sleep(0.05)
    raise AssertionError(f"nothing listens at port {port}")
