"""Sampling against a plain float64 reference that sorts; its distribution; what a draw depends on."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.errors import UserError
from glm45_jax.infer import TokenCounts, sample, sampling_params
from glm45_jax.infer.sampling import _gumbel, adjust_logits, count_prompt, filter_logits, likeliest_token

V = 50
_sample, _adjust, _filter = jax.jit(sample), jax.jit(adjust_logits), jax.jit(filter_logits)


# --- the reference ---------------------------------------------------------------------------------------------------


def reference_adjust(logits, o, in_prompt, in_answer, vocab_size):
    x = np.array(logits, np.float64)
    for token in range(len(x)):
        if in_prompt[token] or in_answer[token]:
            penalty = o.get("repetition_penalty", 1.0)
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        if in_answer[token]:
            x[token] -= o.get("presence_penalty", 0.0) + o.get("frequency_penalty", 0.0) * in_answer[token]
        x[token] += (o.get("logit_bias") or {}).get(token, 0.0)
    x[vocab_size:] = -np.inf
    return x


def reference_probabilities(adjusted, o):
    """Of each token to be drawn; temperature above 0."""
    p = np.exp((adjusted - adjusted.max()) / o["temperature"])
    if k := o.get("top_k", 0):
        p[p < np.sort(p)[::-1][min(k, len(p)) - 1]] = 0
    p /= p.sum()
    if o.get("top_p", 1.0) < 1:
        order = np.argsort(-p, kind="stable")
        needed = np.searchsorted(np.cumsum(p[order]), o["top_p"]) + 1
        p[p < p[order[min(needed, len(p)) - 1]]] = 0
    p[p < o.get("min_p", 0.0) * p.max()] = 0
    return p / p.sum()


def probabilities(logits, params, counts, vocab_size):
    kept = _filter(_adjust(logits, params, counts, vocab_size), params)
    return np.asarray(jax.nn.softmax(kept.astype(jnp.float32), axis=-1))


def batch_of(rows, vocab=V, seed=0):
    """One batch with the settings of `rows`, its logits, and counts of tokens in prompts and answers."""
    names = {name for row in rows for name in row}
    neutral = {"top_p": 1.0, "repetition_penalty": 1.0, "logit_bias": None}
    options = {name: [row.get(name, neutral.get(name, 0)) for row in rows] for name in names}
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((len(rows), vocab))).astype(np.float32)
    in_prompt = rng.random((len(rows), vocab)) < 0.2
    in_answer = rng.poisson(0.3, (len(rows), vocab)).astype(np.int32)
    return logits, sampling_params(len(rows), vocab, options=options), TokenCounts(in_prompt, in_answer)  # type: ignore


# --- against the reference -------------------------------------------------------------------------------------------

MIX = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 12, "top_p": 0.6, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "repetition_penalty": 1.7},
    {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": -0.4, "repetition_penalty": 0.8},
    {"temperature": 1.0, "logit_bias": {3: 4.0, 7: -math.inf, 49: 50.0}},
    {"temperature": 0.0, "top_k": 3, "frequency_penalty": 2.0, "logit_bias": {1: -2.5}},
]


def test_every_option_in_one_batch_equals_the_reference() -> None:
    logits, params, counts = batch_of(MIX)
    real = 45
    adjusted, p = np.asarray(_adjust(logits, params, counts, real)), probabilities(logits, params, counts, real)
    for row, o in enumerate(MIX):
        expected = reference_adjust(logits[row], o, counts.in_prompt[row], counts.in_answer[row], real)
        np.testing.assert_allclose(adjusted[row], expected, rtol=1e-5, atol=1e-5)
        if o["temperature"]:
            np.testing.assert_allclose(p[row], reference_probabilities(expected, o), rtol=2e-4, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, V + 3),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_keep_the_same_tokens_as_the_reference(seed, temperature, top_k, top_p, min_p) -> None:
    o = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits, params, _ = batch_of([o], seed=seed)
    p = probabilities(logits, params, None, V)[0]
    # the reference with limits moved by a rounding error: between the two, the number of tokens kept is open
    x = reference_adjust(logits[0], {}, np.zeros(V), np.zeros(V), V)
    fewer = reference_probabilities(x, o | {"top_p": top_p * (1 - 1e-5), "min_p": min(min_p * (1 + 1e-5), 1)})
    more = reference_probabilities(x, o | {"top_p": min(top_p * (1 + 1e-5), 1), "min_p": min_p * (1 - 1e-5)})
    assert set(np.flatnonzero(fewer)) <= set(np.flatnonzero(p)) <= set(np.flatnonzero(more))


def test_tokens_equal_to_the_last_one_kept_are_kept() -> None:
    logits = np.array([[1.0, 2.0, 1.0, 0.0, -0.0, 2.0]], np.float32)
    for k, kept in ((1, {1, 5}), (3, {0, 1, 2, 5}), (5, {0, 1, 2, 3, 4, 5})):
        params = sampling_params(1, 6, options={"temperature": 1.0, "top_k": k})
        assert set(np.flatnonzero(np.isfinite(filter_logits(logits, params)[0]))) == kept


def test_settings_of_a_row_are_its_own() -> None:
    logits, params, counts = batch_of(MIX)
    together = probabilities(logits, params, counts, V)
    for row, o in enumerate(MIX):
        _, alone, _ = batch_of([o])
        own = TokenCounts(counts.in_prompt[row : row + 1], counts.in_answer[row : row + 1])
        np.testing.assert_allclose(
            probabilities(logits[row : row + 1], alone, own, V)[0], together[row], rtol=1e-5, atol=1e-9
        )


def test_greedy_takes_the_largest_adjusted_logit() -> None:
    logits, params, counts = batch_of([{"temperature": 0.0, "repetition_penalty": 3.0, "logit_bias": {7: 5.0}}] * 4)
    tokens, _ = _sample(logits, params, np.arange(4), counts, V)
    assert (np.asarray(tokens) == np.asarray(_adjust(logits, params, counts, V)).argmax(-1)).all()
    assert (np.asarray(tokens) != logits.argmax(-1)).any()


@pytest.mark.parametrize("size", [50, 128, 384])
def test_the_first_of_the_largest(size) -> None:
    """As `argmax`, of ties and infinities; a place in the row where there are no numbers."""
    rows = np.random.default_rng(0).integers(-3, 3, (64, size)).astype(np.float32)
    rows[1], rows[2], rows[3, 20:] = -np.inf, 0, np.inf
    np.testing.assert_array_equal(jax.jit(likeliest_token)(rows), np.argmax(rows, -1))
    rows[:, 1::7] = np.nan
    found = np.asarray(jax.jit(likeliest_token)(rows))
    assert ((found >= 0) & (found < size)).all()


def test_padded_rows_are_never_chosen() -> None:
    logits = np.zeros((2, V), np.float32)
    logits[:, 40:] = 30.0
    params = sampling_params(2, V, options={"temperature": [0.0, 5.0], "logit_bias": {41: 100.0}})
    for position in range(50):
        tokens, _ = _sample(logits, params, np.full(2, position), None, 40)
        assert (np.asarray(tokens) < 40).all()


def test_logprobs_are_of_the_untempered_model() -> None:
    rows = [{"temperature": 0.0}, {"temperature": 0.3, "top_k": 2}, {"temperature": 3.0, "logit_bias": {5: 9.0}}]
    logits, params, counts = batch_of(rows)
    tokens, logprobs = _sample(logits, params, np.arange(3), counts, V)
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected[np.arange(3), np.asarray(tokens)], rtol=1e-5, atol=1e-5)


def test_counts() -> None:
    counts = count_prompt(np.array([[3, 3, 9], [1, 9, 9]]), np.array([[1, 1, 1], [1, 0, 0]], bool), 10)
    counts = counts.add(jnp.array([4, 5])).add(jnp.array([4, 6]))
    assert [set(np.flatnonzero(row)) for row in np.asarray(counts.in_prompt)] == [{3, 9}, {1}]
    answer = np.asarray(counts.in_answer)
    assert answer[0, 4] == 2 and answer[1, 5] == 1 and answer[1, 6] == 1 and answer.sum() == 4


def test_penalties_apply_before_the_first_token_of_an_answer() -> None:
    """Of the prompt the repetition penalty alone takes note."""
    counts = count_prompt(np.array([[2]]), np.ones((1, 1), bool), 4)
    logits = np.ones((1, 4), np.float32)
    repetition = sampling_params(1, 4, options={"repetition_penalty": 2.0})
    others = sampling_params(1, 4, options={"presence_penalty": 2.0, "frequency_penalty": 2.0})
    assert adjust_logits(logits, repetition, counts)[0].tolist() == [1, 1, 0.5, 1]
    assert adjust_logits(logits, others, counts)[0].tolist() == [1, 1, 1, 1]


# --- the draw --------------------------------------------------------------------------------------------------------


def draws(logits, options, count, positions=None):
    """`count` draws from the same logits, one per seed (or position)."""
    params = sampling_params(count, logits.shape[-1], options=options)
    positions = np.full(count, 11) if positions is None else positions
    return np.asarray(_sample(np.broadcast_to(logits, (count, logits.shape[-1])), params, positions)[0])


@pytest.mark.few(3)
@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize("o", MIX[:5])
def test_draws_follow_the_distribution(o, vary) -> None:
    """A chi-squared test; seeds are fixed, so it always passes or always fails."""
    count = 20000
    logits = batch_of([o], vocab=20, seed=5)[0]
    options = dict(o, seed=[7] * count if vary == "position" else 1)
    tokens = draws(logits, options, count, np.arange(count) if vary == "position" else None)
    p = reference_probabilities(reference_adjust(logits[0], {}, np.zeros(20), np.zeros(20), 20), o)
    seen = np.bincount(tokens, minlength=20)
    assert not seen[p == 0].any()
    often = p * count >= 5
    chi2 = (((seen - p * count) ** 2) / (p * count + 1e-300))[often].sum()
    freedom = max(often.sum() - 1, 1)
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_noise_is_fine_in_its_upper_tail() -> None:
    """There the unlikely tokens of a large vocabulary are decided."""
    size = 1 << 22
    noise = np.sort(np.asarray(jax.jit(_gumbel, static_argnums=2)(np.uint32(1), 1, size)))
    assert np.isfinite(noise).all()
    for level in (0.0, 3.0, 7.0):
        expected = size * -math.expm1(-math.exp(-level))
        assert abs((noise > level).sum() - expected) < 5 * math.sqrt(expected)
    assert len(np.unique(noise[-1000:])) > 950


@pytest.mark.slow
def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = batch_of([{}], seed=3)[0]
    one = [draws(logits, {"temperature": 1.0, "seed": s}, 1, np.array([p]))[0] for s, p in ((4, 9), (5, 9), (4, 10))]
    many = draws(logits, {"temperature": [1.0] * 5, "seed": [9, 4, 5, 1, 4]}, 5, np.array([9, 9, 9, 3, 10]))
    assert many[[1, 2, 4]].tolist() == one
    over_positions = draws(logits, {"temperature": 9.0, "seed": [4] * 64}, 64, np.arange(64))
    assert len(set(over_positions.tolist())) > 5


def test_tiny_temperatures_are_numbers() -> None:
    logits = batch_of([{}])[0]
    for temperature in (1e-3, 1e-12, 1e-38, 1e-45):
        assert draws(logits, {"temperature": temperature}, 3).tolist() == [logits.argmax()] * 3


def test_an_int_seed_gives_each_sequence_its_own() -> None:
    assert sampling_params(3, V, options={"seed": 2**32 - 2}).seed.tolist() == [2**32 - 2, 2**32 - 1, 0]
    assert sampling_params(2, V, rows=4, options={"seed": [5, 5]}).seed.tolist() == [5, 5, 0, 0]


def test_nothing_is_sorted() -> None:
    """Sorting 151552 logits costs more than a small model's whole step."""
    text = _sample.lower(*batch_of(MIX)[:2], np.arange(len(MIX))).as_text()
    assert "stablehlo.sort" not in text and "top_k" not in text


# --- bad settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": [0.1]}, "temperature has 1 values for 2 prompts"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.2}, "top_p is 1.2"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"logit_bias": {V: 1.0}}, "logit_bias is for token 50"),
        ({"logit_bias": {1: math.inf}}, "logit_bias of token 1 is inf"),
        ({"logit_bias": [{1: 1.0}]}, "logit_bias has 1 values"),
        ({"topk": 3}, "unknown sampling option 'topk'"),
    ],
)
def test_bad_settings_are_named(options, said) -> None:
    with pytest.raises(UserError, match=said):
        sampling_params(2, V, options=options)
