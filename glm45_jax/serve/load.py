"""Load on a server, and what its clients see: requests that come by a clock or that keep a number on their way.

Works with any server of OpenAI's `/v1/completions`. Prompts are random tokens where it has `/tokenize`, else words.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import httpx

from glm45_jax.errors import UserError
from glm45_jax.serve.client import connect

_WORDS = "the cat sat on a mat while seven green boats went by and nobody said what time it was, or where to go next"


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
      rate: requests a second, at random moments (Poisson); None: `concurrency` are always on their way.
      prompt_tokens, new_tokens: the least and the most of a request, evenly drawn.
      shared_tokens: of a prompt's beginning, the same in all prompts of one of `shared_groups` groups.
    """

    requests: int = 64
    concurrency: int = 32
    rate: float | None = None
    prompt_tokens: tuple[int, int] = (64, 64)
    new_tokens: tuple[int, int] = (128, 128)
    shared_tokens: int = 0
    shared_groups: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Planned:
    """One request: when it comes, in seconds after the start (0 without a rate), and what it asks."""

    at: float
    prompt: list[int] | str
    new_tokens: int


@dataclasses.dataclass
class Seen:
    """What became of a request; moments in seconds after the start.

    Attributes:
      moments: of each piece of the answer.
      tokens: of the answer, as the server counts them.
    """

    began: float
    moments: list[float] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    ended: float = 0.0
    error: str | None = None

    @property
    def to_first(self) -> float:
        """Seconds to the first piece."""
        return self.moments[0] - self.began

    @property
    def per_token(self) -> float:
        """Seconds for each token after the first piece."""
        return (self.moments[-1] - self.moments[0]) / max(1, self.tokens - 1)


def draw(load: Load, pool: list[int] | list[str]) -> list[Planned]:
    """The requests, the same for the same seed; prompts are drawn from the tokens or words of `pool`."""
    rng = random.Random(load.seed)
    beginnings = [rng.choices(pool, k=load.shared_tokens) for _ in range(load.shared_groups)]
    planned, at = [], 0.0
    for _ in range(load.requests):
        size = rng.randint(*load.prompt_tokens)
        prompt = (rng.choice(beginnings) + rng.choices(pool, k=size))[:size]
        text = prompt if isinstance(pool[0], int) else " ".join(map(str, prompt))
        planned.append(Planned(at, text, rng.randint(*load.new_tokens)))  # pyright: ignore[reportArgumentType]
        at += rng.expovariate(load.rate) if load.rate else 0.0
    return planned


async def run(
    load: Load,
    url: str,
    *,
    api_key: str | None = None,
    timeout: float = 600,
    on_end: Callable[[Seen], None] | None = None,
) -> tuple[list[Seen], float]:
    """Puts the load on the server at `url`: what became of each request, and the seconds that all took.

    Args:
      on_end: called as each request ends.

    Raises:
      UserError: no such server, or it serves no model.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load.concurrency)
    async with connect(url, api_key, timeout=timeout, limits=limits) as client:
        model = await _model(client)
        planned = draw(load, await _pool(client))
        room, start = asyncio.Semaphore(load.requests if load.rate else load.concurrency), time.monotonic()

        async def one(request: Planned) -> Seen:
            if load.rate:
                await asyncio.sleep(max(0.0, start + request.at - time.monotonic()))
            async with room:
                seen = await _ask(client, model, request, start)
            if on_end:
                on_end(seen)
            return seen

        seen = await asyncio.gather(*map(one, planned))
        return seen, time.monotonic() - start


async def _model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return response.json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        where = f"{str(client.base_url).rstrip('/')}/v1/models"
        raise UserError(f"no server answers at {where}: {error}; start one with `glm45 serve`") from error


async def _pool(client: httpx.AsyncClient) -> list[int] | list[str]:
    """Tokens to draw prompts from; words where the server does not tell tokens."""
    response = await client.post("/tokenize", json={"prompt": _WORDS})
    tokens = response.json().get("tokens") if response.status_code == 200 else None
    return sorted(set(tokens)) if tokens else [*map(str, _WORDS.split())]


async def _ask(client: httpx.AsyncClient, model: str, request: Planned, start: float) -> Seen:
    seen = Seen(time.monotonic() - start)
    body = {
        "model": model, "prompt": request.prompt, "max_tokens": request.new_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise httpx.HTTPError(f"status {response.status_code}: {text[:200]}")
            async for event in _events(response):
                _note(seen, event, time.monotonic() - start)
    except (httpx.HTTPError, ValueError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    if seen.error is None and not seen.moments:
        seen.error = "an answer without a token"
    seen.ended = time.monotonic() - start
    return seen


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def _note(seen: Seen, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        raise ValueError(str(event["error"]))
    if event.get("choices"):
        seen.moments.append(now)
    if usage := event.get("usage"):
        seen.prompt_tokens, seen.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        seen.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def summary(
    seen: Iterable[Seen], seconds: float, *, first_limit: float | None = None, token_limit: float | None = None
) -> dict[str, Any]:
    """The figures: rates over the whole, and percentiles of what each request saw, in seconds.

    Args:
      first_limit, token_limit: seconds to the first token and for each further one. `goodput` is how many requests a
        second keep both, `kept` their share.
    """
    every = [*seen]
    good = [one for one in every if one.error is None]
    within = lambda seconds, limit: limit is None or seconds <= limit  # noqa: E731
    kept = [one for one in good if within(one.to_first, first_limit) and within(one.per_token, token_limit)]
    figures: dict[str, Any] = {
        "requests": len(every), "failed": len(every) - len(good), "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "prompt_tokens": sum(one.prompt_tokens for one in good),
        "cached_tokens": sum(one.cached_tokens for one in good),
        "generated_tokens": sum(one.tokens for one in good),
        "generated_tokens_per_second": sum(one.tokens for one in good) / seconds,
        "goodput": len(kept) / seconds, "kept": len(kept) / max(1, len(every)),
        "errors": sorted({one.error for one in every if one.error})[:5],
    }  # fmt: skip
    measures: dict[str, Callable[[Seen], float]] = {
        "to_first_token": lambda one: one.to_first, "per_token": lambda one: one.per_token,
        "whole": lambda one: one.ended - one.began,
    }  # fmt: skip
    for name, measure in measures.items():
        values = sorted(map(measure, good))
        figures[name] = {f"p{p}": percentile(values, p) for p in (50, 90, 99)} if values else None
    return figures


def percentile(values: list[float], p: int) -> float:
    """Of sorted values, at least one: the least that p percent of them do not exceed."""
    return values[max(0, -(-len(values) * p // 100) - 1)]
