"""Stop strings cut exactly, streams yield the same text in pieces, as it comes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from glm45_jax.infer import Generation, generate_detailed, stream
from glm45_jax.infer.text_stop import StoppableText
from glm45_jax.text import Tokenizer, train_tokenizer
from glm45_jax.text.byte_level import token_to_bytes
from tests.infer.conftest import generate_module
from tests.support import random_params

CORPUS = ["the cat sat on the mat, the dog and the cat ran. 天气很好，你好。 Straße, déjà vu.\n"] * 8
CONFIG = get_preset("tiny", num_hidden_layers=2, hidden_size=32, num_nextn_predict_layers=0, vocab_size=384)
PROMPT = "the cat"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, 340)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(CONFIG, seed=3)


OPTIONS: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_new_tokens": 40, "stop_ids": []}


@pytest.fixture(scope="module")
def whole(params, tokenizer) -> Generation:
    (found,) = generate_detailed(params, CONFIG, [tokenizer.encode(PROMPT)], tokenizer=tokenizer, **OPTIONS)
    assert found.text == tokenizer.decode(found.answer)
    assert max(found.answer) < tokenizer.vocab_size  # the model has more rows than the tokenizer tokens
    return found


# --- the text of one answer ------------------------------------------------------------------------------------------


def expected_cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: where the first stop string ends."""
    for end in range(1, len(text) + 1):
        if hits := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, hits))], True
    return text, False


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_cutting_does_not_depend_on_the_tokens(data, tokenizer) -> None:
    text = data.draw(st.text("thecatso 你ß", min_size=1, max_size=30))
    stops = data.draw(st.lists(st.text("thecatso 你ß", min_size=1, max_size=4), max_size=3))
    if data.draw(st.booleans()):
        ids = tokenizer.encode(text)
    else:  # single bytes
        ids = [i for char in text for byte in char.encode() for i in [byte_id(tokenizer, byte)]]
    found = StoppableText(tokenizer, stops)
    pieces = [found.push(i) for i in ids]
    pieces.append(found.finish())
    assert "".join(pieces) == found.text
    assert (found.text, found.stopped) == expected_cut(text, stops)


@pytest.mark.parametrize("stops", [["cat", "a"], ["a", "cat"], ["cat sat", " sat"], ["t s", "cat s"], ["zzz"]])
def test_of_several_stop_strings_the_first_to_end_counts(stops, tokenizer) -> None:
    """Also where one token holds all of them."""
    ids = tokenizer.encode("the cat sat on")
    assert " cat" in map(tokenizer.decode, ([i] for i in ids))
    found = StoppableText(tokenizer, stops)
    for i in ids:
        found.push(i)
    found.finish()
    assert (found.text, found.stopped) == expected_cut("the cat sat on", stops)


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    vocabulary = tokenizer.backend.get_vocab()
    return next(i for token, i in vocabulary.items() if len(token) == 1 and token_to_bytes(token) == bytes([byte]))


def test_text_that_cannot_begin_a_stop_string_does_not_wait(tokenizer) -> None:
    found = StoppableText(tokenizer, ["cats", "then"])
    pieces = [found.push(byte_id(tokenizer, byte)) for byte in b"the cat ran"]
    assert pieces[:5] == ["", "", "", "the ", ""] and "".join(pieces) == "the cat ran"


# --- stop strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 7, 16, 25])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_stop_strings_cut_exactly(start, size, whole, params, tokenizer) -> None:
    stop = whole.text[start : start + size]
    (found,) = generate_detailed(
        params, CONFIG, [whole.prompt], tokenizer=tokenizer, stop_strings=[stop, "never there"], **OPTIONS
    )
    assert found.text == whole.text[: whole.text.index(stop)] and found.finish_reason == "stop"
    # all tokens of the stop string and no more
    assert found.answer == whole.answer[: len(found.answer)] and len(found.logprobs) == len(found.answer)
    assert stop in tokenizer.decode(found.answer) and stop not in tokenizer.decode(found.answer[:-1])


@pytest.mark.slow
def test_a_stop_string_ends_its_row_alone(whole, params, tokenizer) -> None:
    prompts, options = [whole.prompt, tokenizer.encode("the dog and")], OPTIONS | {"seed": [5, 6]}
    free = generate_detailed(params, CONFIG, prompts, tokenizer=tokenizer, **options)
    stop = next(free[0].text[i : i + 3] for i in range(20, 50) if free[0].text[i : i + 3] not in free[1].text)
    ended = generate_detailed(params, CONFIG, prompts, tokenizer=tokenizer, stop_strings=stop, **options)
    assert ended[0].text == free[0].text[: free[0].text.index(stop)] and ended[0].finish_reason == "stop"
    assert ended[1] == free[1] and ended[1].finish_reason == "length"


def test_a_stop_string_that_the_prompt_alone_holds_stops_nothing(whole, params, tokenizer) -> None:
    assert "cat" in PROMPT and "cat" not in whole.text
    (found,) = generate_detailed(params, CONFIG, [whole.prompt], tokenizer=tokenizer, stop_strings=["cat"], **OPTIONS)
    assert found.answer == whole.answer


@pytest.mark.slow
def test_a_stop_id_is_a_token_but_no_text(whole, params, tokenizer) -> None:
    stop = whole.answer[9]
    at = whole.answer.index(stop)
    (found,) = generate_detailed(params, CONFIG, [whole.prompt], tokenizer=tokenizer, **OPTIONS | {"stop_ids": [stop]})
    assert found.answer == whole.answer[: at + 1] and found.text == tokenizer.decode(whole.answer[:at])


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [None, 12, 30])
def test_pieces_of_a_stream_are_the_text(cut, whole, params, tokenizer) -> None:
    stops = None if cut is None else whole.text[cut : cut + 3]
    (expected,) = generate_detailed(params, CONFIG, [whole.prompt], tokenizer=tokenizer, stop_strings=stops, **OPTIONS)
    answer = stream(params, CONFIG, whole.prompt, tokenizer, stop_strings=stops, **OPTIONS)
    assert answer.result is None
    pieces = list(answer)
    assert "".join(pieces) == expected.text and all(pieces)
    assert answer.result == expected
    assert len(pieces) > 1


def test_a_stream_yields_before_it_goes_on(whole, params, tokenizer, monkeypatch) -> None:
    calls = []
    original = generate_module.advance  # type: ignore
    monkeypatch.setattr(generate_module, "advance", lambda *args: calls.append(args[4]) or original(*args))
    pieces = stream(params, CONFIG, whole.prompt, tokenizer, **OPTIONS)
    assert tokenizer.decode(whole.answer[:1]).startswith(next(pieces)) and not calls
    next(pieces)
    assert 0 < calls[-1] < 20


def test_streams_check_their_input_at_once(params, tokenizer) -> None:
    with pytest.raises(UserError, match="empty"):
        stream(params, CONFIG, [], tokenizer)
    with pytest.raises(UserError, match="not empty"):
        stream(params, CONFIG, [1], tokenizer, stop_strings=[""])
    nothing = stream(params, CONFIG, [1], tokenizer, max_new_tokens=0)
    assert list(nothing) == [] and nothing.result == Generation([1], [], [], "length", "")
