"""Training data that every machine can make: the standard library as text, sums worked out in steps, tool calls.

Sums and tool calls are conversations in the message form of chat APIs. What is held out for testing is chosen by a hash
of the problem itself, so that no test problem ever appears in training, however much is generated.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

Conversation = dict[str, Any]  # messages, tools, enable_thinking: a record of kind `messages`

_HELD_OUT_PERCENT = 5
_TURNS = 2  # of a training conversation with tools, at most


def held_out(*problem: Any) -> bool:
    """Whether a problem is kept for testing."""
    return xxhash.xxh3_64_intdigest(json.dumps(problem).encode()) % 100 < _HELD_OUT_PERCENT


# --- text ----------------------------------------------------------------------------------------------------------


def standard_library(max_bytes: int) -> Iterator[str]:
    """The installed standard library: the language reference that `help()` shows, then modules' source, by name."""
    from pydoc_data.topics import topics

    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    read = lambda path: path.read_text("utf-8", errors="replace")  # noqa: E731
    left = max_bytes
    for text in [*(topics[name] for name in sorted(topics)), *map(read, sources)]:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


# --- sums ----------------------------------------------------------------------------------------------------------


class Sum(NamedTuple):
    """Two numbers of one or two digits to add."""

    a: int
    b: int

    @property
    def steps(self) -> str:
        """The sum as done on paper, units first."""
        (a10, a1), (b10, b1) = divmod(self.a, 10), divmod(self.b, 10)
        units = a1 + b1
        if not a10 and not b10:
            return f"{a1}+{b1}={units}"
        carry = units // 10
        tens = a10 + b10
        return f"{a1}+{b1}={units}, carry {carry}. {a10}+{b10}={tens}, {tens}+{carry}={tens + carry}"


def addition_table(rng: random.Random, lines: int = 40) -> str:
    """Lines of one-digit sums: what the steps of longer ones are made of."""
    pairs = ((rng.randint(0, 9), rng.randint(0, 9)) for _ in range(lines))
    return "\n".join(f"{a}+{b}={a + b}" for a, b in pairs)


_SUM_QUESTIONS = ("{a}+{b}=?", "What is {a} + {b}?", "Add {a} and {b}.")


def draw_sum(rng: random.Random, *, test: bool) -> Sum:
    """A random sum, the first number of one digit in a fifth of them; from the held-out ones for a test."""
    while True:
        top = 9 if rng.random() < 0.2 else 99
        problem = Sum(rng.randint(0, top), rng.randint(0, 99))
        if held_out(*problem) == test:
            return problem


def sum_conversation(problem: Sum, rng: random.Random, *, thinking: bool = True) -> Conversation:
    """Question and answer; with thinking, the steps before the answer."""
    question = rng.choice(_SUM_QUESTIONS).format(a=problem.a, b=problem.b)
    answer: dict[str, Any] = {"role": "assistant", "content": str(problem.a + problem.b)}
    if thinking:
        answer["reasoning_content"] = problem.steps
    return {"messages": [{"role": "user", "content": question}, answer], "enable_thinking": thinking}


# --- tool calls ----------------------------------------------------------------------------------------------------

_CITIES = (
    "Athens Berlin Boston Cairo Chicago Delhi Dublin Geneva Hanoi Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima "
    "Lisbon London Madrid Manila Miami Milan Moscow Mumbai Nairobi Oslo Ottawa Paris Prague Quito Rome Seoul Sydney "
    "Tehran Tokyo Toronto Vienna Warsaw Zagreb Zurich"
).split()
_KINDS = "ancient cheap classical famous modern local new old quiet rare small wild".split()
_THINGS = "birds books bridges castles gardens maps museums music parks recipes rivers stamps trains trees".split()


class Tool(NamedTuple):
    """A function that the model may call: what it is for, its parameters' types, and ways to ask for it."""

    name: str
    description: str
    parameters: dict[str, str]
    questions: tuple[str, ...]

    @property
    def schema(self) -> dict[str, Any]:
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


TOOLS = (
    Tool("get_weather", "Weather in a city", {"city": "string"},
         ('What is the weather in "{city}"?', 'Is it cold in "{city}" today?', 'Tell me the weather for "{city}".')),
    Tool("set_timer", "Start a timer", {"minutes": "integer"},
         ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Timer, {minutes} minutes please.")),
    Tool("search", "Search the web", {"query": "string"},
         ('Search for "{query}".', 'Find "{query}" on the web.', 'Look up "{query}", please.')),
    Tool("book_table", "Book a table", {"city": "string", "people": "integer"},
         ('Book a table for {people} in "{city}".', 'I need a table in "{city}" for {people} people.')),
)  # fmt: skip


class Call(NamedTuple):
    """A tool call: the name, and the arguments."""

    name: str
    arguments: dict[str, Any]


def draw_call(rng: random.Random, *, test: bool, tools: Sequence[Tool] = TOOLS) -> Call:
    """A random call, from the held-out ones for a test: its arguments were never seen together with its tool."""
    while True:
        tool = rng.choice(tools)
        values = {
            "city": rng.choice(_CITIES),
            "minutes": rng.randint(1, 99),
            "people": rng.randint(2, 20),
            "query": f"{rng.choice(_KINDS)} {rng.choice(_THINGS)}",
        }
        call = Call(tool.name, {name: values[name] for name in tool.parameters})
        if held_out(*call) == test:
            return call


def call_conversation(
    rng: random.Random, *, test: bool, turns: int = 1, offer: bool = True
) -> tuple[Conversation, Call]:
    """One or two tools on offer, and questions that each take a call; also returns the last call.

    Without `offer` the tools' schemas are left out: most of the text, of which little is to be learned.

    The model thinks before the last call, as it does in its current turn; earlier turns show no thoughts, as in every
    history.
    """
    tools = rng.sample(TOOLS, 1 if rng.random() < 0.75 else 2)
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        call = draw_call(rng, test=test, tools=tools)
        question = rng.choice(next(t for t in tools if t.name == call.name).questions).format(**call.arguments)
        function = {"type": "function", "function": call._asdict()}
        answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [function]}
        messages += [{"role": "user", "content": question}, answer]
        if turn < turns - 1:
            messages += [{"role": "tool", "content": "ok"}, {"role": "assistant", "content": "Done."}]
    noted = ", ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in call.arguments.values())
    answer["reasoning_content"] = f"{call.name}: {noted}"
    return {"messages": messages} | ({"tools": [t.schema for t in tools]} if offer else {}), call


# --- repeating ---------------------------------------------------------------------------------------------------


def repeat_conversation(rng: random.Random) -> Conversation:
    """Words and numbers to say twice: teaches to copy, which calls need, in few tokens."""
    known = (*_CITIES, *_KINDS, *_THINGS)
    words = [str(rng.randint(0, 99)) if rng.random() < 0.4 else rng.choice(known) for _ in range(rng.randint(1, 9))]
    said = " ".join(words)
    answer = {"role": "assistant", "content": said}
    messages = [
        {"role": "user", "content": f'Repeat "{said}".'}, answer, {"role": "user", "content": "Again."}, answer
    ]  # fmt: skip
    return {"messages": messages, "enable_thinking": False}


# --- files ---------------------------------------------------------------------------------------------------------


def write_quickstart_data(
    folder: Path, *, seed: int, sums: int, calls: int, repeats: int, text_bytes: int
) -> dict[str, Path]:
    """Writes training data, `library.jsonl` and so on; the same for the same seed and Python."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records = {
        "library": ({"text": text} for text in standard_library(text_bytes)),
        "sums": (sum_conversation(draw_sum(rng, test=False), rng, thinking=i % 8 > 0) for i in range(sums)),
        "tables": ({"text": addition_table(rng)} for _ in range(sums // 20)),
        "calls": (call_conversation(rng, test=False, turns=1 + i % _TURNS)[0] for i in range(calls)),
        "bare_calls": (call_conversation(rng, test=False, offer=False)[0] for _ in range(2 * calls)),
        "repeats": (repeat_conversation(rng) for _ in range(repeats)),
    }
    return {name: _write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in records.items()}


def _write_jsonl(path: Path, rows: Iterator[Conversation]) -> Path:
    beside = path.with_suffix(".partial")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return beside.replace(path)
