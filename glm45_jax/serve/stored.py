"""Answers that clients asked to be kept, in memory alone, and never more than was allowed."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
from typing import Any

from glm45_jax.serve.options import MAX_STORED


@dataclasses.dataclass(frozen=True)
class Stored:
    """An answer as its client saw it, and the conversation with it as chat messages."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]


class Store:
    """The answers used last, by their ids. Safe to use from several threads."""

    def __init__(self, most_bytes: int):
        self._most_bytes, self._bytes = most_bytes, 0
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[str, tuple[int, Stored]] = collections.OrderedDict()

    def get(self, identity: str) -> Stored | None:
        with self._lock:
            if identity not in self._kept:
                return None
            self._kept.move_to_end(identity)
            return self._kept[identity][1]

    def put(self, identity: str, stored: Stored) -> bool:
        """Keeps an answer, and drops those that were not used for longest where there is no room.

        Returns:
          Whether it is kept: one that is larger than all the room is not.
        """
        size = len(json.dumps(stored.response)) + len(json.dumps(stored.messages))
        with self._lock:
            self._kept[identity] = size, stored
            self._bytes += size
            while self._bytes > self._most_bytes or len(self._kept) > MAX_STORED:
                _, (freed, _) = self._kept.popitem(last=False)
                self._bytes -= freed
            return identity in self._kept

    def drop(self, identity: str) -> bool:
        """Whether it was there."""
        with self._lock:
            size, found = self._kept.pop(identity, (0, None))
            self._bytes -= size
            return found is not None
