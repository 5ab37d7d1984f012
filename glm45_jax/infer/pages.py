"""Pages of the cache: which sequences have them, and which beginnings of texts they hold.

A sequence takes pages as it grows. A full page is known by a digest of its tokens and of all before them, so that a
later sequence with the same beginning shares it. A page that no sequence has is free, or still holds a beginning: these
are given away when no free one is left, what was unused for longest first.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


class Pages:
    """The pages 0 to `count` - 1, each of `page_size` tokens.

    Args:
      shared: whether beginnings are remembered at all.

    Attributes:
      hits, asked: tokens of prompts that were found in pages, and all that were looked for.
    """

    def __init__(self, count: int, page_size: int, shared: bool = True):
        self.count, self.page_size, self._shared = count, page_size, shared
        self.hits = self.asked = 0
        self._users = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # known, of no sequence
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """How many can be taken."""
        return len(self._free) + len(self._idle)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning; they are the caller's too from now on."""
        found: list[int] = []
        for digest in digests:
            if digest not in self._page_of:
                break
            found.append(self._page_of[digest])
        for page in found:
            self._users[page] += 1
            self._idle.pop(page, None)
        self.hits += len(found) * self.page_size
        self.asked += len(digests) * self.page_size
        return found

    def take(self, count: int) -> list[int] | None:
        """Pages for new tokens; None, and none taken, where there are not as many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._forget(next(iter(self._idle)))
            self._users[page] = 1
            taken.append(page)
        return taken

    def know(self, page: int, digest: bytes) -> None:
        """A page of the caller's is full. Where another one holds the same, that one stays the known one."""
        if self._shared and digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def release(self, pages: Iterable[int]) -> None:
        """Gives back a sequence's pages, in its order: of a beginning the end is forgotten first."""
        for page in reversed([*pages]):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget_all(self) -> None:
        """Pages hold nothing that can be found any more, those in use included: what wrote them has changed."""
        while self._idle:
            self._free.append(self._forget(next(iter(self._idle))))
        self._page_of.clear()
        self._digest_of.clear()

    def _forget(self, page: int) -> int:
        del self._idle[page], self._page_of[self._digest_of.pop(page)]
        return page


def digests_of(tokens: Sequence[int], page_size: int, before: Sequence[bytes] = (), salt: bytes = b"") -> list[bytes]:
    """One of each full page; `before` are those that are known already, others of another `salt`."""
    digests = [*before]
    for at in range(len(digests) * page_size, len(tokens) - page_size + 1, page_size):
        page = np.asarray(tokens[at : at + page_size], np.int32).tobytes()
        digests.append(hashlib.blake2b((digests[-1] if digests else salt) + page, digest_size=16).digest())
    return digests
