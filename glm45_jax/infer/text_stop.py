"""`StoppableText`: an answer's text as its tokens come, cut where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence

from glm45_jax.errors import UserError
from glm45_jax.text import Tokenizer


class StoppableText:
    """Push the tokens of one answer; get the text that is certain to stay.

    What may be the beginning of a stop string waits until it is or is not. Where several stop strings occur the one
    that ends first counts, so that the result does not depend on how the text falls into tokens.

    Attributes:
      text: all that was handed out.
      stopped: a stop string has occurred; nothing more comes.
      stop_string: which one.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self._stream = tokenizer.stream()
        self._stop_strings = tuple(stop_strings)
        self._waiting = ""
        self.text = ""
        self.stopped = False
        self.stop_string: str | None = None

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        return "" if self.stopped else self._take(self._stream.push(token))

    def finish(self) -> str:
        """What still waited when the tokens ended."""
        if self.stopped:
            return ""
        piece = self._take(self._stream.finish())
        rest, self._waiting = self._waiting, ""
        self.text += rest
        return piece + rest

    def _take(self, piece: str) -> str:
        waiting = self._waiting + piece
        found = [(at + len(stop), at, stop) for stop in self._stop_strings if (at := waiting.find(stop)) >= 0]
        self.stopped, self.stop_string = bool(found), min(found)[2] if found else None
        keep = min(found)[1] if found else len(waiting) - self._possible_beginning(waiting)
        self._waiting = "" if found else waiting[keep:]
        self.text += waiting[:keep]
        return waiting[:keep]

    def _possible_beginning(self, text: str) -> int:
        """Characters at the end of `text` that a stop string may begin with."""
        longest = max(map(len, self._stop_strings), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop_strings):
                return size
        return 0


def check_stop_strings(stop_strings: str | Sequence[str] | None) -> tuple[str, ...]:
    """A string or several as a tuple. Raises `UserError` for an empty one or another type."""
    found = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
    for stop in found:
        if not isinstance(stop, str) or not stop:
            raise UserError(f"stop_strings holds {stop!r}; each must be a string that is not empty")
    return found
