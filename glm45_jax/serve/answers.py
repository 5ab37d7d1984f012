"""A request's answers on their way: room in the queue, deltas of several at once, and what ends them early."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glm45_jax.errors import UserError
from glm45_jax.infer import Delta, Engine, EngineClosed, Request
from glm45_jax.serve.asked import Asked
from glm45_jax.serve.errors import ApiError
from glm45_jax.serve.forms import Form
from glm45_jax.serve.record import record_of

T = TypeVar("T")


class Gone(ApiError):
    """The client has gone away: what is said to it nobody reads."""

    def __init__(self) -> None:
        super().__init__(499, "the client has gone")


class Gate:
    """How many answers may be on their way. Used on the event loop alone."""

    def __init__(self, capacity: int):
        self.capacity, self.inside, self.draining = capacity, 0, False

    @contextlib.contextmanager
    def room(self, count: int, held: int = 0) -> Iterator[None]:
        """Room for answers, besides what the same request holds already.

        Raises:
          ApiError: 503 while the server ends, 429 where too many wait.
        """
        if self.draining and not held:
            raise ApiError(503, "the server is shutting down", code="draining", headers={"Retry-After": "10"})
        if self.inside > held and self.inside + count > self.capacity:
            what = f"{self.inside} answers are on their way and no more can wait; try again"
            raise ApiError(429, what, code="queue_full", headers={"Retry-After": "1"})
        self.inside += count
        try:
            yield
        finally:
            self.inside -= count


class Answers:
    """The answers to one request, each an engine's request. Iterate for (index, delta) as they come, over all.

    Attributes:
      first, last: when the first and the last token came.

    Raises:
      ApiError: the engine refuses them.
    """

    def __init__(self, engine: Engine, asked: Asked):
        self.first, self.last = 0.0, 0.0
        self.requests: list[Request] = []
        self._asked = asked
        try:
            for number in range(asked.begun):
                seed, prompt = (asked.seed + number) % 2**32, asked.prompts[number // asked.n]
                self.requests.append(engine.submit(prompt, seed=seed, **asked.submit))
        except EngineClosed as error:
            self.cancel()
            raise ApiError(503, str(error), code="draining") from error
        except UserError as error:
            self.cancel()
            raise ApiError(400 if engine.failure is None else 500, str(error)) from error

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Raises `ApiError` where an answer cannot go on: status 400 where its own grammar ends it, else 500."""
        queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()

        async def listen(index: int, request: Request) -> None:
            async for delta in request:
                queue.put_nowait((index, delta))

        listeners = [asyncio.create_task(listen(i, request)) for i, request in enumerate(self.requests)]
        try:
            left = len(listeners)
            while left:
                index, delta = await queue.get()
                if delta.finish_reason == "error":
                    raise self._cannot_go_on(self.requests[index], str(delta.error))
                if delta.tokens:
                    self.last = time.monotonic()
                    self.first = self.first or self.last
                left -= delta.finish_reason is not None
                yield index, delta
        finally:
            for listener in listeners:
                listener.cancel()

    @staticmethod
    def _cannot_go_on(request: Request, why: str) -> ApiError:
        constraint = request.constraint
        if constraint is not None and constraint.error is not None:  # a schema too rich, a bias against all it allows
            return ApiError(400, why, code="grammar_error")
        return ApiError(500, why, code="engine_error")

    def cancel(self) -> None:
        """Ends what has not ended: the engine has its pages back at once."""
        for request in self.requests:
            if request.finish_reason is None:
                request.cancel()

    @property
    def generated(self) -> int:
        """Tokens of the answers so far."""
        return sum(len(request.logprobs) for request in self.requests)

    def usage(self, reasoning_tokens: int | None = None) -> dict[str, Any]:
        """OpenAI's account of tokens; a prompt counts once, however many answers it has."""
        prompt, generated = sum(map(len, self._asked.prompts)), self.generated
        cached = sum(request.cached_tokens for request in self.requests[:: self._asked.n])
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
        return usage


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled where the client goes away.

    Raises:
      Gone: then.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events in a route's form; an error becomes an event too.

    Args:
      events: what to send.
      end: called in any case, when all is sent or the client has gone.
    """

    media_type = "text/event-stream"
    idle_seconds = 15.0

    def __init__(
        self, events: AsyncGenerator[dict[str, Any]], end: Callable[[], None], headers: dict[str, str], form: Form
    ):
        self._events, self._end, self._form = events, end, form
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except (Gone, ConnectionError):
            record_of(scope).gone = True
        finally:
            self._end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._sent_at = time.monotonic()
        keeping = asyncio.create_task(self._keep_alive(send))
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await self._send(send, self._form.event(event))
        except ApiError as error:
            await self._send(send, self._form.event(self._form.error(error)))
        finally:
            keeping.cancel()
        if self._form.last:
            await self._send(send, self._form.last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """Sends something now and then while no event comes."""
        while True:
            left = self._sent_at + self.idle_seconds - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
            else:
                await self._send(send, self._form.idle)

    async def _send(self, send: Send, data: str) -> None:
        self._sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": data.encode(), "more_body": True})
