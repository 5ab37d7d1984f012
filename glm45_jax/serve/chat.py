"""POST /v1/chat/completions: answers taken apart into reasoning, content and tool calls."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from glm45_jax.infer import Delta
from glm45_jax.serve.answers import Answers
from glm45_jax.serve.asked import ChatAsked, Model
from glm45_jax.serve.structure import calls_have_newlines
from glm45_jax.serve.tokens import shown, token_bytes, token_text
from glm45_jax.text import StreamParser


class Turn:
    """One answer as it comes: deltas in OpenAI's form, and what has been seen so far.

    Attributes:
      finish_reason: once it has ended.
      enough: it need not go on: a second call has begun where one is wanted.
      reasoning_tokens: tokens of the thought, its tags included.
    """

    def __init__(self, model: Model, asked: ChatAsked):
        self._model, self._asked = model, asked
        self._parser = StreamParser(
            asked.tools, asked.thinking, calls=asked.tools is not None, compact=not calls_have_newlines(model)
        )
        self._thinking, self._answering, self._called = asked.thinking, False, False
        special = model.tokenizer.special_ids
        self._opens = special.get("<think>")
        self._closes = {special.get("</think>"), special.get("<tool_call>") if asked.tools else None}
        self.enough = False
        self.finish_reason: str | None = None
        self.reasoning_tokens = 0

    def read(self, delta: Delta) -> list[dict[str, Any]]:
        """What one delta of the engine's gives."""
        for token in delta.tokens:
            self._count(token)
        found = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            found += self._parser.finish()
        kept = [one for one in found if self._keeps(one)]
        if delta.finish_reason is not None:
            ended = "length" if delta.finish_reason == "length" else "stop"
            self.finish_reason = "tool_calls" if self._called and ended == "stop" else ended
        return kept

    def _count(self, token: int) -> None:
        """Whether a token is of the thought; behind the first word of the answer none is."""
        self._thinking = self._thinking or (token == self._opens and not self._answering)
        self.reasoning_tokens += self._thinking
        if not self._thinking and not self._answering and token not in self._closes:
            self._answering = token_text(self._model.tokenizer, token).strip() != ""
        self._thinking = self._thinking and token not in self._closes

    def _keeps(self, delta: dict[str, Any]) -> bool:
        calls = delta.get("tool_calls")
        if not calls:
            return True
        if calls[0]["index"] > 0 and not self._asked.parallel:
            self.enough = True
        if self.enough or not self._asked.calls:
            return False
        self._called = True
        return True

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """Of the tokens of one delta, without the one that ended the answer."""
        if not self._asked.logprobs:
            return None
        stop_ids, top = self._asked.submit["stop_ids"], delta.top or ((),) * len(delta.tokens)
        return {
            "content": [
                {**self._logprob(token, logprob), "top_logprobs": [self._logprob(*one) for one in likely]}
                for token, logprob, likely in zip(delta.tokens, delta.logprobs, top)
                if token not in stop_ids
            ],
            "refusal": None,
        }

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._model.tokenizer
        return {
            "token": token_text(tokenizer, token),
            "logprob": shown(logprob),
            "bytes": list(token_bytes(tokenizer, token)),
        }


class ChatWriter:
    """The response to a chat request."""

    def __init__(self, model: Model, asked: ChatAsked, answers: Answers, request_id: str):
        self._model, self._asked, self._answers = model, asked, answers
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model.name}
        self._turns = [Turn(model, asked) for _ in range(asked.answers)]

    async def whole(self) -> dict[str, Any]:
        """One object, when all answers have ended."""
        deltas: list[list[dict[str, Any]]] = [[] for _ in self._turns]
        logprobs: list[list[Any]] = [[] for _ in self._turns]
        async for index, delta in self._answers:
            turn = self._turns[index]
            deltas[index] += self._read(index, delta)
            logprobs[index] += (turn.logprobs(delta) or {"content": []})["content"]
        choices = [
            {
                "index": index,
                "message": join(deltas[index]),
                "logprobs": {"content": logprobs[index], "refusal": None} if self._asked.logprobs else None,
                "finish_reason": turn.finish_reason,
            }
            for index, turn in enumerate(self._turns)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Chunks as the answers come; with usage as the last one where it is asked for."""
        for index in range(len(self._turns)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, delta in self._answers:
            turn = self._turns[index]
            found, logprobs = self._read(index, delta), turn.logprobs(delta)
            if logprobs and logprobs["content"] and not found:
                found = [{}]
            for one in found:
                yield self._chunk(index, one, logprobs)
                logprobs = None
            if turn.finish_reason is not None:
                yield self._chunk(index, {}, None, turn.finish_reason)
        if self._asked.include_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}

    def _read(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        turn = self._turns[index]
        found = turn.read(delta)
        if turn.enough:
            self._answers.requests[index].cancel()
        return found

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return chunk | ({"usage": None} if self._asked.include_usage else {})

    def _usage(self) -> dict[str, Any]:
        return self._answers.usage(sum(turn.reasoning_tokens for turn in self._turns))


def join(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The message that deltas make up."""
    texts: dict[str, list[str]] = {"reasoning_content": [], "content": []}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for piece in delta.get("tool_calls", ()):
            function = piece["function"]
            if "id" in piece:
                calls.append({"id": piece["id"], "type": "function", "function": {"name": function["name"]}})
                calls[-1]["function"]["arguments"] = []
            calls[-1]["function"]["arguments"].append(function.get("arguments", ""))
        for field in texts.keys() & delta.keys():
            texts[field].append(delta[field])
    for call in calls:
        call["function"]["arguments"] = "".join(call["function"]["arguments"])
    content, reasoning = "".join(texts["content"]), "".join(texts["reasoning_content"])
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    message["refusal"] = None
    if reasoning:
        message["reasoning_content"] = reasoning
    return message | ({"tool_calls": calls} if calls else {})
