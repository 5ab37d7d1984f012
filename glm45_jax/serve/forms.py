"""The forms in which clients read errors and streams: OpenAI's chunks, OpenAI's typed events, Anthropic's events."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from glm45_jax.serve.errors import ApiError

_ANTHROPIC_TYPES = {
    401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip


def _anthropic_error(error: ApiError) -> dict[str, Any]:
    other = "invalid_request_error" if error.status < 500 else "api_error"
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(error.status, other), "message": error.message}}


@dataclasses.dataclass(frozen=True)
class Form:
    """How a route speaks.

    Attributes:
      error: the body of an error.
      named: whether each event of a stream carries its `type` as a name.
      last: what ends a stream.
      idle: what is sent where nothing has come for long, so that no one on the way takes the connection for dead.
    """

    error: Callable[[ApiError], dict[str, Any]] = lambda error: error.body
    named: bool = False
    last: str = ""
    idle: str = ": still here\n\n"

    def event(self, value: dict[str, Any]) -> str:
        """One event of a stream."""
        name = f"event: {value['type']}\n" if self.named else ""
        return f"{name}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def response(self, error: ApiError) -> JSONResponse:
        """An error as a response of its own."""
        return JSONResponse(self.error(error), error.status, error.headers)


CHUNKS = Form(last="data: [DONE]\n\n")
TYPED = Form(named=True)
ANTHROPIC = Form(_anthropic_error, named=True, idle='event: ping\ndata: {"type": "ping"}\n\n')


def form_of(path: str) -> Form:
    """The form of a route, for errors that arise before it is reached or outside it."""
    return ANTHROPIC if path.startswith("/v1/messages") else CHUNKS
