"""The paged step reads what the forward pass reads, however sequences are cut and mixed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.errors import UserError
from glm45_jax.model import Ragged, init_pages, mtp_paged_step, paged_step
from tests.support import quick_jit, random_params, small_config

PAGE, PAGES, ROWS, SPACE = 4, 40, 4, 24  # tokens of a page, pages, rows and tokens of a step
LENGTHS = (17, 5, 11, 1, 8)

main = quick_jit(paged_step, static_argnames="config", donate_argnames="pages")
mtp = quick_jit(mtp_paged_step, static_argnames="config", donate_argnames="pages")


@functools.cache
def model(**changes):
    config = small_config(num_nextn_predict_layers=1, **changes)
    params = random_params(config)
    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in LENGTHS]
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, sequence in zip(tokens, sequences):
        row[: len(sequence)] = sequence
    mask = (np.arange(tokens.shape[1]) < np.array(LENGTHS)[:, None]).astype(np.int32)
    run = quick_jit(lambda p, t, m: (glm.forward(p, config, t, attention_mask=m), glm.mtp_forward(p, config, t)))
    return config, params, sequences, jax.tree.map(np.asarray, run(params, tokens, mask))


def packed(parts, table):
    """A step's batch from (sequence number, tokens, first place)."""
    tokens, starts = np.zeros(SPACE, np.int32), np.zeros(ROWS + 1, np.int32)
    lengths, pages = np.zeros(ROWS, np.int32), np.full((ROWS, table.shape[1]), PAGES + 7, np.int32)
    at = 0
    for row, (number, new, first) in enumerate(parts):
        tokens[at : at + len(new)] = new
        at += len(new)
        lengths[row], pages[row], starts[row + 1 :] = first + len(new), table[number], at
    return Ragged(*map(jnp.asarray, (tokens, starts, lengths, pages, np.int32(len(parts)))))


def schedule(rng):
    """Steps of (sequence number, from, to): chunks and single tokens, in any order, of several sequences at once."""
    done = np.zeros(len(LENGTHS), int)
    while (done < LENGTHS).any():
        step, room = [], SPACE
        for number in rng.permutation(np.flatnonzero(done < LENGTHS))[: rng.integers(1, ROWS + 1)]:
            new = min(int(rng.choice([1, 1, 2, 3, 7, 16])), LENGTHS[number] - done[number], room)
            if new:
                step.append((int(number), int(done[number]), int(done[number] + new)))
                done[number], room = done[number] + new, room - new
        yield step


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_cuts_give_the_whole_sequences_logits_and_drafts(seed):
    config, params, sequences, (want, want_mtp) = model()
    rng = np.random.default_rng(seed)
    table = rng.permutation(PAGES)[: len(LENGTHS) * 5].reshape(len(LENGTHS), 5).astype(np.int32)
    pages = init_pages(config, PAGES, PAGE, "float32") + jnp.nan  # what no one wrote is never read
    for step in schedule(rng):
        batch = packed([(n, sequences[n][a:b], a) for n, a, b in step], table)
        logits, hidden, pages = main(params, config, pages, batch, jnp.arange(SPACE))
        following = packed([(n, np.append(sequences[n], 0)[a + 1 : b + 1], a) for n, a, b in step], table)
        drafts, _, pages = mtp(params, config, pages, following, hidden, jnp.arange(SPACE))
        at = 0
        for number, a, b in step:
            here = slice(at, at + b - a)
            np.testing.assert_allclose(logits[here], want.logits[number, a:b], atol=2e-4, rtol=2e-4)
            np.testing.assert_allclose(hidden[here], want.hidden[number, a:b], atol=2e-4, rtol=2e-4)
            known = min(b, LENGTHS[number] - 1) - a  # the last token has none after it
            np.testing.assert_allclose(
                drafts[at : at + known], want_mtp.logits[number, a : a + known], atol=2e-4, rtol=2e-4
            )
            at += b - a


@pytest.mark.slow
def test_drafts_in_a_chain():
    """The MTP layer's own hidden state in the hidden state's place, one token on, is a sequence that goes on so."""
    config, params, sequences, (want, _) = model()
    whole = quick_jit(lambda p, t, h: glm.mtp_forward(p, config, t, hidden=h))
    tokens, table = [int(t) for t in sequences[0][:10]], np.arange(5, dtype=np.int32)[None]
    hidden, pages = want.hidden[0, :9], init_pages(config, PAGES, PAGE, "float32")
    new, first = hidden, 0
    for _ in range(3):
        batch = packed([(0, tokens[first + 1 :], first)], table)
        padded = jnp.zeros((SPACE, config.hidden_size)).at[: len(new)].set(new)
        logits, own, pages = mtp(params, config, pages, batch, padded, jnp.array([len(new) - 1]))
        # its last token has none after it, and with that its hidden state does not matter
        want_mtp = whole(params, jnp.array([tokens]), jnp.append(hidden, hidden[:1], 0)[None])
        np.testing.assert_allclose(logits[0], want_mtp.logits[0, -1], atol=2e-4, rtol=2e-4)
        first, new = len(hidden), own[len(new) - 1 : len(new)]
        hidden, tokens = jnp.append(hidden, new, 0), [*tokens, int(jnp.argmax(logits[0]))]


def test_a_model_without_mtp():
    config = small_config(num_nextn_predict_layers=0)
    assert init_pages(config, 3, 4).shape[0] == config.num_hidden_layers
    with pytest.raises(UserError, match="no MTP layer"):
        mtp_paged_step({}, config, None, None, None, None)
