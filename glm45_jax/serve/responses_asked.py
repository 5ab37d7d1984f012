"""A body of POST /v1/responses: OpenAI's other form of a chat, read as one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from glm45_jax.serve.asked import ChatAsked, Model
from glm45_jax.serve.errors import refused
from glm45_jax.serve.fields import Fields, kind_of, read_json
from glm45_jax.serve.stored import Store
from glm45_jax.serve.translated import Conversation, arguments_of, objects, read_as_chat, string, text_of

# Names of a chat request -> those of this form
_NAMES = {
    "messages": "input", "max_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}  # fmt: skip
_IGNORED = (
    "user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
    "truncation", "max_tool_calls", "stream_options",
)  # fmt: skip
_NOT_HERE = ("background", "conversation", "prompt", "context_management")
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_LOGPROBS = "message.output_text.logprobs"


@dataclasses.dataclass(frozen=True)
class ResponseAsked(ChatAsked):
    """A request for a response.

    Attributes:
      echo: the fields of the response that repeat the request.
      messages: the conversation so far, without the instructions, which are for this answer alone.
      keep: whether the answer is to be kept.
    """

    echo: dict[str, Any]
    messages: list[dict[str, Any]]
    keep: bool


def read_response(store: Store, model: Model, body: bytes) -> ResponseAsked:
    """A body of POST /v1/responses. Raises `ApiError`."""
    fields = Fields(read_json(body))
    for name in _NOT_HERE:
        if fields.get(name, False) is not False:
            raise fields.wrong(name, "not supported", "unsupported")
    for name in _IGNORED:
        fields.get(name)
    conversation = Conversation(_before(store, fields))
    _read_input(conversation, fields)
    instructions = fields.text("instructions")
    first = [{"role": "system", "content": instructions}] if instructions else []
    chat = {"messages": first + conversation.messages, "max_tokens": fields.get("max_output_tokens")}
    for name in ("model", "temperature", "top_p", "stream", "seed", "parallel_tool_calls", "top_logprobs"):
        chat[name] = fields.get(name)
    chat |= _tools(fields) | _form(fields)
    include = fields.list("include")
    chat["logprobs"] = _LOGPROBS in include or bool(fields.get("top_logprobs"))
    chat["reasoning_effort"] = _effort(fields)
    keep, echo = fields.boolean("store"), _echo(model, fields)
    asked = read_as_chat(model, fields, chat, _NAMES)
    ignored = [f"include: {name}" for name in include if name != _LOGPROBS]
    asked = dataclasses.replace(asked, ignored=[*asked.ignored, *ignored])
    return ResponseAsked(**vars(asked), echo=echo, messages=conversation.messages, keep=keep)


def _before(store: Store, fields: Fields) -> list[dict[str, Any]]:
    """The conversation that the request goes on with."""
    if fields.get("previous_response_id") is None:
        return []
    stored = store.get(fields.text("previous_response_id"))
    if stored is None:
        what = "there is no such answer; only those asked for with store: true are kept, and not for ever"
        raise fields.wrong("previous_response_id", what, "previous_response_not_found")
    return stored.messages


# --- input -----------------------------------------------------------------------------------------------------------


def _read_input(conversation: Conversation, fields: Fields) -> None:
    given = fields.get("input", [])
    if isinstance(given, str):
        return conversation.add("user", given)
    if not isinstance(given, list):
        raise fields.wrong("input", f"expected a string or a list of items, not {kind_of(given)}")
    for where, item in objects(given, "input"):
        _read_item(conversation, item, where)


def _read_item(conversation: Conversation, item: dict[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        return _read_message(conversation, item, where)
    if kind == "reasoning":
        name = "content" if item.get("content") else "summary"
        return conversation.think(text_of(item.get(name), f"{where}.{name}", _TEXTS))
    if kind == "function_call":
        arguments = arguments_of(item.get("arguments"), f"{where}.arguments")
        return conversation.call(string(item, "call_id", where), string(item, "name", where), arguments)
    if kind == "function_call_output":
        output = text_of(item.get("output"), f"{where}.output", _TEXTS)
        return conversation.add("tool", output, tool_call_id=string(item, "call_id", where))
    what = "expected message, function_call, function_call_output or reasoning"
    raise refused(f"{where}.type: {what}", f"{where}.type")


def _read_message(conversation: Conversation, item: dict[str, Any], where: str) -> None:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise refused(f"{where}.role: expected user, assistant, system or developer", f"{where}.role")
    text = text_of(content, f"{where}.content", _TEXTS)
    if role == "assistant":
        return conversation.say(text, apart=True)
    conversation.add("user" if role == "user" else "system", text)


# --- what else is asked ----------------------------------------------------------------------------------------------


def _tools(fields: Fields) -> dict[str, Any]:
    tools = [_tool(tool, where) for where, tool in objects(fields.list("tools"), "tools")]
    choice = fields.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return {"tools": tools, "tool_choice": choice}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise refused(f"{where}.type: only functions are known", f"{where}.type")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _form(fields: Fields) -> dict[str, Any]:
    own = fields.object("text")
    own.get("verbosity")
    form = own.get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {key: form[key] for key in form if key != "type"}}
    return {"response_format": form}


def _effort(fields: Fields) -> Any:
    own = fields.object("reasoning")
    own.get("summary")
    return own.get("effort")


def _echo(model: Model, fields: Fields) -> dict[str, Any]:
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, dict):
        raise fields.wrong("metadata", f"expected an object, not {kind_of(metadata)}")
    echo = {
        "background": False,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "metadata": metadata,
        "model": model.name,
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "previous_response_id": fields.get("previous_response_id"),
        "reasoning": {"effort": fields.get("reasoning", {}).get("effort"), "summary": None},
        "store": fields.boolean("store"),
        "temperature": fields.get("temperature", 1.0),
        "text": {"format": fields.get("text", {}).get("format") or {"type": "text"}},
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": fields.list("tools"),
        "top_logprobs": fields.get("top_logprobs", 0),
        "top_p": fields.get("top_p", 1.0),
        "truncation": "disabled",
    }
    try:
        json.dumps(echo, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise refused("the body holds half a character (a lone surrogate)") from error
    return echo
