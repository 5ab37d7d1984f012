"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of a chat, read as one and written back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from glm45_jax.serve.answers import Answers
from glm45_jax.serve.asked import ChatAsked, Model, read_messages
from glm45_jax.serve.blocks import Block, Step, steps
from glm45_jax.serve.chat import Turn
from glm45_jax.serve.errors import ApiError, refused
from glm45_jax.serve.fields import Fields, kind_of, read_json
from glm45_jax.serve.translated import Conversation, objects, part_text, read_as_chat, renamed, string, text_of

# Names of a chat request -> Anthropic's
_NAMES = {
    "stop": "stop_sequences", "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "response_format": "output_config.format",
}  # fmt: skip
# Fields that change nothing here: who asks, and how a service of many machines is to treat it.
_IGNORED = ("metadata", "service_tier", "cache_control", "inference_geo", "speed", "diagnostics", "betas")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_anthropic(model: Model, body: bytes) -> ChatAsked:
    """A body of POST /v1/messages. Raises `ApiError`."""
    fields = Fields(read_json(body))
    if fields.get("max_tokens") is None:
        raise fields.wrong("max_tokens", "it is needed")
    chat = _chat(fields)
    chat["max_tokens"] = fields.get("max_tokens")
    for name in ("temperature", "top_p", "top_k", "stream", "seed"):
        chat[name] = fields.get(name)
    chat["stop"] = fields.list("stop_sequences")
    return read_as_chat(model, fields, chat, _NAMES)


def count_tokens(model: Model, body: bytes) -> dict[str, Any]:
    """How many tokens a prompt has. Raises `ApiError`."""
    try:
        return {"input_tokens": len(read_messages(model, Fields(_chat(Fields(read_json(body))))))}
    except ApiError as error:
        raise renamed(error, _NAMES) from error


def _chat(fields: Fields) -> dict[str, Any]:
    """The conversation and how it may go on, as a chat request says it."""
    conversation = Conversation()
    if system := text_of(fields.get("system"), "system", ("text",)):
        conversation.add("system", system)
    for where, message in objects(fields.list("messages"), "messages"):
        _read_message(conversation, message, where)
    if conversation.messages and conversation.messages[-1]["role"] == "assistant":
        raise fields.wrong("messages", "the last one must not be the assistant's: a begun answer is not gone on with")
    for name in _IGNORED:
        fields.get(name)
    chat: dict[str, Any] = {"messages": conversation.messages, "thinking": _thinking(fields)}
    if fields.get("model") is not None:
        chat["model"] = fields.text("model")
    if tools := fields.list("tools"):
        chat["tools"] = [_tool(tool, where) for where, tool in objects(tools, "tools")]
    chat |= _tool_choice(fields) | _output_config(fields)
    return chat


# --- messages --------------------------------------------------------------------------------------------------------


def _read_message(conversation: Conversation, message: dict[str, Any], where: str) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise refused(f"{where}.role: expected user, assistant or system", f"{where}.role")
    conversation.end_turn()
    if role == "system":
        return conversation.add("system", text_of(content, f"{where}.content", ("text",)))
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        what = f"{where}.content: expected a string or a list of blocks, not {kind_of(content)}"
        raise refused(what, f"{where}.content")
    blocks = objects(content, f"{where}.content")
    if role == "user":
        return _read_user(conversation, blocks)
    for place, block in blocks:
        _read_assistant(conversation, block, place)
    if not blocks:
        conversation.say("")


def _read_user(conversation: Conversation, blocks: list[tuple[str, dict[str, Any]]]) -> None:
    """Results of tools are messages of their own, in their place among the texts."""
    texts: list[str] = []
    for where, block in blocks:
        if block.get("type") != "tool_result":
            texts.append(part_text(block, where, ("text",)))
            continue
        if texts:
            conversation.add("user", "\n".join(texts))
            texts = []
        result = text_of(block.get("content"), f"{where}.content", ("text",))
        conversation.add("tool", result, tool_call_id=string(block, "tool_use_id", where))
    if texts or not blocks:
        conversation.add("user", "\n".join(texts))


def _read_assistant(conversation: Conversation, block: dict[str, Any], where: str) -> None:
    kind = block.get("type")
    if kind == "thinking":
        conversation.think(string(block, "thinking", where))
    elif kind == "tool_use":
        if not isinstance(block.get("input", {}), dict):
            raise refused(f"{where}.input: expected an object, not {kind_of(block['input'])}", f"{where}.input")
        arguments = json.dumps(block.get("input", {}))
        conversation.call(string(block, "id", where), string(block, "name", where), arguments)
    elif kind != "redacted_thinking":  # a thought that only its author can read
        conversation.say(part_text(block, where, ("text",)))


# --- what else is asked ----------------------------------------------------------------------------------------------


def _thinking(fields: Fields) -> dict[str, Any]:
    """As Anthropic's clients expect, nothing is thought aloud unless they ask for it."""
    own = fields.object("thinking")
    kind = own.text("type", "disabled")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise fields.wrong("thinking", "its type is enabled, disabled or adaptive")
    own.get("display")
    budget = own.integer("budget_tokens", None, 1, 2**31 - 1)
    if kind == "disabled":
        return {"type": "disabled"}
    return {"type": "enabled"} | ({} if budget is None else {"budget_tokens": budget})


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise refused(f"{where}.type: only tools of the client's own are known, with an input_schema", f"{where}.type")
    function: dict[str, Any] = {"name": tool.get("name")}
    if tool.get("description") is not None:
        function["description"] = string(tool, "description", where)
    if not isinstance(tool.get("input_schema"), dict):
        what = f"{where}.input_schema"
        raise refused(f"{what}: expected an object, not {kind_of(tool.get('input_schema'))}", what)
    function["parameters"] = tool["input_schema"]
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _tool_choice(fields: Fields) -> dict[str, Any]:
    if fields.get("tool_choice") is None:
        return {}
    own = fields.object("tool_choice")
    parallel = {"parallel_tool_calls": False} if own.boolean("disable_parallel_tool_use") else {}
    kind = own.text("type", "auto")
    if kind == "tool":
        return {"tool_choice": {"type": "function", "function": {"name": own.text("name")}}, **parallel}
    if kind not in _CHOICES:
        raise fields.wrong("tool_choice", "its type is auto, any, tool or none")
    return {"tool_choice": _CHOICES[kind], **parallel}


def _output_config(fields: Fields) -> dict[str, Any]:
    own = fields.object("output_config")
    own.get("effort")
    if own.get("format") is None:
        return {}
    form = own.object("format")
    if form.text("type") != "json_schema":
        raise form.wrong("type", "expected json_schema")
    schema = {"name": "answer", "schema": form.get("schema"), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


# --- the answer ------------------------------------------------------------------------------------------------------


class AnthropicWriter:
    """The response to a request for a message."""

    def __init__(self, model: Model, asked: ChatAsked, answers: Answers, request_id: str):
        self._model, self._answers, self._turn = model, answers, Turn(model, asked)
        self._id = f"msg_{request_id}"

    async def whole(self) -> dict[str, Any]:
        """One object, when the answer has ended."""
        content = [_whole(step.of) async for step in steps(self._answers, self._turn) if step.what == "end"]
        return self._message(content) | self._ending() | {"usage": self._usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """Events as the answer comes. The first waits for the first token: it tells what was in the cache."""
        async for step in steps(self._answers, self._turn):
            yield self._event(step)
        yield {"type": "message_delta", "delta": self._ending(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def _event(self, step: Step) -> dict[str, Any]:
        if step.what == "start":
            empty = {"stop_reason": None, "stop_sequence": None}
            return {"type": "message_start", "message": self._message([]) | empty | {"usage": self._usage()}}
        block = step.of
        if step.what == "begin":
            return {"type": "content_block_start", "index": block.index, "content_block": _empty(block)}
        if step.what == "end":
            return {"type": "content_block_stop", "index": block.index}
        kind, field = {
            "thought": ("thinking_delta", "thinking"), "text": ("text_delta", "text"),
            "call": ("input_json_delta", "partial_json"),
        }[block.kind]  # fmt: skip
        return {"type": "content_block_delta", "index": block.index, "delta": {"type": kind, field: step.piece}}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model.name}
        return {**head, "content": content}

    def _ending(self) -> dict[str, Any]:
        said = self._answers.requests[0].text
        stop = said.stop_string if said is not None else None
        reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(str(self._turn.finish_reason), "end_turn")
        if stop is not None and reason == "end_turn":
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stop if reason == "stop_sequence" else None}

    def _usage(self) -> dict[str, Any]:
        """Of the prompt's tokens, those that the cache held are counted apart."""
        usage = self._answers.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"thinking_tokens": self._turn.reasoning_tokens},
        }


def _empty(block: Block) -> dict[str, Any]:
    if block.kind == "thought":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return _empty(block) | {"input": json.loads(block.text or "{}")}
    return _empty(block) | {"thinking" if block.kind == "thought" else "text": block.text}
