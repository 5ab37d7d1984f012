"""What every route has at hand, and the way of a request from its body to its answers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glm45_jax.serve.answers import Answers, EventStream, Gate, unless_gone
from glm45_jax.serve.asked import Asked, Model
from glm45_jax.serve.errors import ApiError
from glm45_jax.serve.forms import CHUNKS, Form
from glm45_jax.serve.record import Record, record_of

A = TypeVar("A", bound=Asked)


class Writer(Protocol):
    """Turns a request's answers into the response of one route."""

    def whole(self) -> Coroutine[Any, Any, dict[str, Any]]: ...

    def events(self) -> AsyncGenerator[dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Service:
    """The model, and how many answers may be on their way."""

    model: Model
    gate: Gate
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def read(self, request: Request, read: Callable[[Model, bytes], A]) -> A:
        """The body, checked and tokenised in a thread of its own. Raises `ApiError`."""
        body = await self.body(request)
        return await anyio.to_thread.run_sync(read, self.model, body)

    async def body(self, request: Request) -> bytes:
        """Raises `ApiError` for one that is too large, too slow, or compressed."""
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body must not be compressed")
        limit, body = self.model.options.max_body_bytes, bytearray()
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            raise too_large
        try:
            async with asyncio.timeout(self.model.options.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, "the body took too long to come") from error
        return bytes(body)

    async def answer(
        self,
        request: Request,
        read: Callable[[Model, bytes], A],
        writer: Callable[[Model, A, Answers, str], Writer],
        form: Form = CHUNKS,
    ) -> Response:
        """Reads a request, has it answered, and gives the response; the engine works only while someone listens."""
        record = record_of(request.scope)
        with contextlib.ExitStack() as ending:
            ending.enter_context(self.gate.room(1))  # before the body is tokenised, which is work too
            asked = await self.read(request, read)
            ending.enter_context(self.gate.room(asked.answers - 1, held=1))
            answers = Answers(self.model.engine, asked)
            ending.callback(_end, answers, record)
            record.answers, record.stream = asked.answers, asked.stream
            made, headers = writer(self.model, asked, answers, record.id), _warnings(asked)
            if asked.stream:
                return EventStream(made.events(), ending.pop_all().close, headers, form)
            return JSONResponse(await unless_gone(request.receive, made.whole()), headers=headers)


def _end(answers: Answers, record: Record) -> None:
    answers.cancel()
    usage = answers.usage()
    record.prompt_tokens, record.generated_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    record.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    record.first_token, record.last_token = answers.first, answers.last


def _warnings(asked: Asked) -> dict[str, str]:
    """A header that names the fields that were not known."""
    if not asked.ignored:
        return {}
    return {"X-GLM45-Warning": "ignored: " + ", ".join(json.dumps(name[:80]) for name in asked.ignored[:16])}
