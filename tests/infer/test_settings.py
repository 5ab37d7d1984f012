"""The settings of a step's rows, which are kept from one step to the next while its requests are the same."""

from __future__ import annotations

import numpy as np

from glm45_jax.infer import Request
from glm45_jax.infer.sampling import sampling_params
from glm45_jax.infer.schedule import Sequence
from glm45_jax.infer.settings import MOST_BIASES, Settings

VOCAB = 50


def request(**options) -> Request:
    return Request(Sequence(1, [1], 9), sampling_params(1, VOCAB, None, options), frozenset(), None, lambda _: None)


def biases(sampling, row: int) -> dict[int, float]:
    return {int(i): float(v) for i, v in zip(sampling.bias_ids[row], sampling.bias_values[row]) if i < VOCAB}


def test_each_row_has_its_own_requests_settings():
    """In another order, with one more, or in a wider step, nothing of the step before is left."""
    settings = Settings(VOCAB)
    cold, warm = request(temperature=0.0, seed=3), request(temperature=0.7, top_k=5, seed=4)
    biased = request(temperature=0.2, logit_bias={7: -100.0, 9: 2.0})
    try:
        steps = ([cold, warm], 2), ([warm, cold], 2), ([warm, cold], 4), ([warm], 4), ([warm, biased], 4), ([cold], 2)
        for requests, rows in steps:
            kind = settings.kind(requests)
            found = settings.sampling(requests, rows, kind)
            assert settings.sampling(requests, rows, kind) is found, "the same requests: kept"
            for row in range(rows):
                want = requests[row].sampling if row < len(requests) else sampling_params(1, VOCAB)
                assert found.temperature[row] == want.temperature[0] and found.top_k[row] == want.top_k[0]
                assert biases(found, row) == biases(want, 0)
            assert found.bias_ids.shape == (rows, MOST_BIASES if kind == "all" else 0)
            assert np.asarray(found.seed).shape == (rows,)
    finally:
        settings.close()


def test_what_a_step_needs():
    plain, biased, penalised = request(), request(logit_bias={1: 1.0}), request(presence_penalty=0.5)
    assert Settings.kind([plain]) == "plain"
    assert Settings.kind([plain, biased]) == Settings.kind([penalised]) == "all"
