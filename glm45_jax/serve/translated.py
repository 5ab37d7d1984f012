"""What the readers of other forms share: their requests become a chat request, and are read as one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from glm45_jax.serve.asked import ChatAsked, Model, chat_of
from glm45_jax.serve.errors import ApiError, refused
from glm45_jax.serve.fields import Fields, kind_of


def read_as_chat(model: Model, own: Fields, chat: Mapping[str, Any], names: Mapping[str, str]) -> ChatAsked:
    """What a chat request asks for, with errors and unknown fields as the client knows them.

    Args:
      own: the request's fields, all read that are known.
      chat: the chat request that they come to.
      names: fields of the chat request that the client calls otherwise.
    """
    try:
        asked = chat_of(model, Fields(chat))
    except ApiError as error:
        raise renamed(error, names) from error
    return dataclasses.replace(asked, ignored=[*own.unknown, *(names.get(name, name) for name in asked.ignored)])


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """An error by the client's own name of the field."""
    for name, own in names.items():
        if error.param is not None and (error.param == name or error.param.startswith((f"{name}.", f"{name}["))):
            message = error.message.removeprefix(error.param)
            message = f"{own}{message}" if message != error.message else message
            return ApiError(error.status, message, own, error.code, error.headers)
    return error


def text_of(content: Any, where: str, kinds: Sequence[str]) -> str:
    """A string, or the texts of a list of parts, one below the other.

    Raises:
      ApiError: it is neither, or a part is of another kind: images, sounds, files.
    """
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise refused(f"{where}: expected a string or a list, not {kind_of(content)}", where)
    return "\n".join(part_text(part, f"{where}[{i}]", kinds) for i, part in enumerate(content))


def part_text(part: Any, where: str, kinds: Sequence[str]) -> str:
    """The text of one part. Raises `ApiError` where it has none."""
    if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
        raise refused(f"{where}: only text can be read: {{'type': '{kinds[0]}', 'text': …}}", where)
    return part["text"]


def objects(values: Sequence[Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """Each object of a list, and where it stands. Raises `ApiError` for one that is none."""
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise refused(f"{where}[{i}]: expected an object, not {kind_of(value)}", f"{where}[{i}]")
    return [(f"{where}[{i}]", value) for i, value in enumerate(values)]


def string(value: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be a string."""
    if not isinstance(value.get(name), str):
        raise refused(f"{where}.{name}: expected a string, not {kind_of(value.get(name))}", f"{where}.{name}")
    return value[name]


def call(identity: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call as a chat message has it."""
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def arguments_of(value: Any, where: str) -> str:
    """An object in JSON. Raises `ApiError` where `value` is no string, or holds something else."""
    try:
        found = {} if value is None or value == "" else json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise refused(f"{where}: not valid JSON: {error}", where) from error
    if not isinstance(found, dict):
        raise refused(f"{where}: expected an object in JSON, not {kind_of(found)}", where)
    return json.dumps(found)


class Conversation:
    """Chat messages as they are gathered; what an assistant thinks, says and calls in turn becomes one message."""

    def __init__(self, messages: Sequence[dict[str, Any]] = ()):
        self.messages = list(messages)
        self._open: dict[str, Any] | None = None  # the assistant's, while nobody else has spoken

    def add(self, role: str, content: str, **fields: Any) -> None:
        """What someone else says."""
        self._open = None
        self.messages.append({"role": role, "content": content, **fields})

    def think(self, text: str) -> None:
        message = self._assistant("content", "tool_calls")
        message["reasoning_content"] = message.get("reasoning_content", "") + text

    def say(self, text: str, apart: bool = False) -> None:
        """`apart`: a text that follows a text is another message; after calls it belongs to theirs."""
        message = self._assistant(*["content"] * (apart and "tool_calls" not in (self._open or {})))
        message["content"] = message.get("content", "") + text

    def call(self, identity: str, name: str, arguments: str) -> None:
        self._assistant().setdefault("tool_calls", []).append(call(identity, name, arguments))

    def end_turn(self) -> None:
        """What the assistant says next is another message."""
        self._open = None

    def _assistant(self, *ends: str) -> dict[str, Any]:
        """Its message; a new one after any of the fields `ends`."""
        if self._open is None or any(name in self._open for name in ends):
            self._open = {"role": "assistant"}
            self.messages.append(self._open)
        return self._open
