"""Which token may come next in one answer: a budget for its thought, a grammar for what follows the thought.

Each answer has a `Constraint`, which follows it token by token and says, as a mask of bits, what may come now and after
each of the drafts behind it. Thoughts are free but for their end: with a grammar an answer may neither end nor call a
tool inside of one, nor spell out the tags by which a reader tells the thought from the answer.

Masks are [V/32] words: bit v % 32 of word v // 32 says whether token v may come.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.infer.grammar import Grammar, Grammars, Matcher
from glm45_jax.text import Tokenizer
from glm45_jax.text.byte_level import token_to_bytes

_TAGS = (b"</think>", b"<tool_call>")  # by which `text.parsing` ends a thought

Place = Literal["before", "inside", "gap", "after"]


class ThoughtMasks:
    """Masks of one tokenizer that need no grammar; each is computed once.

    Args:
      end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]):
        self.words = -(-vocab_size // 32)
        special, backend = tokenizer.special_ids, tokenizer.backend
        self.opens, self.closes, self.calls = (special.get(n, -1) for n in ("<think>", "</think>", "<tool_call>"))
        newline = tokenizer.encode("\n")
        self.newline = newline[0] if len(newline) == 1 else -1
        self._size = min(tokenizer.vocab_size, vocab_size)
        banned = {*end_ids, self.calls, self.opens} | {special.get("</tool_call>", -1)}
        self._banned = [i for i in banned if 0 <= i < self._size]
        self._names, self._text_of = {*special.values()}, backend.id_to_token

    def only(self, *tokens: int) -> np.ndarray:
        """A mask of a few tokens; -1 stands for none."""
        bits = np.zeros(self.words * 32, bool)
        bits[[token for token in tokens if token >= 0]] = True
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)

    @functools.cached_property
    def close(self) -> np.ndarray:
        return self.only(self.closes)

    @functools.cached_property
    def closed(self) -> np.ndarray:
        """Anything but another thought."""
        return ~self.only(self.opens)

    @functools.cached_property
    def open(self) -> np.ndarray:
        return self.only(self.opens, self.newline)

    @functools.cached_property
    def open_now(self) -> np.ndarray:
        return self.only(self.opens)

    @functools.lru_cache(maxsize=32)  # noqa: B019 one of these exists for each engine
    def thought(self, tail: bytes) -> np.ndarray:
        """What may come in a thought that a grammar follows, and that ends with `tail`, the beginning of a tag."""
        mask = self.only(*range(self._size))
        ends = [i for i, piece in self._with_bracket if any(tag in tail + piece for tag in _TAGS)]
        return mask & ~self.only(*self._banned, *ends)

    @functools.cached_property
    def _with_bracket(self) -> list[tuple[int, bytes]]:
        """Tokens of text that may end a tag, and their bytes."""
        pieces = ((i, self.bytes_of(i)) for i in range(self._size))
        return [(i, piece) for i, piece in pieces if b">" in piece]

    def is_blank(self, token: int) -> bool:
        """Whether text may not have begun with it: whitespace, a control token, a part of a character."""
        return not self.bytes_of(token).decode("utf-8", "ignore").strip()

    def bytes_of(self, token: int) -> bytes:
        """Of a token of text; none for control tokens."""
        text = None if token in self._names else self._text_of(token)
        return token_to_bytes(text) if text is not None else b""


@dataclasses.dataclass(frozen=True)
class Thought:
    """Where an answer is in its thought.

    Attributes:
      place: before the thought, inside, or after it; in the gap a newline may come before the grammar begins.
      left: tokens that the thought may still have; None: as many as it likes.
      tail: text at the thought's end that may be the beginning of a tag.
      newline: the template's has come, before the thought.
    """

    place: Place
    left: int | None = None
    tail: bytes = b""
    newline: bool = False

    def after(self, token: int, masks: ThoughtMasks, spelled: bool) -> Thought:
        """One token further; `spelled`: a grammar follows, so that tags that are spelled out matter too."""
        if self.place == "inside":
            if token == masks.closes:
                return dataclasses.replace(self, place="gap")
            if token == masks.calls:
                return dataclasses.replace(self, place="after")
            left = None if self.left is None else max(self.left - 1, 0)
            return dataclasses.replace(self, left=left, tail=_tail(self.tail, token, masks) if spelled else b"")
        if self.place == "before" and token == masks.opens:
            return dataclasses.replace(self, place="inside")
        if self.place == "before" and spelled:
            return dataclasses.replace(self, newline=True)
        if self.place != "after" and not spelled and masks.is_blank(token):  # `text.parsing` skips blanks too
            return self
        return dataclasses.replace(self, place="after")


def _tail(tail: bytes, token: int, masks: ThoughtMasks) -> bytes:
    text = tail + masks.bytes_of(token)
    end = text[text.rfind(b"<") :] if b"<" in text else b""
    return end if any(tag.startswith(end) for tag in _TAGS) else b""


class Constraint:
    """What one answer has to keep to.

    Args:
      thought: where the answer begins.
      matcher: of the grammar for what follows the thought; without one only the budget counts.
      end_ids: tokens that end an answer.

    Attributes:
      error: why the answer cannot go on; None while it can.
      ended: an end token has come that the grammar asked for.
    """

    def __init__(
        self, thought: Thought, masks: ThoughtMasks, matcher: Matcher | None = None, end_ids: Iterable[int] = ()
    ):
        self._thought, self._masks, self._matcher = thought, masks, matcher
        self._end_ids = frozenset(end_ids)
        self.error: str | None = None
        self.ended = False

    @property
    def done(self) -> bool:
        """Whatever comes is allowed from now on."""
        return self._matcher is None and (self._thought.place == "after" or self._thought.left is None)

    def fill(self, rows: np.ndarray, drafts: Sequence[int]) -> None:
        """Writes what may come now, and after each draft as far as they are allowed, into rows [C, V/32].

        Rows behind a draft that is not allowed, or ends the answer, are left as they are: no one reads what is
        chosen there. (llguidance does not count an end among the tokens that it takes back.)
        """
        thought, taken = self._thought, 0
        for i, row in enumerate(rows[: len(drafts) + 1]):
            mask = self._mask(thought)
            if mask is not None:
                row[:] = 0
                row[: len(mask)] = mask
            if i == len(drafts) or self._failed or drafts[i] in self._end_ids or not _holds(mask, drafts[i]):
                break
            if self._uses_matcher(thought, drafts[i]):
                assert self._matcher is not None
                if not self._matcher.take(drafts[i]):
                    break
                taken += 1
            thought = thought.after(drafts[i], self._masks, self._matcher is not None)
        if self._matcher is not None:
            self._matcher.back(taken)
            if self._failed:
                self.error = self.error or f"the grammar cannot go on: {self._matcher.error}"

    @property
    def _failed(self) -> bool:
        return self._matcher is not None and self._matcher.error != ""

    def take(self, token: int) -> None:
        """The token that was chosen; sets `error` where it is not allowed."""
        if self.error:
            return
        if not _holds(self._mask(self._thought), token):
            self.error = "no token is left to choose that the grammar allows; logit_bias may have banned them"
            return
        if self._uses_matcher(self._thought, token):
            assert self._matcher is not None
            if not self._matcher.take(token):
                self.error = f"the grammar cannot go on: {self._matcher.error}"
            self.ended = token in self._end_ids
        self._thought = self._thought.after(token, self._masks, self._matcher is not None)

    def _uses_matcher(self, thought: Thought, token: int) -> bool:
        """Whether a token is the grammar's, not the thought's nor the gap's."""
        if self._matcher is None or thought.place in ("before", "inside"):
            return False
        if thought.place == "gap" and token == self._masks.newline:
            return _holds(self._matcher.mask(), token)
        return True

    def _mask(self, thought: Thought) -> np.ndarray | None:
        """None: all may come."""
        if thought.place == "inside" and thought.left == 0:
            return self._masks.close
        if self._matcher is None:
            return self._masks.closed if thought.place == "gap" else None
        if thought.place == "before":
            return self._masks.open_now if thought.newline else self._masks.open
        if thought.place == "inside":
            return self._masks.thought(thought.tail)
        mask = self._matcher.mask()
        if self._failed:
            return None
        if thought.place == "gap" and self._masks.newline >= 0:
            mask[self._masks.newline // 32] |= np.uint32(1 << self._masks.newline % 32)
        return mask


class Constraints:
    """Makes the constraints of one engine's requests."""

    def __init__(self, tokenizer: Tokenizer | None, config: ModelConfig):
        self._tokenizer, self._vocab_size = tokenizer, config.vocab_size
        self._end_ids = tuple(config.eos_token_id or (tokenizer.eos_ids if tokenizer else ()))

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Raises `UserError` without a tokenizer."""
        if self._tokenizer is None or not self._end_ids:
            raise UserError("grammars are of text that ends: give the engine its tokenizer")
        return Grammars(self._tokenizer, self._end_ids)

    @functools.cached_property
    def _masks(self) -> ThoughtMasks:
        if self._tokenizer is None:
            raise UserError("thoughts are of text: give the engine its tokenizer")
        return ThoughtMasks(self._tokenizer, self._vocab_size, self._end_ids)

    def prepare(self) -> None:
        """Looks through the vocabulary ahead: a fifth of a second with GLM's."""
        if self._tokenizer is not None:
            self._masks.thought(b"")

    def make(self, grammar: Grammar | None, thought: Place, budget: int | None) -> Constraint | None:
        """None where there is nothing to keep to. Raises `UserError` for a budget below 0."""
        if budget is not None and budget < 0:
            raise UserError(f"thought_budget is {budget}; it must be 0 or more")
        if grammar is None and (budget is None or thought in ("gap", "after")):
            return None
        matcher = grammar.matcher() if grammar is not None else None
        return Constraint(Thought(thought, budget), self._masks, matcher, self._end_ids)


def _holds(mask: np.ndarray | None, token: int) -> bool:
    return mask is None or (token // 32 < len(mask) and bool(mask[token // 32] >> np.uint32(token % 32) & 1))
