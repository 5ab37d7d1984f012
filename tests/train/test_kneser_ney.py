"""The trigram that scripts/prove_recipe.py compares with."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from kneser_ney import KneserNey


def test_by_hand():
    """Document 0 1 0 1 2 of three ids: with the two tokens S before it five trigrams, each seen once.

    S S 0, S 0 1, 0 1 0, 1 0 1, 0 1 2. Different bigrams: S 0, 0 1 (after S and after 1: twice), 1 0, 1 2. Discounts:
    of trigrams five are seen once, none twice: 1/2; of bigrams three once, one twice: 3/5; of words 0 is seen after S
    and 1, the others after one: two once, one twice: 1/2.
    """
    model = KneserNey([np.array([0, 1, 0, 1, 2])], 3)
    half, third = Fraction(1, 2), Fraction(1, 3)
    # words: 0 in two contexts, 1 and 2 in one each, of four; three words give 1/2 away each
    share = half * 3 / 4
    one, zero = (1 - half) / 4 + share * third, (2 - half) / 4 + share * third
    # after 1: 0 and 2, once each; the discount 3/5 of two words
    given_1 = {0: (1 - Fraction(3, 5)) / 2 + Fraction(3, 5) * zero, 1: Fraction(3, 5) * one}
    # after 0 1: 0 and 2, once each; discount 1/2
    want_0 = (1 - half) / 2 + half * given_1[0]
    want_1 = half * given_1[1]
    got = (
        np.exp(model.log_probabilities(np.array([0, 1, 0])))[2],
        np.exp(model.log_probabilities(np.array([0, 1, 1])))[2],
    )
    np.testing.assert_allclose(got, [float(want_0), float(want_1)], rtol=1e-12)
    # the context 2 2 was never seen, and neither was 2: only words remain
    np.testing.assert_allclose(np.exp(model.log_probabilities(np.array([2, 2, 1])))[2], float(one), rtol=1e-12)


@pytest.mark.parametrize("context", [[0, 1], [3, 3], [], [4]])
def test_probabilities_add_up(context):
    rng = np.random.default_rng(0)
    model = KneserNey([rng.integers(0, 6, 40) for _ in range(5)], 7)
    total = sum(np.exp(model.log_probabilities(np.array([*context, word]))[-1]) for word in range(7))
    assert total == pytest.approx(1, rel=1e-12)


def test_it_learns_what_follows_what():
    rng = np.random.default_rng(0)
    documents = [np.cumsum(rng.integers(1, 3, 200)) % 50 for _ in range(20)]
    model = KneserNey(documents[:-1], 50)
    bits = -model.log_probabilities(documents[-1]).mean() / np.log(2)
    assert 1 <= bits < 1.5, "one of two continuations each time"
