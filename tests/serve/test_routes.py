"""Completions, tokens, models, health and metrics."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.support import COMPLETIONS, HELLO, ask, chat, events, refusal


def test_completions_continue_a_prompt(app, engine, tokenizer) -> None:
    body = {"prompt": "the cat", "max_tokens": 9, "temperature": 0, "logprobs": 0}
    found = ask(app, COMPLETIONS, body).json()
    wanted = engine.submit(tokenizer.encode("the cat"), 9).result(60)
    (choice,) = found["choices"]
    assert found["object"] == "text_completion" and choice["text"] == wanted.text
    kept = [token for token in wanted.answer if token not in tokenizer.eos_ids]
    assert choice["logprobs"]["tokens"] == [tokenizer.decode([token]) for token in kept]
    assert choice["logprobs"]["text_offset"][0] == 0 and choice["finish_reason"] == wanted.finish_reason
    chunks = events(app, COMPLETIONS, **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted.text
    assert chunks[-1]["choices"][0]["finish_reason"] == wanted.finish_reason
    tokens = tokenizer.encode("the cat")
    assert ask(app, COMPLETIONS, {**body, "prompt": tokens}).json()["choices"][0]["text"] == wanted.text


@pytest.mark.slow
def test_several_prompts_have_their_answers_in_order(app) -> None:
    settings = {"max_tokens": 5, "temperature": 0}
    one = [ask(app, COMPLETIONS, {"prompt": p, **settings}).json()["choices"][0]["text"] for p in ("the", "a dog")]
    found = ask(app, COMPLETIONS, {"prompt": ["the", "a dog"], "n": 2, **settings}).json()
    assert [c["index"] for c in found["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in found["choices"]] == [one[0], one[0], one[1], one[1]]
    assert ask(app, COMPLETIONS, {"prompt": "the"}).json()["usage"]["completion_tokens"] <= 16


def test_an_answer_may_go_on_past_its_end(app, tokenizer) -> None:
    end = {str(tokenizer.eos_ids[0]): 100}
    body = {"prompt": "the", "max_tokens": 3, "logit_bias": end, "logprobs": 0}
    ended = ask(app, COMPLETIONS, body).json()
    assert (ended["usage"]["completion_tokens"], ended["choices"][0]["finish_reason"]) == (1, "stop")
    assert ended["choices"][0]["text"] == "" and ended["choices"][0]["logprobs"] is None
    assert ask(app, COMPLETIONS, {**body, "ignore_eos": True}).json()["usage"]["completion_tokens"] == 3


def test_tokens_there_and_back(app, tokenizer) -> None:
    text = "the cat 猫"
    found = ask(app, "/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode(text) and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 2048 and found["token_strs"][0] == "the"
    assert ask(app, "/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    assert ask(app, "/tokenize", {"messages": HELLO}).json()["tokens"] == tokenizer.encode_chat(HELLO)
    assert refusal(app, "/detokenize", {"tokens": [1, "2"]})["param"] == "tokens"
    assert refusal(app, "/tokenize", {"prompt": 5})["param"] == "prompt"


def test_models_and_health(app) -> None:
    (card,) = ask(app, "/v1/models").json()["data"]
    assert card["id"] == "small" and ask(app, "/v1/models/small").json() == card
    assert refusal(app, "/v1/models/other", None, 404)["code"] == "model_not_found"
    assert ask(app, "/health").json() == {"status": "ok"} and ask(app, "/ready").status_code == 200
    assert refusal(app, "/nothing", None, 404)["message"] == "there is no such route"
    assert refusal(app, COMPLETIONS, None, 405)["message"]


def metrics(app) -> dict[tuple[str, ...], float]:
    found = {}
    for family in text_string_to_metric_families(ask(app, "/metrics").text):
        for sample in family.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    return found


def test_metrics_count(app) -> None:
    before = metrics(app)
    usage = chat(app, max_tokens=6)["usage"]
    events(app, max_tokens=6)
    refusal(app, COMPLETIONS, {})
    after = metrics(app)
    grown = lambda *key: after[key] - before.get(key, 0)  # noqa: E731
    assert grown("glm45_requests_total", "/v1/chat/completions", "200") == 2
    assert grown("glm45_requests_total", "/v1/completions", "400") == 1
    assert grown("glm45_prompt_tokens_total") == 2 * usage["prompt_tokens"]
    assert grown("glm45_generated_tokens_total") >= usage["completion_tokens"]
    assert grown("glm45_time_to_first_token_seconds_count") == 2
    assert after["glm45_pages",] > 0 and after["glm45_answers_on_their_way",] == 0
    for name in ("running", "waiting", "pages_in_use", "drafts_given_total", "prefix_tokens_found_total"):
        assert (f"glm45_{name}",) in after
    ask(app, "/x" * 50)
    assert not any(re.search("/x/x", label) for key in metrics(app) for label in key)
