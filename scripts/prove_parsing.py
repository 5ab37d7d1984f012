"""Proves the parser of reasoning and tool calls: coverage-guided fuzzing, conversations there and back, and its times.

    pip install atheris    # on Linux; without it the inputs are hypothesis's, which do not follow coverage
    python scripts/prove_parsing.py --json docs/proofs/parsing.json

For any text: no crash; streams give what the whole text gives, cut in two, in groups and into characters; arguments are
JSON objects that strict readers take. For conversations: what the templates render is read back as it was. For hostile
texts of four lengths: the time grows with the length. `tests/text/test_parsing.py` runs the same checks briefly.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances, write_figures
from fuzzing import examined, guided, guided_apart
from hypothesis import HealthCheck
from hypothesis import strategies as st
from rich.console import Console

from glm45_jax.text import arguments, parsing, render_chat

PROPERTIES = {
    "s": {"type": "string"},
    "i": {"type": "integer"},
    "n": {"type": "number"},
    "b": {"type": "boolean"},
    "o": {"type": "object"},
    "a": {"type": "array"},
    "m": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "x": {"$ref": "#/$defs/node"},
    "u": {},
}
NODE = {"oneOf": [{"type": ["number", "string"]}, {"$ref": "#/$defs/node"}]}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "$defs": {"node": NODE}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
    {"name": "get_time"},
]
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.filter_too_much]
TAGS = [f"<{slash}{name}>" for name in ("think", "tool_call", "arg_key", "arg_value") for slash in ("", "/")]
TAG = re.compile("|".join(TAGS))
# Bytes that UTF-8 never begins with stand for a tag, so that a fuzzer finds them; two more for halves of a character.
BYTES = {0xF8 + i: tag for i, tag in enumerate(TAGS)} | {0xF7: "\ud83d", 0xF6: "\ude00"}
SEEDS = [
    '\n<think>a\n</think>\n\nb<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>c"\\</arg_value>\n</tool_call>\nd',
    "a</think><tool_call>f<arg_key>i</arg_key><arg_value>5</arg_value></tool_call><tool_call>get_time</tool_call>",
    '<tool_call>f<arg_key>o</arg_key><arg_value>{"k": [1, "\\ud800"]}</arg_value><arg_key>m</arg_key><arg_value>null',
    '<tool_call>f<arg_key>x</arg_key><arg_value>"1"</arg_value></arg_value>\\n</tool_call><arg_key>b</arg_key>True',
    "<tool_call>g<arg_key>u</arg_key><arg_value>-1e999</arg_value></tool_call><think>a <tool_call> b</think>c",
]


def counted_ids() -> Callable[[], str]:
    return map("call_{}".format, itertools.count()).__next__


def joined(chunks: Sequence[str], tools: Any, thinking: bool, compact: bool = False) -> tuple[Any, ...]:
    """What a stream gives, put together as a client does."""
    parser = parsing.StreamParser(tools, thinking, counted_ids(), compact=compact)
    texts = {"reasoning_content": "", "content": ""}
    calls: list[list[str]] = []
    for delta in [delta for chunk in chunks for delta in parser.feed(chunk)] + parser.finish():
        assert len(delta) == 1
        for call in delta.pop("tool_calls", ()):
            if call["index"] == len(calls):
                calls.append([call["id"], call["function"]["name"], ""])
            calls[call["index"]][2] += call["function"]["arguments"]
        for field, text in delta.items():
            assert text
            texts[field] += text
    left_out = parser.unknown_tools, parser.unfinished_names
    return texts["reasoning_content"], texts["content"], calls, *left_out, parser.truncated


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def check(
    text: str, thinking: bool, tools: Any = TOOLS, seed: int = 0, every_cut: bool = False, compact: bool = False
) -> parsing.ParsedOutput:
    """All that must hold for any text."""
    whole = parsing.parse_output(text, tools, thinking, counted_ids(), compact)
    for call in whole.tool_calls:
        value = json.loads(call.json, parse_constant=refuse)
        assert isinstance(value, dict) and value == call.arguments
        call.json.encode()
    for field in (whole.reasoning, whole.content):
        assert field is None or (field and field == field.strip())
    if "<" not in text:
        assert (whole.reasoning if thinking else whole.content) == (text.strip() or None)
    expected = (
        whole.reasoning or "",
        whole.content or "",
        [[call.id, call.name, call.json] for call in whole.tool_calls],
        list(whole.unknown_tools),
        list(whole.unfinished_names),
        whole.truncated,
    )
    rng = random.Random(seed)
    cuts = [[at] for at in range(len(text) + 1)] if every_cut else [[rng.randint(0, len(text))]]
    cuts += [range(1, len(text)), sorted(rng.randint(0, len(text)) for _ in range(rng.randint(2, 20)))]
    for cut in cuts:
        chunks = [text[a:b] for a, b in itertools.pairwise([0, *cut, len(text)])]
        assert joined(chunks, tools, thinking, compact) == expected, chunks
    return whole


def check_bytes(data: bytes) -> None:
    """Any bytes as a text: one for the mode, two for the cuts, the others characters or tags."""
    text = data[3:].decode("latin-1").translate(BYTES)
    tools = TOOLS if data[:1] < b"\x80" else None
    mode = data[0] if data else 0
    check(text, bool(mode & 1), tools, int.from_bytes(data[1:3], "big"), compact=bool(mode & 2))


# --- conversations ---------------------------------------------------------------------------------------------------

LETTERS = st.characters(exclude_categories=["Cs"])
FRAGMENTS = [*TAGS, *(tag[:-1] for tag in TAGS), "<", '"', "\\", "\\n", "\n", " ", "null", "1", "{", "f"]
WORDS = st.lists(st.sampled_from(FRAGMENTS) | st.text(LETTERS, max_size=5), max_size=8).map("".join)
PLAIN = WORDS.map(str.strip).filter(lambda text: not TAG.search(text))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
LIKE_AN_END = re.compile(r"</arg_value>(\s|\\n)*(</?arg_key>|<arg_value>|</?tool_call>)")


def is_plain_string(text: str) -> bool:
    """Strings that the templates' raw notation can hold: neither `null` nor a literal in quotes."""
    return text.strip() != "null" and not re.fullmatch(r'".*"', text, re.DOTALL)


def arguments_strategy() -> st.SearchStrategy[dict[str, Any]]:
    strings = WORDS.filter(is_plain_string)
    values = {
        "s": strings,
        "i": st.integers(),
        "n": st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        "b": st.booleans(),
        "o": st.dictionaries(WORDS, JSON, max_size=3),
        "a": st.lists(JSON, max_size=3),
        "m": strings | st.none(),
        "u": st.integers() | st.booleans() | st.none() | st.lists(JSON, max_size=3),
    }

    def readable(chosen: dict[str, Any]) -> bool:
        texts = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in chosen.values()
        )
        return not any(LIKE_AN_END.search(text) for text in texts)

    return st.fixed_dictionaries({}, optional=values).filter(readable)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    calls = draw(st.lists(st.tuples(st.just("f"), arguments_strategy()) | st.just(("get_time", {})), max_size=3))
    return {
        "role": "assistant",
        "content": draw(PLAIN),
        "reasoning_content": draw(PLAIN),
        "tool_calls": [{"function": {"name": name, "arguments": chosen}} for name, chosen in calls],
    }


def check_message(message: dict[str, Any], template: str) -> None:
    """What a template renders is read back as it was, and renders to the same again."""
    user = {"role": "user", "content": "x"}

    def rendered(*messages: dict[str, Any]) -> str:
        return render_chat([user, *messages], tools=TOOLS, template=template, add_generation_prompt=False)

    text = rendered(message)
    start = len(rendered()) + len("<|assistant|>")
    whole = check(text[start:], thinking=True, compact=template == "glm-4.7")
    assert (whole.reasoning or "", whole.content or "") == (message["reasoning_content"], message["content"]), text
    calls = [(call.name, json.dumps(call.arguments)) for call in whole.tool_calls]
    functions = [call["function"] for call in message["tool_calls"]]
    assert calls == [(f["name"], json.dumps(f["arguments"])) for f in functions], text
    assert rendered(whole.message()) == text


# --- times -----------------------------------------------------------------------------------------------------------


def call(key: str, value: str) -> str:
    return f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>"


HOSTILE: dict[str, Callable[[int], str]] = {
    "text": lambda n: "word " * (n // 5),
    "<": lambda n: "<" * n,
    "half tags": lambda n: "</tool_call" * (n // 11),
    "whitespace": lambda n: "a" + " " * n + "b",
    "<tool_call>": lambda n: "<tool_call>" * (n // 11),
    "<think>": lambda n: "<think>" * (n // 7),
    "a name": lambda n: "<tool_call>" + "f" * n,
    "blanks after a name": lambda n: "<tool_call>f" + " " * n,
    "a key": lambda n: "<tool_call>f<arg_key>" + "k" * n,
    "a string": lambda n: call("s", "word\n" * (n // 5)),
    "blanks in a string or null": lambda n: call("m", " " * n),
    "quotes": lambda n: call("s", '"' * n),
    "a literal in quotes": lambda n: call("s", '"' + "\\n" * (n // 2) + '"'),
    "escaped quotes": lambda n: call("a", '[\\"' * (n // 3)),
    "digits": lambda n: call("n", "1" * n),
    "decimals": lambda n: call("n", "0." + "1" * n),
    "nesting": lambda n: call("o", "[" * n),
    "an array": lambda n: call("a", json.dumps(["x"] * (n // 5))),
    "brackets": lambda n: call("a", "[" + "[]," * (n // 3) + "1]"),
    "ends of values": lambda n: call("s", "</arg_value>" * (n // 12)),
    "blanks after a value": lambda n: call("s", "</arg_value>" + "\\n" * (n // 2) + "x"),
    "calls": lambda n: ("x" + call("i", "1")) * (n // 71),
    "arguments": lambda n: "<tool_call>f" + "<arg_key>i</arg_key><arg_value>1</arg_value>" * (n // 45),
}


def seconds_for(text: str, chunk: int) -> float:
    """Processor time of a stream in chunks of so many characters, the best of three."""

    def once() -> float:
        parser, begin = parsing.StreamParser(TOOLS), time.process_time()
        for at in range(0, len(text), chunk):
            parser.feed(text[at : at + chunk])
        parser.finish()
        return time.process_time() - begin

    return min(once() for _ in range(3))


def times(lengths: Sequence[int]) -> dict[str, Any]:
    """Microseconds per 1000 characters, for each hostile text and length: whole, and in chunks of four."""
    figures: dict[str, Any] = {}
    for name, make in HOSTILE.items():
        texts = [make(n) for n in lengths]
        figures[name] = {
            label: [round(seconds_for(text, chunk or len(text)) / len(text) * 1e9) for text in texts]
            for label, chunk in (("whole", 0), ("chunks of 4", 4))
        }
    return figures


# --- the proof -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Proof:
    """Fuzzing, conversations and times of the parser."""

    json: Path | None = None
    """Where to write the figures."""
    seconds: float = 600.0
    """How long to fuzz; conversations take a tenth of it on top."""


def fuzz(folder: str, seconds: float) -> None:
    """Coverage-guided, in this process, which ends with it."""
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=[arguments.__name__, parsing.__name__]):
        importlib.reload(arguments)
        importlib.reload(parsing)
    guided(folder, seeds(), check_bytes, seconds, longest=256, timeout=10)


def seeds() -> Iterator[bytes]:
    """Inputs to begin with."""
    for index, seed in enumerate(SEEDS):
        for byte, tag in BYTES.items():
            seed = seed.replace(tag, chr(byte))
        yield bytes([index % 2, 0, 0]) + seed.encode("latin-1")


def fuzzed(seconds: float) -> dict[str, Any]:
    """Runs `fuzz` in a process of its own; raises with its output if it found something."""
    return guided_apart(lambda folder: f"import prove_parsing; prove_parsing.fuzz({folder!r}, {seconds})")


def main() -> None:
    args, console = tyro.cli(Proof), Console(stderr=True)
    try:
        importlib.import_module("atheris")
        packages, has_atheris = ("hypothesis", "atheris"), True
    except ImportError:
        packages, has_atheris = ("hypothesis",), False
    figures: dict[str, Any] = {"circumstances": circumstances(*packages)}
    figures["microseconds per 1000 characters, for 32k, 64k, 128k, 256k"] = times([2**15, 2**16, 2**17, 2**18])
    console.print("times", figures)
    pairs = st.tuples(messages(), st.sampled_from(["glm-4.5", "glm-4.7"]))
    figures["conversations there and back"] = examined(
        pairs, lambda pair: check_message(*pair), args.seconds / 10, SUPPRESSED
    )
    console.print("conversations", figures["conversations there and back"])
    if has_atheris:
        figures["fuzzing"] = fuzzed(args.seconds)
    else:
        inputs = examined(st.binary(max_size=400), check_bytes, args.seconds, SUPPRESSED)
        figures["fuzzing"] = {"engine": "hypothesis", "inputs": inputs, "failures": 0}
    figures["fuzzing"]["seconds"] = args.seconds
    console.print("fuzzing", figures["fuzzing"])
    write_figures(args.json, figures)


if __name__ == "__main__":
    main()
