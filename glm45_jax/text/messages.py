"""Chat messages as they arrive from clients, checked and put into the one form that GLM's templates render rightly.

What changes (the published templates get these wrong or fail on them):

- `content: null` is dropped, where the published templates write the word `None`;
- a tool message's list of text parts becomes its text, and other values in such a list JSON, in place of Python reprs;
- tool-call arguments given as a JSON string, as the OpenAI API does, become the object they hold.

Everything else passes untouched, and the caller's messages are never modified.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glm45_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages ready for a GLM template.

    Raises:
      UserError: a message has no known role, content that is neither text, list nor null, or a tool call without a name
        or with arguments that are not an object; the error names the message by its index.
    """
    check_is_list(messages, "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def check_is_list(items: Any, where: str) -> None:
    """Raises `UserError` unless `items` is a list (or tuple) of mappings."""
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Sequence):
        raise UserError(f"{where}: expected a list of objects, got {type(items).__name__}")
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise UserError(f"{where}[{index}]: expected an object, got {type(item).__name__}")


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        found = f"unknown role {role!r}" if "role" in message else "it has no role"
        raise UserError(f"{where}: {found}; expected one of {', '.join(ROLES)}")
    clean = dict(message)
    _check_content(clean.get("content"), f"{where}.content")
    if role == "tool":
        clean["content"] = _tool_content(clean.get("content"))
    elif clean.get("content") is None:
        clean.pop("content", None)
    if role == "assistant" and clean.get("tool_calls") is not None:
        calls = clean["tool_calls"]
        check_is_list(calls, f"{where}.tool_calls")
        clean["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return clean


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, (str, int, float)):
        return
    if not isinstance(content, (list, tuple)):
        raise UserError(f"{where}: expected a string, a list of parts or null, got {type(content).__name__}")
    for index, part in enumerate(content):
        if not isinstance(part, (str, Mapping)):
            raise UserError(f"{where}[{index}]: expected a string or an object, got {type(part).__name__}")


def _tool_content(content: Any) -> str | list[dict[str, str]]:
    """The text of one tool result, or for a list of results `[{"output": text}, ...]`."""
    if content is None:
        return ""
    if not isinstance(content, (list, tuple)):
        return str(content)
    if all(isinstance(part, Mapping) and "type" in part and "output" not in part for part in content):
        return "".join(_part_text(part) for part in content)
    return [{"output": _part_text(part)} for part in content]


def _part_text(part: str | Mapping[str, Any]) -> str:
    if isinstance(part, str):
        return part
    if "output" in part:
        value = part["output"]
    elif "type" in part:  # an OpenAI content part; the model reads text alone
        value = part.get("text", "") if part["type"] == "text" else ""
    else:
        value = part
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tool_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function") or call  # with OpenAI's wrapper or without
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call needs a name, at `name` or at `function.name`")
    return {"name": function["name"], "arguments": _arguments(function.get("arguments"), f"{where}.arguments")}


def _arguments(arguments: Any, where: str) -> Mapping[str, Any]:
    if arguments is None or arguments == "":  # how some clients write a call without arguments
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}: expected an object or a JSON string of one, got {type(arguments).__name__}")
    return arguments
