"""Constrained answers of the engine: what a model that knows nothing says is what the grammar and the budget allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.errors import UserError
from glm45_jax.infer import Engine, EngineClosed, EngineOptions, generate_detailed
from glm45_jax.infer.call_grammar import calls_source
from glm45_jax.infer.constraint import Constraint, Thought, ThoughtMasks
from glm45_jax.infer.grammar import Grammars, choice_source, json_source, regex_source
from glm45_jax.text import parse_output
from tests.support import quick_jit, random_params, small_config, small_tokenizer

TOKENIZER = small_tokenizer()
END_IDS = TOKENIZER.eos_ids
OPEN, CLOSE, CALL = (TOKENIZER.token_id(name) for name in ("<think>", "</think>", "<tool_call>"))
CONFIG = small_config(
    num_hidden_layers=2, vocab_size=384, max_position_embeddings=512, eos_token_id=END_IDS, num_nextn_predict_layers=1
)
GRAMMARS = Grammars(TOKENIZER, END_IDS)
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -50, "maximum": 500},
        "b": {"enum": ["x", "yy"]},
        "c": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
REGEX = GRAMMARS.compile(regex_source("[a-f]{3,12}(!|\\?){2}"))
JSON = GRAMMARS.compile(json_source(SCHEMA))
TOOLS = [{"name": "f", "parameters": SCHEMA, "strict": True}, {"name": "g"}]
CALLS = GRAMMARS.compile(calls_source(TOOLS, newlines=True))
# What is asked beside one another, each with a prompt of its own.
ASKED: list[dict[str, Any]] = [
    {"grammar": REGEX},
    {},
    {"grammar": JSON, "temperature": 1.0, "seed": 3},
    {"grammar": CALLS, "thought": "before", "thought_budget": 5, "temperature": 1.3, "seed": 4},
    {"thought": "inside", "thought_budget": 3},
    {"temperature": 0.8, "seed": 9},
    {"grammar": CALLS, "thought": "gap", "presence_penalty": 0.5},
    {"grammar": REGEX, "thought": "inside", "thought_budget": 0},
]


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CONFIG)


def make_engine(params: Any, **options: Any) -> Engine:
    sizes = {"slots": 2, "cache_tokens": 1024, "page_size": 4, "step_tokens": 16, "cache_dtype": "float32"}
    return Engine(params, CONFIG, tokenizer=TOKENIZER, options=EngineOptions(**sizes | {"warm_up": False} | options))


@pytest.fixture(scope="module")
def engine(params) -> Iterator[Engine]:
    with make_engine(params) as engine:
        yield engine
    assert engine.stats()["pages_in_use"] == engine.stats()["running"] == engine.stats()["waiting"] == 0


@pytest.fixture(scope="module")
def drafting(params) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm45_jax.infer.drafting.Drafting.begins", lambda self, rows, without: True)
        patch.setattr("glm45_jax.infer.drafting.Drafting.goes_on", lambda self, rows, drafting: True)
        with make_engine(params, drafts=2) as engine:
            yield engine
    assert engine.stats()["pages_in_use"] == 0


def prompt(index: int) -> list[int]:
    return TOKENIZER.encode(f"the cat {'sat on the mat ' * (index % 3)}{index}")


def answers(engine: Engine, asked: list[dict[str, Any]], most: int = 160) -> list[list[int]]:
    requests = [engine.submit(prompt(i), most, **how) for i, how in enumerate(asked)]
    return [request.result(120).answer for request in requests]


@pytest.fixture(scope="module")
def wanted(engine) -> list[list[int]]:
    return answers(engine, ASKED)


def check_budget(answer: list[int], thought: str, budget: int | None) -> list[int]:
    """The answer behind a thought of so many tokens at most, which it must have."""
    if thought == "before":
        assert OPEN in answer[:2]
        answer = answer[answer.index(OPEN) + 1 :]
    if thought in ("before", "inside"):
        assert CLOSE in answer and (budget is None or answer.index(CLOSE) <= budget)
        answer = answer[answer.index(CLOSE) + 1 :]
    return answer


def test_answers_keep_to_their_grammars(wanted) -> None:
    for answer, how in zip(wanted, ASKED):
        answer = check_budget(answer, how.get("thought", "after"), how.get("thought_budget"))
        text = TOKENIZER.decode([t for t in answer if t not in END_IDS])
        if how.get("grammar") is JSON:
            jsonschema.validate(json.loads(text), SCHEMA)
        if how.get("grammar") is CALLS:
            found = parse_output(text, TOOLS, thinking=False)
            assert found.tool_calls and found.content is None
            for call in found.tool_calls:
                jsonschema.validate(call.arguments, SCHEMA if call.name == "f" else {"type": "object"})
        if how.get("grammar") is REGEX:
            assert 5 <= len(text.strip()) <= 14 and text[-2:].strip("!?") == ""


@pytest.mark.slow
def test_the_largest_that_is_allowed_is_chosen(params, wanted) -> None:
    """Against whole forward passes, one for each token."""
    forward = quick_jit(lambda params, tokens: glm.forward(params, CONFIG, tokens))
    for i in (0, 7):
        tokens, matcher, matched = [*prompt(i)], REGEX.matcher(), i == 0
        for token in wanted[i]:
            padded = jnp.asarray(tokens + [0] * (64 - len(tokens)))[None]
            logits = np.array(jax.tree.leaves(forward(params, padded))[0][0, len(tokens) - 1])
            if matched:
                allowed = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[: len(logits)]
                allowed = np.pad(allowed, (0, len(logits) - len(allowed)))
                allowed[TOKENIZER.token_id("Ċ")] |= len(tokens) == len(prompt(i)) + 1 and i == 7
                assert int(np.argmax(np.where(allowed, logits, -np.inf))) == token
                assert matcher.take(token) or TOKENIZER.decode([token]) == "\n"
            matched = matched or token == CLOSE
            tokens.append(token)


@pytest.mark.slow
def test_neighbours_do_not_notice(params, wanted) -> None:
    for i in (1, 5):
        how = {**ASKED[i], "tokenizer": TOKENIZER}
        assert generate_detailed(params, CONFIG, [prompt(i)], 160, **how)[0].answer == wanted[i]


@pytest.mark.slow
def test_drafts_change_nothing(drafting, wanted) -> None:
    assert answers(drafting, ASKED) == wanted
    assert drafting.stats()["drafts_given"] > 100


@pytest.mark.slow
def test_drafts_that_the_grammar_allows_are_accepted(params) -> None:
    """A model that says "!" whatever it reads: drafts of it hold, up to where the grammar wants an end."""
    silent = {**params, "head": {"weight": params["head"]["weight"] * 0}}
    grammar = GRAMMARS.compile(regex_source("!{30}"))
    (bang,) = TOKENIZER.encode("!")
    assert bang == 0
    with make_engine(silent, slots=1, drafts=3) as engine:
        found = engine.submit(prompt(0), 60, grammar=grammar).result(60)
        stats = engine.stats()
    assert found.answer == [0] * 30 + [min(END_IDS)] and found.finish_reason == "stop"
    assert stats["drafts_accepted"] >= 20 and stats["steps"] <= 12


@pytest.mark.slow
def test_little_room_makes_constrained_answers_begin_anew(params, wanted) -> None:
    with make_engine(params, cache_tokens=200) as small:
        assert answers(small, ASKED) == wanted
        assert small.stats()["preempted"] > 0


@pytest.mark.slow
def test_nothing_is_compiled_in_service(params) -> None:
    with make_engine(params, drafts=1, warm_up=True) as engine:
        assert answers(engine, [{**how, "top_logprobs": i % 3} for i, how in enumerate(ASKED)], 40)
        assert engine.stats()["compiled_in_service"] == 0


@pytest.mark.parametrize("thought", ["inside", "before"])
@pytest.mark.parametrize("grammar", [None, JSON], ids=["free", "json"])
@pytest.mark.parametrize("kind", ["engine", pytest.param("drafting", marks=pytest.mark.slow)])
def test_budgets_are_kept_to_the_token(request, thought, grammar, kind) -> None:
    """A model that would never stop thinking: its end is banned until the budget is spent."""
    chosen = request.getfixturevalue(kind)
    how: dict[str, Any] = {"logit_bias": {CLOSE: -50.0, OPEN: 60.0 if thought == "before" else -50.0}, "seed": 1}
    for budget in (0, 1, 6):
        asked = chosen.submit(
            prompt(1), 60, grammar=grammar, thought=thought, thought_budget=budget, temperature=1.0, **how
        )
        answer = asked.result(60).answer
        begun = answer.index(OPEN) + 1 if thought == "before" else 0
        assert answer.index(CLOSE) - begun == budget


def test_a_thought_that_ends_by_itself_is_left_alone(engine) -> None:
    how: dict[str, Any] = {"thought": "inside", "stop_ids": [], "logit_bias": {CLOSE: 30.0}}
    found = [engine.submit(prompt(1), 20, thought_budget=b, **how).result(60).answer for b in (None, 10)]
    assert found[0] == found[1]


def test_an_end_comes_where_the_grammar_allows_it_and_there_alone(engine) -> None:
    grammar = GRAMMARS.compile(regex_source("[ab]{4,5}"))
    for end in END_IDS:  # each of the three
        found = engine.submit(prompt(0), 20, grammar=grammar, logit_bias={end: 90.0}).result(60)
        assert len(found.answer) == 5 and found.answer[-1] == end and found.finish_reason == "stop"
    never = engine.submit(prompt(0), 20, grammar=grammar, logit_bias=dict.fromkeys(END_IDS, -90.0)).result(60)
    assert len(never.answer) == 6  # where nothing else may come
    for stop_ids in ([], [5]):  # no stop ids of the request's: the grammar's end is one
        found = engine.submit(prompt(0), 20, grammar=grammar, stop_ids=stop_ids).result(60)
        assert found.finish_reason == "stop" and set(found.text or "") <= set("ab")


def test_stop_strings_and_penalties_go_with_grammars(engine) -> None:
    grammar = GRAMMARS.compile(choice_source(["abcabcabc"]))
    found = engine.submit(prompt(0), 20, grammar=grammar, stop_strings=["ca"], repetition_penalty=1.4).result(60)
    assert found.text == "ab" and found.finish_reason == "stop"


def test_what_bans_all_that_is_allowed_ends_with_an_error(engine) -> None:
    grammar = GRAMMARS.compile(regex_source("a+"))
    for temperature in (0.0, 1.0):
        bias = {TOKENIZER.token_id("a"): float("-inf")}
        request = engine.submit(prompt(0), 20, grammar=grammar, logit_bias=bias, temperature=temperature)
        with pytest.raises(UserError, match="no token is left to choose"):
            request.result(60)
    assert engine.submit(prompt(0), 20, grammar=grammar).result(60).answer


def test_a_grammar_that_cannot_go_on_ends_its_request_alone(engine) -> None:
    """By llguidance's own limits: too many things may come next."""
    many = GRAMMARS.compile(json_source({"type": "object", "properties": {f"p{i}": {} for i in range(900)}}))
    beside = engine.submit(prompt(0), 20, grammar=REGEX)
    request = engine.submit(prompt(0), 20, grammar=many, temperature=1.0)
    with pytest.raises(UserError, match="the grammar cannot go on"):
        request.result(60)
    assert beside.result(60).finish_reason == "stop" and engine.failure is None


@pytest.mark.parametrize("kind", ["engine", pytest.param("drafting", marks=pytest.mark.slow)])
def test_the_likeliest_tokens(request, params, kind) -> None:
    chosen = request.getfixturevalue(kind)
    asked = chosen.submit(prompt(0), 8, top_logprobs=5, stop_ids=[])
    deltas = [*asked]
    top = [place for delta in deltas for place in delta.top]
    logprobs = [p for delta in deltas for p in delta.logprobs]
    tokens = [t for delta in deltas for t in delta.tokens]
    assert len(top) == 8 and all(len(place) == 5 for place in top)
    forward = glm.forward(params, CONFIG, jnp.asarray(prompt(0) + tokens)[None])
    each = np.asarray(jax.nn.log_softmax(jax.tree.leaves(forward)[0][0].astype(jnp.float32)))
    for i, place in enumerate(top):
        row = each[len(prompt(0)) - 1 + i, : TOKENIZER.vocab_size]
        best = np.argsort(-row)[:5]
        assert [token for token, _ in place] == best.tolist() and place[0] == (tokens[i], logprobs[i])
        np.testing.assert_allclose([p for _, p in place], row[best], atol=1e-3)
    assert all(delta.top == () for delta in chosen.submit(prompt(0), 3))


@pytest.mark.parametrize(
    ("how", "message"),
    [({"thought_budget": -1}, "thought_budget is -1"), ({"top_logprobs": 21}, "top_logprobs is 21")],
    ids=str,
)
def test_bad_requests(engine, how, message) -> None:
    with pytest.raises(UserError, match=message):
        engine.submit(prompt(0), **how)


def test_grammars_need_a_tokenizer_and_an_open_engine(params) -> None:
    engine = Engine(params, CONFIG, options=EngineOptions(slots=1, cache_tokens=64, step_tokens=16, warm_up=False))
    with pytest.raises(UserError, match="give the engine its tokenizer"):
        _ = engine.grammars
    engine.close()
    with pytest.raises(EngineClosed):
        engine.submit([1])


# --- thoughts, without an engine -------------------------------------------------------------------------------------

MASKS = ThoughtMasks(TOKENIZER, 384, END_IDS)


def allowed(constraint: Constraint, drafts: list[int] | None = None) -> list[set[int]]:
    rows = np.full((len(drafts or []) + 1, 12), 0xFFFFFFFF, np.uint32)
    constraint.fill(rows, drafts or [])
    return [set(np.nonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[0].tolist()) for row in rows]


def spelled(text: str) -> list[int]:
    return TOKENIZER.encode(text, allow_special=False)


@pytest.mark.parametrize("tag", ["</think>", "<tool_call>"])
def test_thoughts_before_a_grammar_hold_no_tags_of_another(tag) -> None:
    constraint = Constraint(Thought("inside"), MASKS, REGEX.matcher(), END_IDS)
    (first,) = allowed(constraint)
    assert not first & {*END_IDS, CALL, OPEN} and CLOSE in first and len(first) > 270
    *before, last = spelled(tag)
    after = allowed(constraint, before)
    assert all(token in mask for token, mask in zip(before, after)) and last not in after[-1]
    for token in [*spelled("a <b <"), *before]:
        constraint.take(token)
    assert last not in allowed(constraint)[0]
    constraint.take(spelled("x")[0])
    assert last in allowed(constraint)[0] and constraint.error is None


def test_masks_after_drafts_are_those_after_the_tokens() -> None:
    """And asking changes nothing."""
    start = Thought("before", 2)
    tokens = [*spelled("\n"), OPEN, *spelled("a<"), CLOSE, *spelled("\nabc!!"), END_IDS[0]]
    whole = allowed(Constraint(start, MASKS, REGEX.matcher(), END_IDS), tokens)
    constraint = Constraint(start, MASKS, REGEX.matcher(), END_IDS)
    for i, token in enumerate(tokens):
        assert allowed(constraint, tokens[i : i + 3]) == whole[i : i + 4]
        assert token in whole[i]
        constraint.take(token)
    assert constraint.ended and constraint.error is None
    assert whole[0] == {*spelled("\n"), OPEN} and whole[1] == {OPEN} and whole[4] == {CLOSE}


def test_what_follows_a_draft_that_is_not_allowed_is_left_open() -> None:
    constraint = Constraint(Thought("after"), MASKS, REGEX.matcher(), END_IDS)
    masks = allowed(constraint, spelled("azb"))
    assert len(masks[0]) == 6 and spelled("z")[0] not in masks[1] and len(masks[2]) == len(masks[3]) == 384
    assert allowed(constraint, spelled("abc"))[2] == allowed(constraint, spelled("ab"))[2]


def test_a_budget_without_a_grammar_ends_with_the_thought() -> None:
    constraint = Constraint(Thought("before", 1), MASKS, None, END_IDS)
    for token in [*spelled("\n\n"), OPEN, *spelled("a")]:
        constraint.take(token)
    assert allowed(constraint) == [{CLOSE}] and not constraint.done
    constraint.take(CLOSE)
    assert not constraint.done and {*range(384)} - allowed(constraint)[0] == {OPEN}  # once is enough
    for token in [CLOSE, *END_IDS, *spelled("\n\x1c\u2003\xa0")]:  # none of them begins the answer
        constraint.take(token)
        assert OPEN not in allowed(constraint)[0], token
    for token in [*spelled(" Hello")]:
        constraint.take(token)
    assert constraint.done and constraint.error is None
