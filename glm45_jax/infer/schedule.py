"""Which tokens of which sequences a step reads: prompts in chunks and decoding sequences side by side.

A step is planned before the one before it has ended: what a sequence's last token will be is not known then, only that
there will be one. It stays on the device, in the sequence's slot, from where the next step takes it. With drafts there
may be several new ones, and how many of them held stays there too: the next step is planned as if none had, with pages
for the case that all do. A step that was planned for a sequence that turns out to have ended is in vain; what it wrote
no one reads.

Every step decodes all sequences that can go on, and fills up with prompts, first come, first served. Where a sequence
finds no page for its next token, the one that came last gives its pages back and begins anew, with its answer so far,
when there is room. Those that came first go on, so that all come to an end.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from glm45_jax.infer.pages import Pages, digests_of

_NOWHERE = _UNKNOWN = -1


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt and its answer on the way.

    Attributes:
      limit: tokens of the answer at most.
      tokens: prompt and answer, as far as they are known.
      pending: tokens that have been planned and are not known yet.
      cached: tokens whose keys and values are in pages, or will be by the steps planned so far if no draft holds.
      alone: nothing is planned ahead: how a token is chosen depends on the one before (penalties, grammars).
      may_draft, drafting: whether its tokens can be, and are, drafted ahead.
      drafts: what may come after `tokens`, while nothing is pending.
      salt: sequences share pages with those of the same alone: only these hold what the MTP layer reads too.
      drafted: tokens that the MTP layer has read too, of one that has ended drafting.
      found: tokens of the prompt that pages of others held already.
    """

    prompt_length: int
    tokens: list[int]
    limit: int
    alone: bool = False
    may_draft: bool = False
    drafting: bool = False
    drafts: list[int] = dataclasses.field(default_factory=list)
    salt: bytes = b""
    drafted: int = 0
    pending: int = 0
    cached: int = 0
    found: int = 0
    slot: int = _NOWHERE
    pages: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    registered: int = 0
    ended: bool = False
    number: int = dataclasses.field(default_factory=itertools.count().__next__)

    @property
    def answered(self) -> int:
        """Tokens of the answer, those to come of planned steps included."""
        return len(self.tokens) + self.pending - self.prompt_length

    @property
    def unread(self) -> int:
        """Tokens that the model has yet to read."""
        return len(self.tokens) + self.pending - self.cached


@dataclasses.dataclass(frozen=True)
class Part:
    """What a step reads of one sequence: `count` tokens, drafts behind them, and whether it chooses what comes then.

    With `ahead` the step before is to say which drafts, and how many of its own stand before `first`.
    """

    sequence: Sequence
    first: int
    count: int
    drafts: tuple[int, ...]
    chooses: bool
    ahead: bool = False

    @property
    def size(self) -> int:
        return self.count + len(self.drafts)


class Scheduler:
    """Sequences that wait and sequences at work, over `pages`, in `slots` at a time.

    Attributes:
      most_drafts: read behind a sequence's tokens.
      drafts_begin: whether sequences that begin now draft, if they may, and those that have ended it begin again.
      drafts_ahead: whether steps with drafts are planned before the one before has ended.
      pause: tokens of a sequence without drafts, at least, before it drafts again.
      preempted: how often a sequence had to begin anew.
    """

    pause = 48

    def __init__(self, pages: Pages, slots: int, tokens: int, drafts: int = 0):
        self.pages, self.most_tokens, self.most_drafts, self._drafts = pages, tokens, drafts, drafts
        self.drafts_begin, self.drafts_ahead = drafts > 0, True
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []  # by number: first come, first served
        self.preempted = 0
        self._slots = list(range(slots - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        if not sequence.ended:
            self.waiting.append(sequence)

    def plan(self) -> list[Part]:
        """The parts of the next step; none where nothing can go on now."""
        parts: list[Part] = []
        room, crowded = self.most_tokens, False
        must_wait = self._draft_again() if self.drafts_begin else []
        for sequence in sorted(self.running, key=lambda s: s.unread > 1):  # those that decode first
            if sequence.slot == _NOWHERE or room == 0 or sequence in must_wait or not self._goes_on(sequence):
                continue
            part = self._next(sequence, room)
            if self._make_room(sequence, part.size + self._uncertain(sequence), parts):
                parts.append(self._planned(part))
                room -= part.size
            else:
                crowded = True
        while room and self.waiting and self._slots and not crowded and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            part = self._next(sequence, room)
            if not self._extend(sequence, part.size):  # there is room for all tokens, but for drafts perhaps not
                part = dataclasses.replace(part, drafts=())
                assert self._extend(sequence, part.size), "admitted without pages"
            parts.append(self._planned(part))
            room -= part.size
        return parts

    def end_drafting(self, sequence: Sequence) -> None:
        """Goes on without; nothing of it may be pending."""
        sequence.drafting, sequence.drafts, sequence.drafted = False, [], sequence.cached

    @property
    def could_draft_again(self) -> list[Sequence]:
        """Sequences that have ended drafting, where what the MTP layer has missed is worth reading once more."""
        ended = (s for s in self.running if s.salt and not s.drafting)
        return [s for s in ended if self.pause <= s.cached - s.drafted <= min(self.most_tokens, s.limit - s.answered)]

    def put(self, sequence: Sequence, tokens: Iterable[int], drafts: Iterable[int] = ()) -> None:
        """What a step has chosen is known now: drafts that held, and the token after them; and the next drafts."""
        new = [*tokens]
        sequence.tokens += new
        sequence.drafts = [*drafts]
        sequence.pending -= 1
        if sequence.slot != _NOWHERE:
            sequence.cached += len(new) - 1
        self._register(sequence)

    def end(self, sequence: Sequence) -> None:
        """The sequence is done, or no longer wanted: its pages are for others."""
        sequence.ended = True
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def begin_anew(self) -> None:
        """All sequences at work read their tokens again, and no page is shared: the weights have changed."""
        for sequence in reversed([*self.running]):
            self._preempt(sequence)
        self.pages.forget_all()

    # --- what a sequence needs -------------------------------------------------------------------------------------

    def _goes_on(self, sequence: Sequence) -> bool:
        if sequence.unread == 0 or sequence.answered + self._uncertain(sequence) >= sequence.limit:
            return False
        waits = sequence.alone or (sequence.drafting and not self.drafts_ahead)
        return sequence.pending == 0 or (sequence.pending == 1 and not waits)

    def _draft_again(self) -> list[Sequence]:
        """Those that could; what they are to read again must be known. Returns those that have to wait for that."""
        could = self.could_draft_again
        for sequence in could:
            if not sequence.pending:
                sequence.drafting, sequence.cached = True, sequence.drafted
        return [sequence for sequence in could if not sequence.drafting]

    def _uncertain(self, sequence: Sequence) -> int:
        """Tokens that a planned step may give besides the one that is sure."""
        return self._drafts if sequence.drafting and sequence.pending else 0

    def _next(self, sequence: Sequence, room: int) -> Part:
        count = min(sequence.unread, room)
        chooses = count == sequence.unread
        if not (chooses and sequence.drafting):
            return Part(sequence, sequence.cached, count, (), chooses)
        left = sequence.limit - sequence.answered - self._uncertain(sequence) - 1
        most = max(0, min(self.most_drafts, left, room - count))
        drafts = (_UNKNOWN,) * most if sequence.pending else tuple(sequence.drafts[:most])
        return Part(sequence, sequence.cached, count, drafts, True, ahead=sequence.pending > 0)

    def _planned(self, part: Part) -> Part:
        part.sequence.cached += part.count
        part.sequence.pending += part.chooses
        return part

    def _admit(self, sequence: Sequence) -> bool:
        """A slot, and the pages of a known beginning; what is left must find room besides one page for each at work."""
        if sequence.pending:  # of a step before it was preempted: first the token has to be known
            return False
        size, drafting = self.pages.page_size, sequence.may_draft and self.drafts_begin
        salt = b"drafts" if drafting else b""
        if sequence.salt != salt:
            sequence.salt, sequence.digests = salt, []
        known = sequence.digests[: (len(sequence.tokens) - 1) // size]
        sequence.digests = digests_of(sequence.tokens[:-1], size, known, sequence.salt)
        found = self.pages.find(sequence.digests)
        needed = -(-len(sequence.tokens) // size) - len(found)
        if self.running and needed + len(self.running) > self.pages.available:
            self.pages.release(found)
            return False
        sequence.drafting, sequence.drafts = drafting, sequence.drafts if drafting else []
        sequence.pages, sequence.cached, sequence.registered = found, len(found) * size, len(found)
        if len(sequence.tokens) == sequence.prompt_length:
            sequence.found = sequence.cached
        sequence.slot = self._slots.pop()
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.number)
        return True

    def _extend(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens."""
        needed = -(-(sequence.cached + count) // self.pages.page_size) - len(sequence.pages)
        taken = self.pages.take(needed) if needed > 0 else []
        sequence.pages += taken or []
        return taken is not None

    def _make_room(self, sequence: Sequence, count: int, parts: list[Part]) -> bool:
        """`_extend`, at the cost of those that came later; False where the sequence has to wait."""
        planned = {part.sequence.number for part in parts}
        while not self._extend(sequence, count):
            last = next(s for s in reversed(self.running) if s.number not in planned)
            if last.number < sequence.number:
                return False
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preempted += 1
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        self.pages.release(sequence.pages)
        sequence.pages, sequence.cached, sequence.slot, sequence.registered = [], 0, _NOWHERE, 0

    def _register(self, sequence: Sequence) -> None:
        """Pages full of known tokens can be found from now on."""
        size = self.pages.page_size
        if sequence.salt and not sequence.drafting:
            return  # the MTP layer has not read its last tokens
        full = min(sequence.cached, len(sequence.tokens)) // size
        if full > sequence.registered and sequence.slot != _NOWHERE:
            sequence.digests = digests_of(sequence.tokens[: full * size], size, sequence.digests, sequence.salt)
            for at in range(sequence.registered, full):
                self.pages.know(sequence.pages[at], sequence.digests[at])
            sequence.registered = full


def arrays_of(
    parts: Iterable[Part], rows: int, tokens: int, width: int, slots: int, spare: int, most: int = 0
) -> dict[str, Any]:
    """A step's parts as arrays for `rows` rows, `tokens` tokens and page tables `width` wide.

    Args:
      spare: a page of no sequence, for places that have none.
      most: drafts that a slot has room for.

    Returns:
      tokens [N], and from_slot [N]: where in [slots, 1 + most], each slot's last token and its drafts, the one lies
      that stands there, -1 where `tokens` has it; following [N]: the token after each, where it is known already;
      starts [R + 1], lengths [R], drafts [R], page_table [R, P], num_rows; to_slot [R]: where the chosen token goes,
      `slots` for nowhere; ahead [R]: whether the drafts that held in the slot are to be added to the length; chooses
      [R].
    """
    out = {
        "tokens": np.zeros(tokens, np.int32), "from_slot": np.full(tokens, -1, np.int32),
        "following": np.zeros(tokens, np.int32), "starts": np.zeros(rows + 1, np.int32),
        "lengths": np.zeros(rows, np.int32), "drafts": np.zeros(rows, np.int32),
        "page_table": np.full((rows, width), spare, np.int32), "to_slot": np.full(rows, slots, np.int32),
        "ahead": np.zeros(rows, bool), "chooses": np.zeros(rows, bool),
    }  # fmt: skip
    at = row = 0
    for row, part in enumerate(parts, 1):
        sequence, end, here = part.sequence, at + part.size, row - 1
        known = sequence.tokens[part.first : part.first + part.count]
        after = sequence.tokens[part.first + 1 : part.first + part.count + 1]
        out["tokens"][at : at + len(known)] = known
        behind, slot = slice(end - len(part.drafts), end), sequence.slot * (1 + most)
        out["tokens"][behind] = part.drafts
        out["following"][at : at + len(after)] = after
        out["from_slot"][at + len(known) : behind.start] = slot
        if part.ahead:
            out["from_slot"][behind] = slot + 1 + np.arange(len(part.drafts))
        out["starts"][row:] = end
        out["lengths"][here], out["drafts"][here] = part.first + part.size, len(part.drafts)
        out["page_table"][here, : len(sequence.pages)] = sequence.pages
        out["chooses"][here], out["ahead"][here] = part.chooses, part.ahead
        if part.chooses:
            out["to_slot"][here] = sequence.slot
        at = end
    return {**out, "num_rows": np.int32(row)}
