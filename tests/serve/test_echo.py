"""Prompts with their log-probabilities, as those who compare likelihoods ask for them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.errors import UserError
from tests.serve.support import COMPLETIONS, ask, events

TEXT = "the cat sat on the mat and ran"


@pytest.fixture(scope="module")
def wanted(engine):
    """Log-probabilities of every token of the vocabulary behind each of the text's, by `forward`."""
    tokens = engine.tokenizer.encode(TEXT)
    logits = glm.forward(engine._programs.params, engine.config, np.asarray([tokens], np.int32)).logits[0]
    return tokens, np.asarray(jax.nn.log_softmax(logits, axis=-1))


def complete(app, **fields):
    response = ask(app, COMPLETIONS, {"prompt": TEXT, "temperature": 0, "echo": True, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_prompt_alone(app, engine, wanted):
    tokens, all_logprobs = wanted
    before = engine.stats()
    answer = complete(app, max_tokens=0, logprobs=3)
    (choice,) = answer["choices"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(tokens) and answer["usage"]["completion_tokens"] == 0
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == TEXT
    assert [TEXT[at : at + len(t)] for at, t in zip(found["text_offset"], found["tokens"])] == found["tokens"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    own = [all_logprobs[i, t] for i, t in enumerate(tokens[1:])]
    np.testing.assert_allclose(found["token_logprobs"][1:], own, atol=1e-4)
    for place, row in zip(found["top_logprobs"][1:], all_logprobs):
        values = sorted(place.values(), reverse=True)
        assert 2 <= len(values) <= 4
        np.testing.assert_allclose(values[:2], np.sort(row[:330])[::-1][:2], atol=1e-4)
    after = engine.stats()
    assert all(before[name] == after[name] for name in ("steps", "compiled_in_service"))


@pytest.mark.slow
def test_a_prompt_and_what_follows(app, wanted):
    tokens, _ = wanted
    plain = complete(app, max_tokens=3, logprobs=1, echo=False)["choices"][0]
    found = complete(app, max_tokens=3, logprobs=1)["choices"][0]
    assert found["text"] == TEXT + plain["text"]
    assert len(found["logprobs"]["tokens"]) == len(tokens) + 3
    assert found["logprobs"]["token_logprobs"][len(tokens) :] == plain["logprobs"]["token_logprobs"]
    assert found["logprobs"]["text_offset"][len(tokens)] == len(TEXT)
    without = complete(app, max_tokens=3)["choices"][0]
    assert without["text"] == found["text"] and without["logprobs"] is None


def test_the_token_that_ends_is_counted(app, engine):
    """Harnesses ask for one token and leave out the last."""
    bias = {str(token): 100 for token in engine.config.eos_token_id[:1]}
    (choice,) = complete(app, max_tokens=1, logprobs=1, logit_bias=bias)["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == TEXT
    assert len(choice["logprobs"]["tokens"]) == len(engine.tokenizer.encode(TEXT)) + 1


@pytest.mark.slow
def test_several_prompts_and_streams(app, wanted):
    prompts = [TEXT, "the", [5]]
    found = complete(app, prompt=prompts, n=2, max_tokens=1, logprobs=0, ignore_eos=True)["choices"]
    assert [choice["index"] for choice in found] == list(range(6))
    assert found[0]["text"].startswith(TEXT) and found[2]["text"].startswith("the")
    assert found[4]["logprobs"]["token_logprobs"][0] is None and len(found[4]["logprobs"]["tokens"]) == 2
    streamed = ["", ""]
    for event in events(app, COMPLETIONS, prompt=prompts[:2], echo=True, max_tokens=2, temperature=0, logprobs=1):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    whole = complete(app, prompt=prompts[:2], max_tokens=2, logprobs=1)["choices"]
    assert streamed == [choice["text"] for choice in whole]


def test_texts_that_cannot_be_scored(engine):
    for tokens, top, why in (([1], 0, "1 tokens"), ([1] * 5000, 0, "5000 tokens"), ([1, 2], 21, "top_logprobs")):
        with pytest.raises(UserError, match=why):
            engine.score(tokens, top)
