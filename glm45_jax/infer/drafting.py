"""Whether drafts pay: what a step with them takes, and how many of them hold.

A draft that holds is a token for the price of reading one more in the same step; the MTP layer that makes drafts, and
the further tokens' experts, are what it costs. Which is more depends on the machine, the load and the text, so both are
measured: roughly at the start, then in service, where both kinds of step have to be tried, one after the other, for
that. One sequence that drafts makes the step longer for all, so what counts is how many of them do; and since requests
come in waves, the load that counts for one that comes is that of the last steps, not that of the moment.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable

_SLOWLY = 0.02  # weight of the newest draft in the chance, once many have been seen
_FIRST_GUESS, _WORTH_OF_GUESS = 0.8, 4  # counts as so many drafts
_LEAST_CHANCE = 0.3  # that a draft must have to be read
_COLD = 4  # steps after those of another kind that take longer than when they go on
_BEGIN, _GO_ON = 1.25, 1.2  # gains that are asked for: prompts with drafts and last steps take that much back
_TRY = 0.85  # of a gain that is known from the start alone, to see what it is in service
_LOAD_KEPT = 0.98  # of the load, from step to step
TRIAL = 12  # steps of a kind, the cold ones among them, that say what it takes
_WARM = TRIAL - _COLD  # steps of each kind that are kept, and that are compared
_COMPARISONS = 3  # of which the middle one counts: a slow moment spoils one
_FIRST_PLAIN, _LAST_PLAIN = 4 * TRIAL, 4000  # steps with drafts, then it is time to see steps without
_SHARE_OF_TRIALS = 0.01  # of the time, where drafts do not pay, goes to see how it is now


class Drafting:
    """For up to `most` drafts behind each token.

    Args:
      size_of: rows of the program that decodes so many sequences.

    Attributes:
      chance: that a draft holds where those before it do.
      given, accepted: drafts that were read, and that held.
    """

    def __init__(self, most: int, size_of: Callable[[int], int] = lambda rows: rows):
        self.most, self.chance, self._size_of = most, _FIRST_GUESS, size_of
        self.given = self.accepted = 0
        self._seen, self._load = _WORTH_OF_GUESS, 0.0
        self._times: dict[tuple[bool, int], collections.deque[float]] = {}
        self._at_start: dict[int, tuple[float, float]] = {}
        self._compared: dict[int, collections.deque[tuple[float, float]]] = {}
        self._stretch: dict[int, tuple[bool, int]] = {}  # kind of the last warm steps, and how many
        self._elapsed = self._on_trials = 0.0
        self._left_of_trial = self._in_a_row = 0
        self._last: tuple[bool, int] | None = None  # kind of step
        self._since_plain = collections.Counter[int]()  # steps with drafts
        self._until_plain: dict[int, int] = {}  # so many of them: twice as many each time that drafts still paid

    def saw(self, given: int, accepted: int) -> None:
        """Of one sequence in one step."""
        self.given, self.accepted = self.given + given, self.accepted + accepted
        for held in [True] * accepted + [False] * (accepted < given):
            self._seen += 1
            self.chance += max(_SLOWLY, 1 / self._seen) * (held - self.chance)

    def timed_at_start(self, rows: int, plain: float, drafted: float) -> None:
        """How long steps took without requests, seconds: what counts until both kinds are known in service."""
        self._at_start[rows] = plain, drafted

    def timed(self, rows: int, seconds: float, *, drafts: bool) -> None:
        """How long a step of `rows` sequences took, most of which decoded, with drafts or without."""
        self._elapsed += seconds
        self._left_of_trial -= drafts
        rows = self._size_of(rows)
        self._in_a_row = self._in_a_row + 1 if self._last == (drafts, rows) else 1
        if drafts and self._last == (False, rows):
            self._until_plain[rows] = min(2 * self._until_plain.get(rows, _FIRST_PLAIN), _LAST_PLAIN)
        self._last = drafts, rows
        if self._in_a_row > _COLD:
            self._times.setdefault((drafts, rows), collections.deque(maxlen=_WARM)).append(seconds)
            self._compare(drafts, rows)
        self._since_plain[rows] = 0 if not drafts and self._known(False, rows) else self._since_plain[rows] + drafts

    def _compare(self, drafts: bool, rows: int) -> None:
        """Steps of one kind with those of the other before them: a machine is as quick in both, whatever else it does.

        What a kind took at another time says less: by a burst of slow steps the other would seem to pay.
        """
        before, count = self._stretch.get(rows, (drafts, 0))
        count = count + 1 if before == drafts else 1
        self._stretch[rows] = drafts, count
        if count == _WARM and self._known(not drafts, rows):
            plain, drafted = (statistics.median(self._times[kind, rows]) for kind in (False, True))
            self._compared.setdefault(rows, collections.deque(maxlen=_COMPARISONS)).append((plain, drafted))

    def begins(self, rows: int, without: int) -> bool:
        """Whether those that come, or could draft again, are to draft: it pays, or it is time for a trial.

        Args:
          rows: sequences that will decode together, those that come included.
          without: of them, those at work that can't draft; all others are taken to.
        """
        self._load = max(self._load, rows)
        rows = math.ceil(self._load)
        if self._left_of_trial > 0:
            return True
        if not self.most or self._time_for_plain(rows):
            return False
        gain = self.gain(rows, rows - without)
        if gain > _BEGIN:
            return True
        plain, drafted = self._seconds_of(rows)
        cost = TRIAL * max(drafted - plain, 0.0)
        unknown = gain > _TRY and not self._known(True, rows)
        if not unknown and self._on_trials + cost > _SHARE_OF_TRIALS * self._elapsed:
            return False
        self._on_trials += cost
        self._left_of_trial = TRIAL
        return True

    def goes_on(self, rows: int, drafting: int) -> bool:
        """Whether those that draft, of `rows` at work, are to do so in the next step; asked before each."""
        self._load = max(self._load * _LOAD_KEPT, rows)
        if self._left_of_trial > 0:
            return True
        pays = self.gain(rows, drafting) > _GO_ON
        if drafting and not pays:
            self._until_plain.pop(self._size_of(rows), None)
        return pays and not self._time_for_plain(rows)

    def gain(self, rows: int, drafting: int) -> float:
        """How many times as fast `rows` sequences go on where `drafting` of them have drafts; much, where nothing is
        known."""
        if not self.most or not drafting:
            return 0.0
        plain, drafted = self._seconds_of(rows)
        more = sum(self.chance**i for i in range(1, self.worth_reading + 1))
        return plain * (1 + more * drafting / rows) / drafted

    def _seconds_of(self, rows: int) -> tuple[float, float]:
        """Of a step without drafts and one with them; as if they cost nothing, as long as nothing is known."""
        compared = sorted(self._compared.get(self._size_of(rows), ()), key=lambda pair: pair[1] / pair[0])
        return compared[len(compared) // 2] if compared else self._at_start.get(self._size_of(rows), (1.0, 1e-9))

    def _known(self, drafts: bool, rows: int) -> bool:
        """Whether steps of a kind have been seen in service."""
        return len(self._times.get((drafts, self._size_of(rows)), ())) >= _WARM

    def _time_for_plain(self, rows: int) -> bool:
        """Whether steps without drafts are to be seen, which none is while some sequence drafts: what they took in a
        slow moment would else keep drafts going that do not pay."""
        size = self._size_of(rows)
        return self._since_plain[size] >= self._until_plain.get(size, _FIRST_PLAIN)

    @property
    def worth_reading(self) -> int:
        """Drafts that have a fair chance."""
        if self.chance >= 1:
            return self.most
        return max(1, min(self.most, int(math.log(_LEAST_CHANCE) / math.log(max(self.chance, 1e-3)))))
