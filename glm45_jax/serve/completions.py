"""POST /v1/completions: text that continues a prompt as it stands, behind the prompt itself where that is asked for."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import anyio.to_thread

from glm45_jax.errors import UserError
from glm45_jax.infer import Delta, EngineClosed
from glm45_jax.infer.request import Top
from glm45_jax.infer.score import Scores
from glm45_jax.serve.answers import Answers
from glm45_jax.serve.asked import CompletionAsked, Model
from glm45_jax.serve.errors import ApiError
from glm45_jax.serve.tokens import shown, token_bytes, token_text


class CompletionWriter:
    """The response to a completion request. Choice `i` is answer `i % n` to prompt `i // n`."""

    def __init__(self, model: Model, asked: CompletionAsked, answers: Answers, request_id: str):
        self._model, self._asked, self._answers = model, asked, answers
        self._head = {
            "id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time()), "model": model.name
        }  # fmt: skip
        self._offsets = [0] * asked.answers

    async def whole(self) -> dict[str, Any]:
        """One object, when all answers have ended."""
        choices = [self._choice(index, "", None) for index in range(self._asked.answers)]
        async for new in self._parts():
            choice = choices[new["index"]]
            choice["text"] += new["text"]
            choice["finish_reason"] = new["finish_reason"]
            for name, values in (new["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"].setdefault(name, []).extend(values)
        return {**self._head, "choices": choices, "usage": self._answers.usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Chunks as the answers come; with usage as the last one where it is asked for."""
        async for choice in self._parts():
            if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
                yield {**self._head, "choices": [choice]} | ({"usage": None} if self._asked.include_usage else {})
        if self._asked.include_usage:
            yield {**self._head, "choices": [], "usage": self._answers.usage()}

    async def _parts(self) -> AsyncGenerator[dict[str, Any]]:
        """What the choices consist of, prompts first where they are asked for."""
        if self._asked.echo:
            for number, prompt in enumerate(self._asked.prompts):
                scores = await self._scores(prompt) if self._asked.logprobs else None
                for index in range(number * self._asked.n, (number + 1) * self._asked.n):
                    yield self._prompt(index, prompt, scores)
        async for index, delta in self._answers:
            yield self._read(index, delta)

    # --- the prompt ------------------------------------------------------------------------------------------------

    async def _scores(self, prompt: list[int]) -> Scores:
        if len(prompt) < 2:
            return Scores([], [])
        score, top = self._model.engine.score, self._asked.top_logprobs
        try:
            return await anyio.to_thread.run_sync(score, prompt, top, abandon_on_cancel=True)
        except EngineClosed as error:
            raise ApiError(503, str(error), code="draining") from error
        except UserError as error:
            raise ApiError(500, str(error), code="engine_error") from error

    def _prompt(self, index: int, prompt: list[int], scores: Scores | None) -> dict[str, Any]:
        """A choice's beginning. Nothing is before the first token, from which it could follow: it has null."""
        text, logprobs = self._model.tokenizer.decode(prompt), None
        if scores is not None:
            likely = scores.top if self._asked.top_logprobs else [None] * len(scores.logprobs)
            rows = [(prompt[0], None, None), *zip(prompt[1:], scores.logprobs, likely)]
            logprobs = self._places(index, rows)
        return self._choice(index, text, None if self._asked.goes_on else "length", logprobs)

    # --- the answer ------------------------------------------------------------------------------------------------

    def _read(self, index: int, delta: Delta) -> dict[str, Any]:
        reason = delta.finish_reason
        logprobs = self._logprobs(index, delta) if self._asked.logprobs else None
        return self._choice(index, delta.text, "stop" if reason == "cancelled" else reason, logprobs)

    def _choice(self, index: int, text: str, reason: str | None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, delta: Delta) -> dict[str, list[Any]] | None:
        """Of the tokens of one delta, without the one that ended the answer.

        Behind a prompt with that one too: whoever scores prompts takes as many off as he has asked for.
        """
        left_out = () if self._asked.echo else self._asked.submit["stop_ids"]
        top = delta.top or (None,) * len(delta.tokens)
        kept = [(t, p, likely) for t, p, likely in zip(delta.tokens, delta.logprobs, top) if t not in left_out]
        return self._places(index, kept) if kept else None

    def _places(self, index: int, rows: Sequence[tuple[int, float | None, Top | None]]) -> dict[str, list[Any]]:
        """OpenAI's form of tokens, their log-probabilities and what is likeliest in their places."""
        offsets = []
        for token, *_ in rows:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token_text(self._model.tokenizer, token))
        name = self._name if self._asked.echo else lambda token: token_text(self._model.tokenizer, token)
        return {
            "tokens": [name(token) for token, *_ in rows],
            "token_logprobs": [None if p is None else shown(p) for _, p, _ in rows],
            "top_logprobs": [self._likeliest(*row) for row in rows], "text_offset": offsets,
        }  # fmt: skip

    def _likeliest(self, token: int, logprob: float | None, likely: Top | None) -> dict[str, float] | None:
        """By text, the chosen token too; of two with the same text the likelier."""
        if likely is None or logprob is None:
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
