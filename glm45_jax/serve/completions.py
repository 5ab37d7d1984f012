"""POST /v1/completions: text that continues a prompt as it stands."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from glm45_jax.infer import Delta
from glm45_jax.infer.request import Top
from glm45_jax.serve.answers import Answers
from glm45_jax.serve.asked import Asked, Model
from glm45_jax.serve.tokens import shown, token_bytes, token_text


class CompletionWriter:
    """The response to a completion request. Choice `i` is answer `i % n` to prompt `i // n`."""

    def __init__(self, model: Model, asked: Asked, answers: Answers, request_id: str):
        self._model, self._asked, self._answers = model, asked, answers
        self._head = {
            "id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time()), "model": model.name
        }  # fmt: skip
        self._offsets = [0] * asked.answers

    async def whole(self) -> dict[str, Any]:
        """One object, when all answers have ended."""
        choices = [self._choice(index, "", None) for index in range(self._asked.answers)]
        async for index, delta in self._answers:
            choice, new = choices[index], self._read(index, delta)
            choice["text"] += new["text"]
            choice["finish_reason"] = new["finish_reason"]
            for name, values in (new["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"].setdefault(name, []).extend(values)
        return {**self._head, "choices": choices, "usage": self._answers.usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Chunks as the answers come; with usage as the last one where it is asked for."""
        async for index, delta in self._answers:
            choice = self._read(index, delta)
            if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
                yield {**self._head, "choices": [choice]} | ({"usage": None} if self._asked.include_usage else {})
        if self._asked.include_usage:
            yield {**self._head, "choices": [], "usage": self._answers.usage()}

    def _read(self, index: int, delta: Delta) -> dict[str, Any]:
        reason = delta.finish_reason
        logprobs = self._logprobs(index, delta) if self._asked.logprobs else None
        return self._choice(index, delta.text, "stop" if reason == "cancelled" else reason, logprobs)

    def _choice(self, index: int, text: str, reason: str | None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, delta: Delta) -> dict[str, list[Any]] | None:
        """Of the tokens of one delta, without the one that ended the answer."""
        stop_ids = self._asked.submit["stop_ids"]
        top = delta.top or (None,) * len(delta.tokens)
        kept = [(t, p, likely) for t, p, likely in zip(delta.tokens, delta.logprobs, top) if t not in stop_ids]
        if not kept:
            return None
        texts, offsets = [token_text(self._model.tokenizer, token) for token, *_ in kept], []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts, "token_logprobs": [shown(p) for _, p, _ in kept],
            "top_logprobs": [self._likeliest(*one) for one in kept], "text_offset": offsets,
        }  # fmt: skip

    def _likeliest(self, token: int, logprob: float, likely: Top | None) -> dict[str, float] | None:
        """By text, the chosen token too; of two with the same text the likelier."""
        if likely is None:
            return None
        names = [(self._name(one), shown(p)) for one, p in sorted([*likely, (token, logprob)], key=lambda x: x[1])]
        return dict(reversed(dict(names).items()))

    def _name(self, token: int) -> str:
        """Its text; bytes that are no text by themselves are spelled out."""
        piece = token_bytes(self._model.tokenizer, token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
