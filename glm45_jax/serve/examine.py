"""Questions with known answers, put to a running server: how many it gets right."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx

from glm45_jax.errors import UserError
from glm45_jax.serve.client import connect

Match = Literal["exact", "number", "contains"]

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@dataclasses.dataclass(frozen=True)
class Question:
    """Attributes:
    answers: any of them is right.
    """

    messages: list[dict[str, Any]]
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the server said, and whether it is right; `error` where it said nothing."""

    text: str
    reasoning: str
    right: bool
    error: str | None = None


def read_questions(file: Path, limit: int | None = None) -> list[Question]:
    """Questions of a JSONL file: {"prompt": text or "messages": [...], "answer": text or [texts]} on each line.

    Raises:
      UserError: no such file, or a line of another form, by its number.
    """
    if not file.exists():
        raise UserError(f"{file}: no such file")
    questions = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if line.strip() and (limit is None or len(questions) < limit):
            questions.append(_question(line, f"{file}, line {number}"))
    if not questions:
        raise UserError(f"{file} has no questions")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    messages = value.get("messages") if isinstance(value, dict) else None
    if isinstance(value, dict) and isinstance(value.get("prompt"), str):
        messages = [{"role": "user", "content": value["prompt"]}]
    answers = value.get("answer") if isinstance(value, dict) else None
    answers = [answers] if isinstance(answers, str | int | float) else answers
    if not isinstance(messages, list) or not isinstance(answers, list) or not answers:
        raise UserError(f'{where}: expected {{"prompt": text, "answer": text}}, or "messages" and a list of answers')
    return Question(messages, tuple(map(str, answers)))


def is_right(text: str, answers: tuple[str, ...], match: Match) -> bool:
    """Whether an answer's content is one of those wanted.

    exact: the same text, but for spaces around words. number: its last number is the wanted one's last, as a number.
    contains: the wanted text stands in it, in whatever case.
    """
    if match == "exact":
        return " ".join(text.split()) in {" ".join(a.split()) for a in answers}
    if match == "contains":
        return any(a.casefold() in text.casefold() for a in answers)
    found = _last_number(text)
    return found is not None and any(found == _last_number(a) for a in answers)


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


async def examine(
    questions: list[Question],
    url: str,
    *,
    match: Match,
    fields: dict[str, Any],
    api_key: str | None = None,
    concurrency: int = 16,
    on_end: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """The server's answers, in order.

    Args:
      fields: of the request besides messages, such as max_tokens and temperature.
    """
    room = asyncio.Semaphore(concurrency)

    async def one(question: Question) -> Answer:
        async with room:
            answer = await _ask(client, question, match, fields)
        if on_end:
            on_end(answer)
        return answer

    async with connect(url, api_key, timeout=None) as client:
        return [*await asyncio.gather(*map(one, questions))]


async def _ask(client: httpx.AsyncClient, question: Question, match: Match, fields: dict[str, Any]) -> Answer:
    try:
        response = await client.post("/v1/chat/completions", json={"messages": question.messages} | fields)
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {response.text[:200]}")
        message = response.json()["choices"][0]["message"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        return Answer("", "", False, f"{type(error).__name__}: {error}")
    text = message.get("content") or ""
    return Answer(text, message.get("reasoning_content") or "", is_right(text, question.answers, match))


def interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    z, share = 1.959964, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
