"""Sequences over pages, with a model that is a hash of what it reads: what it reads must be the sequence, always."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.infer.pages import Pages, digests_of
from glm45_jax.infer.schedule import Scheduler, Sequence, arrays_of

DRAFTS = 3


def after(tokens: list[int]) -> int:
    """What the model says comes after these tokens."""
    return zlib.crc32(np.asarray(tokens, np.int32).tobytes()) % 5


def answer(prompt: list[int], limit: int) -> list[int]:
    tokens = [*prompt]
    for _ in range(limit):
        tokens.append(after(tokens))
        if tokens[-1] == 0:
            break
    return tokens


class Device:
    """Runs steps one after another, as arrays say; gives the drafts that held and what was chosen behind them."""

    def __init__(self, pages: int, size: int, slots: int, width: int):
        self.memory = np.full((pages + 1, size), -9)  # one to spare
        self.of_mtp = self.memory.copy()
        self.left, self.accepted = np.full((slots + 1, 1 + DRAFTS), -9), np.zeros(slots + 1, int)
        self.size, self.slots, self.width = size, slots, width

    def run(self, parts, luck: int) -> list[list[int]]:
        total = sum(p.size for p in parts)
        a = arrays_of(parts, len(parts) + 2, total + 3, self.width, self.slots, len(self.memory) - 1, DRAFTS)
        tokens = np.where(a["from_slot"] >= 0, self.left.reshape(-1)[a["from_slot"]], a["tokens"])
        lengths = a["lengths"] + np.where(a["ahead"], self.accepted[a["to_slot"]], 0)
        rows = [(a["starts"][r], a["starts"][r + 1], lengths[r], a["page_table"][r]) for r in range(a["num_rows"])]
        for row, (start, end, length, table) in enumerate(rows):  # all is written before anything is read
            for i, place in enumerate(range(length - (end - start), length)):
                self.memory[table[place // self.size], place % self.size] = tokens[start + i]
                if parts[row].sequence.drafting:
                    self.of_mtp[table[place // self.size], place % self.size] = tokens[start + i]
        chosen = []
        for row, (_, _, length, table) in enumerate(rows):
            read = [int(self.memory[table[p // self.size], p % self.size]) for p in range(length)]
            known = length - int(a["drafts"][row])
            if parts[row].sequence.drafting:
                drafted_by = [int(self.of_mtp[table[p // self.size], p % self.size]) for p in range(length)]
                assert drafted_by == read, "the MTP layer drafts from what it has not read"
            new = [after(read[:known])]
            for place in range(known, length):
                if read[place] != new[-1]:
                    break
                new.append(after(read[: place + 1]))
            chosen.append(new)
            slot = a["to_slot"][row]
            self.left[slot], self.accepted[slot] = [new[-1], *guesses(read[:known] + new, luck)], len(new) - 1
        return chosen


def serve(
    prompts, limits, arrivals, *, pages, size, slots, tokens, alone=(), drafting=(), cancel=None, renew=None, luck=0
):
    """Plans one step ahead, as the engine does. Returns the sequences, the scheduler, steps taken."""
    pool = Pages(pages, size)
    scheduler, device = Scheduler(pool, slots, tokens, DRAFTS), Device(pages, size, slots, pages)
    sequences = [
        Sequence(len(p), [*p], n, alone=i in alone, may_draft=i in drafting)
        for i, (p, n) in enumerate(zip(prompts, limits))
    ]
    flying, steps, unborn = None, 0, sorted(range(len(prompts)), key=lambda i: arrivals[i])
    while unborn or flying or scheduler.waiting or scheduler.running:
        while unborn and arrivals[unborn[0]] <= steps:
            scheduler.add(sequences[unborn.pop(0)])
        if cancel and steps == cancel[0]:
            scheduler.end(sequences[cancel[1]])
        if steps == renew:
            scheduler.begin_anew()
        scheduler.pause = 1 + luck % 3
        scheduler.drafts_ahead, scheduler.drafts_begin = steps % 5 != luck % 5, steps % 4 != 2
        parts = scheduler.plan()
        assert sum(part.size for part in parts) <= tokens
        chosen = device.run(parts, luck) if parts else []
        for part, new in zip(*(flying or ((), ()))):
            sequence = part.sequence
            if part.chooses and not sequence.ended:
                assert len(sequence.tokens) - sequence.prompt_length + len(new) <= sequence.limit
                new = new[: new.index(0) + 1] if 0 in new else new
                scheduler.put(sequence, new, guesses(sequence.tokens + new, luck) if sequence.drafting else ())
                if new[-1] == 0 or len(sequence.tokens) - sequence.prompt_length == sequence.limit:
                    scheduler.end(sequence)
                elif sequence.drafting and not sequence.pending and len(sequence.tokens) % 7 == luck % 7:
                    scheduler.end_drafting(sequence)
        flying = (parts, chosen) if parts else None
        steps += 1
        assert steps < 5000, "a deadlock"
    assert pool.available == pages, "a page was not given back"
    return sequences, scheduler, steps


def guesses(tokens: list[int], luck: int) -> list[int]:
    """Three, of which the first `luck % 4` are right."""
    found = [*tokens]
    for i in range(DRAFTS):
        found.append(after(found) if i < luck % 4 else 4)
    return found[len(tokens) :]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_all_answers_are_those_of_the_model(data):
    draw, whole = data.draw, st.integers
    count = draw(whole(1, 7))
    size, tokens = draw(whole(1, 5)), draw(whole(1, 12))
    bases = [draw(st.lists(whole(0, 4), min_size=1, max_size=14)) for _ in range(2)]
    prompts = [
        draw(st.sampled_from(bases))[: draw(whole(1, 14))] + draw(st.lists(whole(0, 4), max_size=3))
        for _ in range(count)
    ]
    limits = [draw(whole(1, 20)) for _ in range(count)]
    most = max(-(-(len(p) + n) // size) for p, n in zip(prompts, limits))
    cancel = (draw(whole(0, 9)), draw(whole(0, count - 1))) if draw(st.booleans()) else None
    sequences, _, _ = serve(
        prompts, limits, [draw(whole(0, 6)) for _ in prompts], pages=most + draw(whole(0, 8)), size=size,
        slots=draw(whole(1, 4)), tokens=tokens, alone=draw(st.sets(whole(0, count - 1))), cancel=cancel,
        drafting=draw(st.sets(whole(0, count - 1))), renew=draw(st.none() | whole(0, 8)), luck=draw(whole(0, 12)),
    )  # fmt: skip
    for i, (sequence, prompt, limit) in enumerate(zip(sequences, prompts, limits)):
        want = answer(prompt, limit)
        assert sequence.tokens == want or (
            cancel and cancel[1] == i and sequence.tokens == want[: len(sequence.tokens)]
        )


def test_a_beginning_is_read_once():
    prompt = [1, 2, 3, 4, 1, 2, 3, 4, 1]
    sequences, scheduler, _ = serve(
        [prompt, [*prompt, 2], prompt[:8]], [3, 3, 3], [0, 5, 9], pages=20, size=4, slots=2, tokens=64
    )
    assert scheduler.pages.asked == (2 + 2 + 1) * 4 and scheduler.pages.hits == (2 + 1) * 4
    assert [s.tokens for s in sequences] == [answer(p, 3) for p in (prompt, [*prompt, 2], prompt[:8])]


@pytest.mark.parametrize(("drafting", "shared"), [((), 2), ((0, 1), 2), ((0,), 0), ((1,), 0)])
def test_pages_are_shared_with_those_that_draft_alike(drafting, shared):
    """The MTP layer has not read the pages of a sequence that does not draft."""
    prompt: list[int] = [1, 2, 3, 4, 1, 2, 3, 4, 1]
    how: Any = {"pages": 20, "size": 4, "slots": 2, "tokens": 64, "luck": 1}
    _, scheduler, _ = serve([prompt, prompt], [2, 2], [0, 5], drafting=drafting, **how)
    assert scheduler.pages.hits == shared * 4


def test_drafts_save_steps():
    def steps(luck, drafting=(0,)):
        how: Any = {"pages": 20, "size": 4, "slots": 1, "tokens": 64}
        return serve([[1, 1, 1, 2]], [24], [0], drafting=drafting, luck=luck, **how)[2]

    assert len(answer([1, 1, 1, 2], 24)) > 20
    assert steps(3) < steps(1) < steps(0)


def test_steps_with_drafts_are_planned_before_the_one_before_has_ended():
    """Else the device waits for the host at every step: more than drafts save. With pages for all of them."""
    scheduler = Scheduler(Pages(20, 2), 1, 64, DRAFTS)
    sequence = Sequence(3, [1, 2, 3], 9, may_draft=True)
    scheduler.add(sequence)
    (prompt,) = scheduler.plan()
    (behind,) = scheduler.plan()
    assert (prompt.count, prompt.drafts, prompt.ahead) == (3, (), False)
    assert (behind.first, behind.count, behind.drafts, behind.ahead) == (3, 1, (-1,) * DRAFTS, True)
    assert len(sequence.pages) == 5  # 3 tokens, up to 3 more that held, 1, and 3 drafts
    assert not scheduler.plan(), "two steps ahead"
    scheduler.put(sequence, [4], [5, 6, 7])
    scheduler.drafts_ahead = False
    assert not scheduler.plan(), "its last token is to be known"
    scheduler.put(sequence, [5, 6, 8], [1, 1, 1])
    (known,) = scheduler.plan()
    assert (known.first, known.drafts, known.ahead) == (6, (1, 1, 1), False)


def test_a_sequence_that_has_ended_drafting_begins_again():
    """The MTP layer then reads what it has missed: not less, or its drafts are wrong, and not the whole sequence."""
    scheduler = Scheduler(Pages(20, 2), 1, 64, DRAFTS)
    scheduler.pause = 2
    sequence = Sequence(3, [1, 2, 3], 20, may_draft=True)
    scheduler.add(sequence)
    (prompt,) = scheduler.plan()
    assert prompt.sequence.drafting
    scheduler.put(sequence, [4], [5, 6, 7])
    scheduler.end_drafting(sequence)
    scheduler.drafts_begin = False
    for token in (6, 7):
        (part,) = scheduler.plan()
        assert not part.drafts and part.count == 1
        scheduler.put(sequence, [token])
    scheduler.plan()
    scheduler.drafts_begin = True
    assert not scheduler.plan() and not sequence.drafting, "its last token is to be known"
    scheduler.put(sequence, [8])
    (again,) = scheduler.plan()
    assert sequence.drafting and (again.first, again.count, again.chooses) == (3, 4, True)


def test_what_was_unused_longest_is_forgotten_first_and_ends_before_beginnings():
    pages = Pages(4, 2)
    digests = digests_of([1, 2, 3, 4, 5, 6], 2)
    taken = pages.take(3)
    for page, digest in zip(taken, digests):
        pages.know(page, digest)
    pages.release(taken)
    assert pages.available == 4 and pages.take(5) is None
    other = pages.take(2)  # the free one, and the last of the three
    assert pages.find(digests) == taken[:2]
    assert taken[2] in other
    pages.release(taken[:2])
    pages.forget_all()
    assert pages.find(digests) == [] and pages.available == 2


def test_decoding_goes_on_beside_a_long_prompt():
    prompts = [[3, 1], [2] * 60]
    scheduler = Scheduler(Pages(80, 2), 4, 8)
    sequences = [Sequence(len(p), [*p], 30) for p in prompts]
    scheduler.add(sequences[0])
    scheduler.put(scheduler.plan()[0].sequence, [1])
    scheduler.add(sequences[1])
    for _ in range(7):
        parts = {p.sequence: p.size for p in scheduler.plan()}
        assert parts == {sequences[0]: 1, sequences[1]: 7}
        scheduler.put(sequences[0], [1])


@pytest.mark.parametrize("alone", [False, True])
def test_nothing_is_planned_ahead_of_one_that_is_alone(alone):
    scheduler = Scheduler(Pages(8, 2), 1, 8)
    scheduler.add(Sequence(2, [1, 2], 9, alone=alone))
    assert len(scheduler.plan()) == 1
    assert len(scheduler.plan()) == (not alone)
    assert not scheduler.plan()  # never two ahead
