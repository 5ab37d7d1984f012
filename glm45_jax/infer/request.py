"""A request on its way: what was asked, and its answer as it comes, to a thread or to an event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal

from glm45_jax.errors import UserError
from glm45_jax.infer.constraint import Constraint
from glm45_jax.infer.generate import Generation
from glm45_jax.infer.sampling import SamplingParams
from glm45_jax.infer.schedule import Sequence
from glm45_jax.infer.text_stop import StoppableText

Top = tuple[tuple[int, float], ...]
FinishReason = Literal["stop", "length", "cancelled", "error"]


class EngineClosed(UserError):
    """The engine takes no requests any more."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """What came since the last one.

    Attributes:
      top: for each token the likeliest ones in its place, as (token, log-probability), where they were asked for.
      text: of the answer; empty without a tokenizer, or while a character or a stop string is not whole.
      finish_reason: of the last one; None before.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    top: tuple[Top, ...] = ()


class Request:
    """Iterate over it, or `async for`: deltas as they come, once each. `result()` waits for the end."""

    def __init__(
        self,
        sequence: Sequence,
        sampling: SamplingParams,
        stop_ids: frozenset[int],
        text: StoppableText | None,
        cancel: Callable[[Request], None],
        constraint: Constraint | None = None,
        top_logprobs: int = 0,
    ):
        self.sequence, self.sampling, self.stop_ids, self.text = sequence, sampling, stop_ids, text
        self.constraint, self.top_logprobs = constraint, top_logprobs
        self.adjusts_logits = sampling.uses_penalties or sampling.bias_ids.shape[1] > 0
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._cancel = cancel
        self._deltas: collections.deque[Delta] = collections.deque()
        self._changed, self._ended = threading.Condition(), threading.Event()
        self._wake: Callable[[], object] = lambda: None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.sequence.prompt_length

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the cache already; known with the first delta."""
        return self.sequence.found

    def cancel(self) -> None:
        """Ends the request soon; its pages are free for others then."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Generation:
        """The whole answer, deltas that nobody took included.

        Raises:
          UserError: the request could not be served. TimeoutError: it has not ended after `timeout` seconds.
        """
        if not self._ended.wait(timeout):  # and is not woken by each token
            raise TimeoutError(f"the request has not ended after {timeout} s")
        if self.finish_reason == "error":
            raise UserError(str(self.error))
        cut = self.sequence.prompt_length
        reason = "stop" if self.finish_reason == "stop" else "length"
        text = None if self.text is None else self.text.text
        return Generation(self.sequence.tokens[:cut], self.sequence.tokens[cut:], [*self.logprobs], reason, text)

    def __iter__(self) -> Iterator[Delta]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._deltas)
                delta = self._deltas.popleft()
            yield delta
            if delta.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Delta]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(ready.set)
        while True:
            ready.clear()
            with self._changed:
                delta = self._deltas.popleft() if self._deltas else None
            if delta is None:
                await ready.wait()
                continue
            yield delta
            if delta.finish_reason is not None:
                return

    def push(self, delta: Delta) -> None:
        """For the engine: hands a delta on; nothing comes after the one with a reason."""
        with self._changed:
            if self.finish_reason is not None:
                return
            self.finish_reason, self.error = delta.finish_reason, delta.error
            self._deltas.append(delta)
            self._changed.notify_all()
        if delta.finish_reason is not None:
            self._ended.set()
        with contextlib.suppress(RuntimeError):  # the event loop that listened is closed
            self._wake()
