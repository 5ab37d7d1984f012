"""POST /v1/responses: a turn as a row of items, and the typed events in which it comes."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from glm45_jax.serve.answers import Answers
from glm45_jax.serve.asked import Model
from glm45_jax.serve.blocks import Block, Step, steps
from glm45_jax.serve.chat import Turn
from glm45_jax.serve.errors import ApiError
from glm45_jax.serve.responses_asked import ResponseAsked
from glm45_jax.serve.stored import Store, Stored
from glm45_jax.serve.translated import Conversation

_PREFIX = {"thought": "rs", "text": "msg", "call": "fc"}


class ResponseWriter:
    """The response to a request for a response."""

    def __init__(self, store: Store, model: Model, asked: ResponseAsked, answers: Answers, request_id: str):
        self._store, self._asked, self._answers, self._turn = store, asked, answers, Turn(model, asked)
        # Who knows the id may read a stored answer: it must not be the request's, which stands in the log.
        self._tag = uuid.uuid4().hex
        self._created = int(time.time())
        self._output: list[dict[str, Any]] = []
        self._conversation = Conversation(asked.messages)
        self._sent = 0

    async def whole(self) -> dict[str, Any]:
        """One object, when the answer has ended."""
        async for step in steps(self._answers, self._turn):
            if step.what == "end":
                self._end(step)
        return self._finished()

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Typed events as the answer comes, numbered."""
        try:
            for name in ("created", "in_progress"):
                yield self._event(f"response.{name}", response=self._response("in_progress"))
            async for step in steps(self._answers, self._turn):
                for event in self._events(step):
                    yield event
            response = self._finished()
            yield self._event(f"response.{response['status']}", response=response)
        except ApiError as error:
            failure = {"code": "server_error", "message": error.message}
            yield self._event("response.failed", response=self._response("failed") | {"error": failure})

    # --- items -------------------------------------------------------------------------------------------------------

    def _events(self, step: Step) -> Iterator[dict[str, Any]]:
        if step.what == "start":
            return
        block = step.of
        at = {"item_id": self._id(block), "output_index": block.index}
        inside = at if block.kind == "call" else at | {"content_index": 0}
        if step.what == "begin":
            item = self._item(block, "in_progress")
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind != "call":
                yield self._event("response.content_part.added", **inside, part=_part(block))
        elif step.what == "grow":
            logprobs = {"logprobs": step.logprobs} if block.kind == "text" else {}
            yield self._event(f"{_stem(block)}.delta", **inside, delta=step.piece, **logprobs)
        else:
            yield self._event(f"{_stem(block)}.done", **inside, **_done(block))
            if block.kind != "call":
                yield self._event("response.content_part.done", **inside, part=_part(block))
            yield self._event("response.output_item.done", output_index=block.index, item=self._end(step))

    def _end(self, step: Step) -> dict[str, Any]:
        """The item of a block that has ended, which is now of the output and the conversation."""
        block, cut = step.of, step.last and self._turn.finish_reason == "length"
        item = self._item(block, "incomplete" if cut else "completed")
        self._output.append(item)
        if block.kind == "thought":
            self._conversation.think(block.text)
        elif block.kind == "text":
            self._conversation.say(block.text)
        else:
            self._conversation.call(block.call_id, block.name, block.text or "{}")
        return item

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        begun = status == "in_progress"
        head = {"id": self._id(block), "status": status}
        if block.kind == "call":
            return {
                "type": "function_call", **head, "call_id": block.call_id, "name": block.name,
                "arguments": "" if begun else block.text or "{}",
            }  # fmt: skip
        content = [] if begun else [_part(block)]
        if block.kind == "thought":
            return {"type": "reasoning", **head, "summary": [], "content": content}
        return {"type": "message", **head, "role": "assistant", "content": content}

    def _id(self, block: Block) -> str:
        return f"{_PREFIX[block.kind]}_{self._tag}{block.index:02}"

    # --- the response ------------------------------------------------------------------------------------------------

    def _finished(self) -> dict[str, Any]:
        cut = self._turn.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed")
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["completed_at"] = int(time.time())
        response["usage"] = self._usage()
        if self._asked.keep:
            response["store"] = self._store.put(response["id"], Stored(response, self._conversation.messages))
        return response

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": f"resp_{self._tag}", "object": "response", "created_at": self._created, "status": status,
            "error": None, "incomplete_details": None, "output": [*self._output], "usage": None, **self._asked.echo,
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        usage = self._answers.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._turn.reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **fields}


def _stem(block: Block) -> str:
    names = {"thought": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}
    return f"response.{names[block.kind]}"


def _done(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return {"name": block.name, "arguments": block.text or "{}"}
    return {"text": block.text} | ({"logprobs": block.logprobs} if block.kind == "text" else {})


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "thought":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": [*block.logprobs]}
