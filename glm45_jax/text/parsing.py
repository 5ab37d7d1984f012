"""What a model wrote, taken apart: reasoning, content, tool calls; whole, or while it comes.

One lexer finds the tags, one state machine reads them, and `parse_output` is the stream of the whole text: both give
the same, however a stream is cut. Each character is looked at a bounded number of times. Held back is only what may
begin a tag, whitespace that may have to be trimmed, names and keys, and values whose type shows at their end.

    <think>reasoning</think>content<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>

Both layouts are read, GLM-4.5's with newlines between the tags and GLM-4.7's without. One text they read differently:
`<tool_call>name</tool_call>` is how 4.7 calls without arguments, and in 4.5's lacks the newline that ends the name.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm45_jax.text.arguments import ArgumentsWriter, Tools

_TAGS = tuple(f"<{slash}{name}>" for name in ("think", "tool_call", "arg_key", "arg_value") for slash in ("", "/"))
_TAG = re.compile("|".join(_TAGS))
_LONGEST = max(map(len, _TAGS))
_AFTER_VALUE = ("<arg_key>", "</arg_key>", "<arg_value>", "<tool_call>", "</tool_call>")
_WORD = re.compile(r"[^\s<>]*")
_BLANK = re.compile(r"(?:\s|\\n)*")  # between tags; some models write the newline as two characters


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call: its `id`, the tool's `name`, and `json`, the arguments as an object in JSON."""

    id: str
    name: str
    json: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments; of a key that came twice the last."""
        return json.loads(self.json)


@dataclasses.dataclass(frozen=True)
class ParsedOutput:
    """A model's turn, taken apart. `reasoning` and `content` are stripped, and None where there is nothing.

    Calls that were left out: `unknown_tools` are names that are not among the tools, `unfinished_names` those that no
    newline ends where the layout asks for one. `truncated`: the text ended inside a call, whose last argument may be
    cut short.
    """

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...]
    unknown_tools: tuple[str, ...]
    unfinished_names: tuple[str, ...]
    truncated: bool

    def message(self) -> dict[str, Any]:
        """The assistant's message in OpenAI's form, as `render_chat` takes it back."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.json}}
                for call in self.tool_calls
            ]
        return message


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def parse_output(
    text: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    new_id: Callable[[], str] = new_call_id,
    compact: bool = False,
) -> ParsedOutput:
    """Takes apart what a model wrote after the generation prompt. The parameters are those of `StreamParser`."""
    parser = StreamParser(tools, thinking, new_id, compact=compact)
    texts: dict[str, list[str]] = {"reasoning_content": [], "content": []}
    calls: list[dict[str, Any]] = []
    for delta in parser.feed(text) + parser.finish():
        for call in delta.pop("tool_calls", ()):
            if "id" in call:
                calls.append({"id": call["id"], "name": call["function"]["name"], "json": []})
            calls[call["index"]]["json"].append(call["function"]["arguments"])
        for field, piece in delta.items():
            texts[field].append(piece)
    return ParsedOutput(
        reasoning="".join(texts["reasoning_content"]) or None,
        content="".join(texts["content"]) or None,
        tool_calls=tuple(ToolCall(call["id"], call["name"], "".join(call["json"])) for call in calls),
        unknown_tools=tuple(parser.unknown_tools),
        unfinished_names=tuple(parser.unfinished_names),
        truncated=parser.truncated,
    )


class StreamParser:
    """Takes apart what a model writes, while it comes: `feed` each piece of text, `finish` at the end.

    Both return deltas in the form of OpenAI's chunks, each with one of `reasoning_content`, `content` and `tool_calls`
    (a list of one: `index`, `function.arguments`; at its beginning also `id`, `type` and `function.name`). Joined, they
    are what `parse_output` gives for the whole text, and the arguments of each call are one JSON object.

    - Reasoning ends at `</think>` or where a call begins. `thinking=True` takes the text for reasoning from its
      beginning: GLM-4.7's prompt has opened the thought already. With `thinking=False` it is only after `<think>`.
    - A call is `<tool_call>`, a word, and a tag of an argument or the end. Other text after `<tool_call>` is text.
    - A word alone, without a newline before the end, calls a tool that takes no arguments; another only if `compact`:
      else it is left out and noted in `unfinished_names`.
    - Inside a value tags are text: it ends at `</arg_value>` before another argument's tag or the end of the call.
    - What the end of the text leaves open ends there.

    Args:
      tools: function schemas, which give arguments their types. Calls of others are left out, and their names noted in
        `unknown_tools`. Without tools every call counts.
      thinking: whether the prompt left thinking on.
      new_id: gives each call its id.
      calls: whether calls are read; if not they are text like any other, and end no thought.
      compact: whether the model writes calls as GLM-4.7 does, without newlines. Only a call's name alone depends on it.

    Raises:
      UserError: `tools` is no list of objects with names.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        new_id: Callable[[], str] = new_call_id,
        calls: bool = True,
        compact: bool = False,
    ):
        self.unknown_tools: list[str] = []
        self.unfinished_names: list[str] = []
        self.truncated = False
        self._tools, self._new_id, self._reads_calls, self._compact = Tools(tools), new_id, calls, compact
        self._lexer, self._deltas = _Lexer(), _Deltas()
        self._texts = {"reasoning_content": _Trimmed(), "content": _Trimmed()}
        self._field = "reasoning_content" if thinking else "content"
        self._quoted_thoughts = 0
        self._calls = 0
        self._read: Callable[[str, bool], None] = self._in_text

    def feed(self, chunk: str) -> list[dict[str, Any]]:
        """The deltas that the next piece of text gives; any piece, also an empty one."""
        for token, is_tag in self._lexer.feed(chunk):
            self._read(token, is_tag)
        return self._deltas.take()

    def finish(self) -> list[dict[str, Any]]:
        """The last deltas. The parser has then done its work."""
        if self._read == self._after_the_end:
            return []
        if rest := self._lexer.finish():
            self._read(rest, False)
        if self._read == self._in_name:
            self._back_to_text()
        elif self._read != self._in_text:
            self.truncated = True
            if self._read in (self._in_value, self._after_value):
                self._end_value()
            self._end_call()
        self._read = self._after_the_end
        return self._deltas.take()

    # One method for each place in the text; each gets the next tag, or text without tags.

    def _in_text(self, token: str, is_tag: bool) -> None:
        if token == "<tool_call>" and self._reads_calls:
            self._raw: list[str] = [token]
            self._word_begun = self._word_ended = False
            self._read = self._in_name
        elif not self._moves_thought(token):
            self._deltas.add(self._field, self._texts[self._field].add(token))

    def _moves_thought(self, token: str) -> bool:
        """Whether a token begins or ends the thought; in the answer `<think>...</think>` is text, a lone end noise."""
        if token == "<think>":
            if not (self._calls or self._texts["content"].begun or self._texts[self._field].begun):
                self._field = "reasoning_content"
                return True
            self._quoted_thoughts += self._field == "content"
        elif token == "</think>":
            if self._field == "content" and self._quoted_thoughts:
                self._quoted_thoughts -= 1
                return False
            self._field = "content"
            return True
        return False

    def _in_name(self, token: str, is_tag: bool) -> None:
        if token in ("<arg_key>", "</tool_call>"):
            written = "".join(self._raw[1:]).lstrip()
            name = written.rstrip().removesuffix("\\n")
            self._begin_call(name, finished=token == "<arg_key>" or self._compact or name != written)
            self._between(token, True)
        elif is_tag or not self._name_goes_on(token):
            self._back_to_text()
            self._read(token, is_tag)
        else:
            self._raw.append(token)

    def _name_goes_on(self, text: str) -> bool:
        """Whether `text` leaves a name with blanks around it."""
        if not self._word_begun:
            text = text.lstrip()
            self._word_begun = text != ""
        if not self._word_ended:
            text = _WORD.sub("", text, count=1)
            self._word_ended = text != ""
        return not text.strip()

    def _back_to_text(self) -> None:
        self._read = self._in_text
        self._deltas.add(self._field, self._texts[self._field].add("".join(self._raw)))

    def _begin_call(self, name: str, finished: bool) -> None:
        """`finished`: the name ends as the layout wants, whatever the tool takes."""
        self._arguments, self._key = ArgumentsWriter(name, self._tools), ""
        known = name != "" and name in self._tools
        self._known = known and (finished or not self._tools.takes_arguments(name))
        if self._known:
            self._deltas.begin(self._calls, self._new_id(), name)
            self._calls += 1
        elif name:
            (self.unfinished_names if known else self.unknown_tools).append(name)
        if name:
            self._field = "content"

    def _between(self, token: str, is_tag: bool) -> None:
        """After the name, a key or a value: what is no tag means nothing here."""
        if token == "<arg_key>":
            self._key_pieces: list[str] = []
            self._read = self._in_key
        elif token == "<arg_value>" and self._key:
            self._arguments.begin(self._key)
            self._read = self._in_value
        elif token in ("<tool_call>", "</tool_call>"):
            self._end_call()
            if token == "<tool_call>":
                self._read(token, True)
        else:
            self._read = self._between

    def _in_key(self, token: str, is_tag: bool) -> None:
        if token == "</arg_key>":
            self._key = "".join(self._key_pieces).strip()
            self._read = self._between
        elif is_tag:  # the key has no end, so its value has no name
            self._key = ""
            self._read = self._between
            self._between(token, True)
        else:
            self._key_pieces.append(token)

    def _in_value(self, token: str, is_tag: bool) -> None:
        if token in ("</arg_value>", "</tool_call>"):
            self._raw = [token]
            self._half_blank = ""
            self._read = self._after_value
        else:
            self._write(self._arguments.add(token))

    def _after_value(self, token: str, is_tag: bool) -> None:
        """After a tag that ends the value, if what follows it agrees."""
        if not is_tag:
            rest = _BLANK.sub("", self._half_blank + token, count=1)
            if rest in ("", "\\"):
                self._half_blank = rest
                self._raw.append(token)
                return
        elif self._raw[0] == "</arg_value>" and token in _AFTER_VALUE:
            self._end_value()
            self._between(token, True)
            return
        self._write(self._arguments.add("".join(self._raw)))
        self._read = self._in_value
        self._in_value(token, is_tag)

    def _end_value(self) -> None:
        self._write(self._arguments.end())
        self._key = ""

    def _end_call(self) -> None:
        self._write(self._arguments.close())
        self._read = self._in_text

    def _write(self, json_text: str) -> None:
        if self._known:
            self._deltas.add(self._calls - 1, json_text)

    def _after_the_end(self, token: str, is_tag: bool) -> None:
        raise ValueError("this parser has finished; another text needs another one")


class _Lexer:
    """Cuts text into tags and what lies between them, wherever the stream is cut."""

    def __init__(self) -> None:
        self._held = ""  # may be the beginning of a tag

    def feed(self, chunk: str) -> list[tuple[str, bool]]:
        """Tokens, and whether each is a tag."""
        text, at, tokens = self._held + chunk, 0, []
        for tag in _TAG.finditer(text):
            tokens += [(text[at : tag.start()], False), (tag.group(), True)]
            at = tag.end()
        held = text.rfind("<", max(at, len(text) - _LONGEST + 1))
        if held < 0 or not any(tag.startswith(text[held:]) for tag in _TAGS):
            held = len(text)
        self._held = text[held:]
        return [token for token in (*tokens, (text[at:held], False)) if token[0]]

    def finish(self) -> str:
        rest, self._held = self._held, ""
        return rest


class _Trimmed:
    """Strips a text that comes in pieces: whitespace waits until it is known not to be the last."""

    def __init__(self) -> None:
        self.begun = False
        self._blanks: list[str] = []

    def add(self, text: str) -> str:
        if not self.begun:
            text = text.lstrip()
        kept = text.rstrip()
        out = ""
        if kept:
            self.begun, out = True, "".join([*self._blanks, kept])
            self._blanks = []
        self._blanks.append(text[len(kept) :])
        return out


class _Deltas:
    """Gathers what one piece of text gives; neighbours of the same kind become one delta."""

    def __init__(self) -> None:
        self._parts: list[tuple[str | int, dict[str, Any], list[str]]] = []

    def begin(self, index: int, call_id: str, name: str) -> None:
        self._parts.append((index, {"id": call_id, "type": "function", "function": {"name": name}}, []))

    def add(self, key: str | int, text: str) -> None:
        """`text` for a field, or for the arguments of the call with that index."""
        if not text:
            return
        if not self._parts or self._parts[-1][0] != key:
            self._parts.append((key, {}, []))
        self._parts[-1][2].append(text)

    def take(self) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for key, head, pieces in self._parts:
            text = "".join(pieces)
            if isinstance(key, str):
                deltas.append({key: text})
            else:
                function = {**head.get("function", {}), "arguments": text}
                deltas.append({"tool_calls": [{"index": key, **head, "function": function}]})
        self._parts = []
        return deltas
