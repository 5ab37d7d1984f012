"""The short form of scripts/prove_same.py: the same greedy tokens, however requests are served."""

from __future__ import annotations

import numpy as np
import prove_same
import pytest

from tests.support import QUICK_FLAGS

REQUESTS = 14
WAYS = {run.name: run for run in prove_same.runs(1, 106)}
SHORT = ("random arrival 0", "3 drafts, little cache")
MESH = "8 devices: expert 4, tensor 2"


@pytest.fixture(scope="module")
def reference():
    config, params, tokenizer = prove_same.model(None)
    asks = prove_same.asks_of(REQUESTS, tokenizer.vocab_size)
    first = next(iter(WAYS.values()))
    return config, params, tokenizer, asks, prove_same.serve(first, params, config, tokenizer, asks)["answers"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHORT, MESH])
def test_the_same_tokens(reference, monkeypatch, name):
    config, params, tokenizer, asks, want = reference
    run = WAYS[name]
    if run.mesh:
        monkeypatch.setenv("XLA_FLAGS", QUICK_FLAGS)
        found = prove_same.serve_on_mesh(run, prove_same.Options(requests=REQUESTS, seeds=1))
    else:
        found = prove_same.serve(run, params, config, tokenizer, asks)
    line = prove_same.judged(run, found, want, asks, prove_same.forward_logits(params, config))
    assert line["wrong"] == 0, line
    assert line["same"] + line["different_at_a_near_tie"] == REQUESTS


def test_a_difference_is_found():
    asks = [prove_same.Ask([1, 2], 3, None)] * 4
    logits = np.array([0.0, 1.0, 1.00005, 3.0])
    read = []

    def logits_of(tokens):
        read.append(tokens)
        return logits

    want, got = [[1, 2, 3], [1, 2, 3], [1, 1], [1]], [[1, 2, 3], [1, 3, 3], [2, 1], [1, 2]]
    near = np.abs(logits[1] - logits[2])
    assert prove_same.differences(want, got, asks, logits_of) == [
        {"request": 1, "place": 1, "gap": 3.0 - logits[2]},
        {"request": 2, "place": 0, "gap": pytest.approx(near)},
        {"request": 3, "place": 1, "gap": None},
    ]
    assert read == [[1, 2, 1], [1, 2]]
    found = {"answers": got, "stats": dict.fromkeys(
        ("steps", "preempted", "prefix_tokens_found", "drafts_given", "drafts_accepted"), 0
    )}  # fmt: skip
    line = prove_same.judged(prove_same.Run("x"), found, want, asks, logits_of)
    assert (line["same"], line["wrong"], line["different_at_a_near_tie"]) == (1, 2, 1)
