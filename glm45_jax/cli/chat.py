"""`glm45 chat`: talks with a model in the terminal."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from glm45_jax.errors import UserError

_HELP = """\
/think     think before answering
/nothink   answer at once
/reset     forget the conversation
/exit      leave (or Ctrl-D); Ctrl-C ends an answer"""


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talks with a model. Answers come as they are written, the model's thinking apart from them.

    One line is one message; commands: /think, /nothink, /reset, /help, /exit. Where the model calls a tool, the next
    line is taken for its result. Reads lines from a pipe as well.

    examples:
      glm45 chat ./air
      glm45 chat ./air --no-thinking --system "Answer in French." --temperature 0
      echo "What is 2 + 2?" | glm45 chat ./air
    """

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint directory, Hugging Face's or our own, with its tokenizer."""
    system: str | None = None
    """A system message."""
    tools: Path | None = None
    """A JSON file with a list of function schemas, as the OpenAI API takes them."""
    thinking: bool = True
    """Whether the model thinks before it answers."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 2048
    """The most tokens of one answer, thinking included."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """0: always the likeliest token."""
    top_p: float = 0.95
    """Draw from the fewest likeliest tokens that hold this much probability."""
    seed: int | None = None
    """Of the draws; without it each run differs."""
    dtype: str | None = None
    """Load and compute in float32, bfloat16 or float16; without it as stored."""


# --- what a model writes ---------------------------------------------------------------------------------------------

Kind = Literal["thinking", "answer", "call"]
_TAGS: dict[str, Kind] = {"<think>": "thinking", "</think>": "answer", "<tool_call>": "call", "</tool_call>": "answer"}
_TAG = re.compile("|".join(_TAGS))


class ReplySplitter:
    """Splits a reply, as it comes, into thinking, answer and tool calls.

    A tag opens the next part, whatever the part before: a tool call ends thinking that was left open. White space
    around a part is left out. GLM-4.7's prompt has opened the thinking already, GLM-4.5 writes the tag itself.
    """

    def __init__(self, thinking: bool = False):
        self.parts: list[tuple[Kind, str]] = [("thinking" if thinking else "answer", "")]
        self._waiting = ""  # may be the beginning of a tag
        self._space = ""  # may be the end of the part

    def push(self, piece: str, last: bool = False) -> Iterator[tuple[Kind, str]]:
        """Yields what is certain: text that may be the beginning of a tag waits, unless the piece is the last."""
        text, self._waiting = self._waiting + piece, ""
        while found := _TAG.search(text):
            yield from self._add(text[: found.start()])
            self.parts.append((_TAGS[found[0]], ""))
            self._space = ""
            text = text[found.end() :]
        size = next((n for n in range(11, 0, -1) if any(tag.startswith(text[-n:]) for tag in _TAGS)), 0)
        if text and size and not last:
            text, self._waiting = text[:-size], text[-size:]
        yield from self._add(text)

    def text(self, kind: Kind) -> str:
        """All parts of one kind."""
        return "\n".join(text for part, text in self.parts if part == kind and text)

    def calls(self) -> list[dict[str, Any]]:
        """The tool calls, values as the strings that were written."""
        return [_parse_call(text) for kind, text in self.parts if kind == "call" and text]

    def _add(self, text: str) -> Iterator[tuple[Kind, str]]:
        kind, before = self.parts[-1]
        spaced = self._space + text
        text = spaced.rstrip()
        self._space = spaced[len(text) :]
        text = text if before else text.lstrip()
        if text:
            self.parts[-1] = (kind, before + text)
            yield kind, text


def _parse_call(text: str) -> dict[str, Any]:
    name = re.split(r"\n|<arg_key>", text.strip(), maxsplit=1)[0].strip()
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", text, re.DOTALL)
    return {"type": "function", "function": {"name": name, "arguments": dict(pairs)}}


# --- the conversation ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Session:
    """A conversation, and how it is shown."""

    model: tuple[Any, Any, Any]  # params, config, tokenizer
    options: dict[str, Any]
    tools: list[dict[str, Any]] | None
    thinking: bool
    messages: list[dict[str, Any]]
    console: Console

    def reply(self) -> list[dict[str, Any]]:
        """Shows the model's answer to the messages and adds it to them. Returns its tool calls."""
        from glm45_jax.infer import stream

        params, config, tokenizer = self.model
        ids = tokenizer.encode_chat(self.messages, self.tools, enable_thinking=self.thinking, sanitize=True)
        splitter = ReplySplitter(thinking=tokenizer.decode(ids[-4:]).rstrip().endswith("<think>"))
        answer = stream(params, config, ids, tokenizer, **self.options)
        shown: Kind | None = None
        try:
            with self.console.status("reading (the first time, compiling)"):
                first = next(answer, "")
            for piece in _with_last(first, answer):
                for kind, text in splitter.push(*piece):
                    shown = self._show(kind, text, shown)
        except KeyboardInterrupt:
            self.console.print("\n(interrupted)", style="dim")
        calls = splitter.calls()
        self._show_end(calls, answer.result)
        message = {"role": "assistant", "content": splitter.text("answer")}
        if reasoning := splitter.text("thinking"):
            message["reasoning_content"] = reasoning
        self.messages.append(message | ({"tool_calls": calls} if calls else {}))
        return calls

    def _show(self, kind: Kind, text: str, shown: Kind | None) -> Kind | None:
        if kind == "call":  # shown whole, at the end
            return shown
        if kind != shown and (shown or kind == "thinking"):
            self.console.print(("\n\n" if shown else "") + f"[{kind}]", style="dim")
        if kind == "thinking":
            self.console.print(_printable(text), end="", style="dim", soft_wrap=True)
        else:
            print(_printable(text), end="", flush=True)  # rich would turn the tabs of code into spaces
        return kind

    def _show_end(self, calls: list[dict[str, Any]], result: Any) -> None:
        self.console.print()
        for call in calls:
            function = call["function"]
            arguments = ", ".join(f"{key}={value!r}" for key, value in function["arguments"].items())
            self.console.print(_printable(f"[tool call] {function['name']}({arguments})"), style="cyan", soft_wrap=True)
        if result and result.finish_reason == "length":
            self.console.print("(cut here: --max-new-tokens or the model's context is used up)", style="dim")

    def ask(self, text: str) -> None:
        """One turn of the user's, with the tool calls that it leads to. A turn that fails is forgotten."""
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            while calls := self.reply():
                for call in calls:
                    result = self.read(f"result of {call['function']['name']}> ")
                    self.messages.append({"role": "tool", "content": result or ""})
        except UserError as error:
            del self.messages[before:]
            self.console.print(f"{error}\n/reset forgets the conversation.", style="red", soft_wrap=True)

    def read(self, prompt: str) -> str | None:
        """One line of the user's; None at the end of the input."""
        try:
            if sys.stdin.isatty():
                return input(prompt)
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            return None

    def command(self, name: str) -> bool:
        """Obeys /name. Returns whether to go on."""
        if name in ("exit", "quit"):
            return False
        if name in ("think", "nothink"):
            self.thinking = name == "think"
            self.console.print("thinking on" if self.thinking else "thinking off", style="dim")
        elif name == "reset":
            del self.messages[sum(m["role"] == "system" for m in self.messages) :]
            self.console.print("forgotten", style="dim")
        else:
            self.console.print(("" if name == "help" else f"no command /{name}\n") + _HELP, style="dim")
        return True


def _with_last(first: str, pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each piece and False, then an empty last one and True."""
    yield first, False
    for piece in pieces:
        yield piece, False
    yield "", True


def _printable(text: str) -> str:
    """Without the control characters with which a model could steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def _read_tools(file: Path | None) -> list[dict[str, Any]] | None:
    if file is None:
        return None
    try:
        tools = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{file}: expected a list of function schemas")
    return tools


def main(argv: list[str]) -> int:
    args = tyro.cli(Chat, args=argv, prog="glm45 chat")
    from glm45_jax.cli.loading import load_model

    tools = _read_tools(args.tools)
    config, params, tokenizer = load_model(args.checkpoint, args.dtype)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": secrets.randbits(32) if args.seed is None else args.seed,
        "stop_ids": sorted({*config.eos_token_id, *tokenizer.eos_ids}),
    }
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    console = Console(markup=False, highlight=False, emoji=False)
    session = Session((params, config, tokenizer), options, tools, args.thinking, system, console)
    if sys.stdin.isatty():
        console.print(f"{args.checkpoint}; /help for commands", style="dim")
    while (line := session.read("> ")) is not None:
        line = line.strip()
        if line.startswith("/"):
            if not session.command(line[1:]):
                break
        elif line:
            session.ask(line)
    return 0
