"""Grammars that answers must follow: JSON, regular expressions, choices, Lark; compiled by llguidance.

A source says what is allowed; `Grammars.compile` makes it ready for one tokenizer, with limits on its size and on what
it may cost, and keeps the ones used last. What follows thoughts, and how a sequence walks through, is `constraint.py`.
"""

from __future__ import annotations

import collections
import functools
import json
import threading
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from glm45_jax.errors import UserError
from glm45_jax.text import Tokenizer
from glm45_jax.text.byte_level import token_to_bytes

MOST_SOURCE = 1 << 18  # bytes of a source
MOST_DEPTH = 64  # of a schema
MOST_VALUES = 10_000  # of a schema
MOST_PROPERTIES = 2000  # of an object; of several, the squares' sum is bounded: so does the time to compile them grow
MOST_REGEX = 4096  # characters
MOST_CHOICES = 1024
_MOST_MULTIPLE = 2000  # digits of a multipleOf as a number: so many states does its automaton have
_KEPT = 64  # compiled grammars
# Space between the parts of JSON: enough for deep indentation, not for a model that goes on with blanks for ever.
WHITESPACE = r"[ \n\t]{1,64}"
# What a grammar may cost: fuel is spent at about 50,000 a ms at first and 14,000 a ms in each step.
_LIMITS = {
    "max_items_in_row": 2000, "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 400_000, "step_max_items": 50_000,
    "max_lexer_states": 10_000, "max_grammar_size": 200_000, "verbose_errors": False,
}  # fmt: skip


def json_source(schema: Mapping[str, Any] | bool | None = None, *, strict: bool = True) -> str:
    """JSON that a schema allows; without one any object.

    Properties come in the order of the schema.

    Args:
      strict: refuse keywords that cannot be enforced; else they are left out.

    Raises:
      UserError: the schema is too large or too deep. `Grammars.compile` tells what is wrong inside.
    """
    schema = {"type": "object"} if schema is None else schema
    schema = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return _source({"json_schema": guided(schema, strict)})


def guided(schema: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """A schema with our settings in it. Raises `UserError`."""
    check_schema_size(schema)
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": not strict}}


def check_schema_size(schema: Mapping[str, Any]) -> None:
    """Raises `UserError` for a schema too large, too deep, or with settings of the compiler's."""
    todo: list[tuple[Any, int]] = [(schema, 0)]
    count = squares = 0
    while todo:
        value, depth = todo.pop()
        count += 1
        if count > MOST_VALUES:
            raise UserError(f"the schema holds more than {MOST_VALUES} values")
        if depth > MOST_DEPTH:
            raise UserError(f"the schema nests values deeper than {MOST_DEPTH}")
        if isinstance(value, Mapping):
            _check_multiple(value.get("multipleOf"))
            squares += len(value) ** 2  # `properties` among them, by whatever way it is reached
            if squares > MOST_PROPERTIES**2:
                raise UserError(
                    f"the schema's objects have more than {MOST_PROPERTIES} properties, or many almost so many"
                )
            todo += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            todo += [(item, depth + 1) for item in value]
    if "x-guidance" in schema:
        raise UserError("the schema holds x-guidance, which is not for requests")


def _check_multiple(of: Any) -> None:
    if isinstance(of, bool) or not isinstance(of, int | float):
        return
    digits = Decimal(str(of)).normalize().as_tuple().digits if abs(of) <= _MOST_MULTIPLE else ()
    if not digits or int("".join(map(str, digits))) > _MOST_MULTIPLE:
        raise UserError(f"a multipleOf of more than {_MOST_MULTIPLE}, counted in its last digit, cannot be enforced")


def regex_source(regex: str) -> str:
    """Text that the whole expression matches, in the syntax of Rust's regex crate. Raises `UserError`."""
    if len(regex) > MOST_REGEX:
        raise UserError(f"the regular expression has {len(regex)} characters; expected {MOST_REGEX} at most")
    return _llguidance().LLMatcher.grammar_from_regex(regex)


def choice_source(choices: Sequence[str]) -> str:
    """One of several texts. Raises `UserError`."""
    if not 0 < len(choices) <= MOST_CHOICES or not all(isinstance(c, str) for c in choices):
        raise UserError(f"expected 1 to {MOST_CHOICES} choices, all strings")
    return lark_source("start: " + " | ".join(literal(choice) for choice in choices))


def lark_source(lark: str, **others: str | None) -> str:
    """A grammar in llguidance's variant of Lark; `@name` in it stands for another source of that name."""
    named = [json.loads(source)["grammars"][0] | {"name": name} for name, source in others.items() if source]
    return _source({"lark_grammar": lark}, *named)


def grammar_source(text: str) -> str:
    """A grammar in Lark, or in the GBNF of llama.cpp. Raises `UserError`."""
    from llguidance.gbnf_to_lark import any_to_lark

    if len(text) > MOST_SOURCE:
        raise UserError(f"the grammar has {len(text)} characters; expected {MOST_SOURCE} at most")
    try:
        return lark_source(any_to_lark(text))
    except Exception as error:  # the converter raises what it comes upon
        raise UserError(f"the grammar is neither Lark nor GBNF: {error}") from error


def literal(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def _source(*grammars: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


class Grammar:
    """A compiled grammar. `matcher` gives each answer its own place in it."""

    def __init__(self, prototype: Any, words: int):
        self._prototype, self._lock, self.words = prototype, threading.Lock(), words

    def matcher(self) -> Matcher:
        with self._lock:
            return Matcher(self._prototype.deep_copy(), self.words)


class Matcher:
    """Where one answer is in its grammar.

    Attributes:
      words: of 32 bits, one for each token of the tokenizer.
    """

    def __init__(self, inner: Any, words: int):
        self._inner, self.words = inner, words

    @property
    def error(self) -> str:
        """What has gone wrong; empty while nothing has. No mask means anything afterwards."""
        return _reason(self._inner.get_error())

    @property
    def stopped(self) -> bool:
        """Nothing but an end can come."""
        return self._inner.is_stopped()

    def mask(self) -> np.ndarray:
        """Bit v % 32 of word v // 32: whether token v may come next; the end tokens where the grammar is satisfied."""
        found = np.zeros(self.words, np.int32)
        self._inner.unsafe_compute_mask_ptr(found.ctypes.data, found.nbytes)
        return found.view(np.uint32)

    def take(self, token: int) -> bool:
        """Goes on by a token; False where the grammar does not allow it."""
        return self._inner.consume_token(token)

    def back(self, count: int) -> None:
        """Takes the last tokens back."""
        if count:
            self._inner.rollback(count)


class Grammars:
    """Compiled grammars of one tokenizer, the ones used last.

    Args:
      end_ids: tokens that end an answer, allowed where a grammar is satisfied.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]):
        self._tokenizer, self._end_ids = tokenizer, [*end_ids]
        self._kept: collections.OrderedDict[str, Grammar] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def compile(self, source: str) -> Grammar:
        """A source made ready. May take a while: not for an event loop.

        Raises:
          UserError: it is too large, cannot be read, or asks for what llguidance cannot enforce.
        """
        with self._lock:
            found = self._kept.pop(source, None)
            if found is not None:
                self._kept[source] = found
                return found
        if len(source.encode(errors="surrogatepass")) > MOST_SOURCE:
            raise UserError(f"the grammar is larger than {MOST_SOURCE} bytes")
        made = self._compile(source)
        with self._lock:
            self._kept[source] = made
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made

    def _compile(self, source: str) -> Grammar:
        library, inner = _llguidance(), self._inner
        try:
            source.encode()
            limits = library.LLParserLimits(**_LIMITS)
            prototype = library.LLMatcher(inner, source, log_level=0, limits=limits)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"the grammar cannot be compiled: {error}") from error
        if prototype.is_error():
            raise UserError(f"the grammar cannot be compiled: {_reason(prototype.get_error())}")
        grammar = Grammar(prototype, -(-inner.vocab_size // 32))
        first = grammar.matcher()
        if not first.mask().any() or first.error:
            raise UserError(f"the grammar cannot be compiled: it allows nothing {first.error}".rstrip())
        return grammar

    @functools.cached_property
    def _inner(self) -> Any:
        """llguidance's tokenizer: half a second for GLM's vocabulary, once."""
        return _llguidance().LLTokenizer(_Wrapped(self._tokenizer, self._end_ids), eos_token=self._end_ids)


class _Wrapped:
    """What llguidance asks of a tokenizer: the bytes of each token, and which are control tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]):
        self._tokenizer = tokenizer
        names = {id_: name for name, id_ in tokenizer.special_ids.items()}
        texts = [tokenizer.backend.id_to_token(id_) for id_ in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted({*names, *end_ids})
        self.tokens = [
            names[i].encode() if i in names else token_to_bytes(text) if text is not None else b""
            for i, text in enumerate(texts)
        ]
        self.eos_token_id = end_ids[0]

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, allow_special=False)


def _reason(message: str) -> str:
    """An error without what is only for debugging."""
    return message.split("\n<non-verbose/>")[0].split("\n<state>")[0].strip()[:500]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UserError("grammars need llguidance: pip install 'glm45-jax[serve]'") from error
    return llguidance
