"""Whether drafts pay: what a step with them takes, and how many of them hold.

A draft that holds is a token for the price of reading one more in the same step; the MTP layer that makes drafts, and
the further tokens' experts, are what it costs. Which is more depends on the machine, the load and the text, so both are
measured, at the start and in service.
"""

from __future__ import annotations

import math

_SLOWLY, _QUICKLY = 0.02, 0.2  # weight of the newest, in running means of drafts and of times
_FIRST_GUESS = 0.7
_LEAST_CHANCE = 0.3  # that a draft must have to be read
_MARGIN = 1.02  # by which a change of mind must pay
FAIR_TRIAL = 8  # tokens of an answer before its drafts may be found not to pay
_SHARE_OF_TRIALS = 0.01  # of the time, where drafts do not pay, goes to see how it is now


class Drafting:
    """For up to `most` drafts behind each token.

    Attributes:
      chance: that a draft holds where those before it do.
      given, accepted: drafts that were read, and that held.
    """

    def __init__(self, most: int):
        self.most, self.chance = most, _FIRST_GUESS
        self.given = self.accepted = 0
        self._seconds: dict[tuple[bool, int], float] = {}
        self._at_start: dict[int, tuple[float, float]] = {}
        self._elapsed = self._on_trials = 0.0

    def saw(self, given: int, accepted: int) -> None:
        """Of one sequence in one step."""
        self.given, self.accepted = self.given + given, self.accepted + accepted
        for held in [True] * accepted + [False] * (accepted < given):
            self.chance += _SLOWLY * (held - self.chance)

    def timed_at_start(self, rows: int, plain: float, drafted: float) -> None:
        """How long steps took without requests, seconds: what counts until both kinds have been seen in service."""
        self._at_start[rows] = plain, drafted

    def timed(self, rows: int, seconds: float, *, drafts: bool) -> None:
        """How long a step of `rows` decoding sequences took."""
        self._elapsed += seconds
        before = self._seconds.get((drafts, rows), seconds)
        self._seconds[drafts, rows] = before + _QUICKLY * (seconds - before)

    def pays(self, rows: int) -> bool:
        """For `rows` sequences decoding together; yes, as long as nothing is known."""
        if not self.most:
            return False
        plain, drafted = self._seconds_of(rows)
        return plain * sum(self.chance**i for i in range(self.most + 1)) > _MARGIN * drafted

    def _seconds_of(self, rows: int) -> tuple[float, float]:
        """Of a step without drafts and one with them; as if they cost nothing, as long as nothing is known."""
        plain, drafted = (self._seconds.get((drafts, rows)) for drafts in (False, True))
        if plain is None or drafted is None:
            return self._at_start.get(rows, (1.0, 0.0))
        return plain, drafted

    def begins_with_drafts(self, rows: int) -> bool:
        """Whether a sequence that comes to `rows - 1` others is to begin with drafts: they pay, or it is time for a
        trial, in which all `rows` take the longer steps."""
        if self.pays(rows):
            return True
        plain, drafted = self._seconds_of(rows)
        cost = FAIR_TRIAL * max(drafted - plain, 0.0)
        if not self.most or self._on_trials + cost > _SHARE_OF_TRIALS * self._elapsed:
            return False
        self._on_trials += cost
        return True

    @property
    def worth_reading(self) -> int:
        """Drafts that have a fair chance."""
        if self.chance >= 1:
            return self.most
        return max(1, min(self.most, int(math.log(_LEAST_CHANCE) / math.log(max(self.chance, 1e-3)))))
