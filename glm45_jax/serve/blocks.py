"""A turn as a row of blocks, thought, text or call, for the forms that number them."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from typing import Any, Literal

from glm45_jax.serve.answers import Answers
from glm45_jax.serve.chat import Turn


@dataclasses.dataclass
class Block:
    """One block, as far as it has come.

    Attributes:
      index: its place in the row.
      call_id, name: of a call.
      logprobs: of a text's tokens, where they are wanted.
    """

    index: int
    kind: Literal["thought", "text", "call"]
    call_id: str = ""
    name: str = ""
    pieces: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        """The thought, the text, or the arguments in JSON."""
        return "".join(self.pieces)


@dataclasses.dataclass(frozen=True)
class Step:
    """What happens to a block: it begins, grows by a piece, or ends, and with the last one the turn.

    The very first step has no block: the first token has come.
    """

    what: Literal["start", "begin", "grow", "end"]
    block: Block | None = None
    piece: str = ""
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    last: bool = False

    @property
    def of(self) -> Block:
        assert self.block is not None
        return self.block


async def steps(answers: Answers, turn: Turn) -> AsyncGenerator[Step]:
    """The steps of a request's one answer. Raises `ApiError` where the engine fails."""
    block: Block | None = None
    logprobs: list[dict[str, Any]] = []
    started = False
    async for _, delta in answers:
        if not started:
            started = True
            yield Step("start")
        found = turn.read(delta)
        if turn.enough:
            answers.requests[0].cancel()
        logprobs += (turn.logprobs(delta) or {"content": []})["content"]
        for one in found:
            kind, call, piece = _parted(one)
            if block is None or kind != block.kind or "id" in call:
                if block is not None:
                    yield Step("end", block)
                index = 0 if block is None else block.index + 1
                block = Block(index, kind, call.get("id", ""), call.get("function", {}).get("name", ""))
                yield Step("begin", block)
            own = logprobs if kind == "text" else []
            logprobs = []
            block.pieces.append(piece)
            block.logprobs += own
            if piece:
                yield Step("grow", block, piece, own)
    if block is not None:
        yield Step("end", block, last=True)


def _parted(delta: dict[str, Any]) -> tuple[Literal["thought", "text", "call"], dict[str, Any], str]:
    """What a delta of the parser's is: its kind, its call, its text."""
    if "tool_calls" in delta:
        (call,) = delta["tool_calls"]
        return "call", call, call["function"].get("arguments", "")
    if "reasoning_content" in delta:
        return "thought", {}, delta["reasoning_content"]
    return "text", {}, delta.get("content", "")
