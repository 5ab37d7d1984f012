"""An interpolated Kneser-Ney trigram over tokens: what a language model has to beat to be one.

Each order gives away a discount of every count, and shares it among all words by the next lower order; lower orders
count in how many contexts a word has been seen, not how often (Kneser and Ney, 1995; interpolated as by Chen and
Goodman, 1999). Documents begin with two tokens that are never predicted. Counts are sorted arrays of integer keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class KneserNey:
    """P(w | u v) over ids 0..vocab_size-1."""

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int):
        self._base, self._vocab = vocab_size + 1, vocab_size
        u, v, w = (np.concatenate(column) for column in zip(*map(self._trigrams, documents)))
        self._trigram = _Order(self._key(u, v), w, np.ones(len(w)), self._base)
        contexts, last = np.divmod(self._trigram.keys, self._base)
        # each different trigram is one context in which its last two words, and its last, have been seen
        self._bigram = _Order(contexts % self._base, last, np.ones(len(last)), self._base)
        last = self._bigram.keys % self._base
        self._unigram = _Order(np.zeros_like(last), last, np.ones(len(last)), self._base)

    def log_probabilities(self, document: np.ndarray) -> np.ndarray:
        """Natural logarithms, of every token after the ones before it in the document."""
        u, v, w = self._trigrams(document)
        p = np.full(len(w), 1 / self._vocab)
        p = self._unigram.interpolate(np.zeros_like(w), w, p)
        p = self._bigram.interpolate(v, w, p)
        return np.log(self._trigram.interpolate(self._key(u, v), w, p))

    def _trigrams(self, document: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        padded = np.concatenate([[self._vocab, self._vocab], np.asarray(document, np.int64)])
        return padded[:-2], padded[1:-1], padded[2:]

    def _key(self, *columns: np.ndarray) -> np.ndarray:
        key = columns[0].astype(np.int64)
        for column in columns[1:]:
            key = key * self._base + column
        return key


class _Order:
    """Counts of words after contexts, and the discount of this order."""

    def __init__(self, context: np.ndarray, word: np.ndarray, count: np.ndarray, base: int):
        self._base = base
        self.keys, self._counts = _sums(context.astype(np.int64) * base + word, count)
        contexts = self.keys // base
        self._contexts, self._totals = _sums(contexts, self._counts)
        _, self._words = _sums(contexts, np.ones(len(contexts)))
        once, twice = (np.count_nonzero(self._counts == n) for n in (1, 2))
        self._discount = once / (once + 2 * twice) if once and twice else 0.5

    def interpolate(self, context: np.ndarray, word: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """The probability of `word` after `context`, given its probability in the next lower order."""
        count = _look_up(self.keys, self._counts, context * self._base + word)
        total = _look_up(self._contexts, self._totals, context)
        words = _look_up(self._contexts, self._words, context)
        seen = total > 0
        safe = np.where(seen, total, 1)
        return np.where(
            seen, np.maximum(count - self._discount, 0) / safe + self._discount * words / safe * lower, lower
        )


def _sums(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different keys in order, and the sum of each one's values."""
    unique, inverse = np.unique(keys, return_inverse=True)
    return unique, np.bincount(inverse, values)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values at `wanted`; 0 for keys that are not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)
