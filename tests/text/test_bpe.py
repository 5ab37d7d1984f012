"""The trainer: GLM's layout, sizes, digits, determinism."""

import json
import os
import subprocess
import sys

import pytest

from glm45_jax.errors import UserError
from glm45_jax.text import PLAIN_TOKENS, SPECIAL_TOKENS, Tokenizer, padded_vocab_size, train_tokenizer
from glm45_jax.text.byte_level import token_to_bytes
from glm45_jax.text.special import PUBLISHED_BASE_SIZE

from .conftest import CORPUS


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([id_]) for id_ in tokenizer.encode(text)]


def test_special_tokens_are_the_published_ones():
    ids = {name: PUBLISHED_BASE_SIZE + i for i, name in enumerate(SPECIAL_TOKENS)}
    published = {
        "<|endoftext|>": 151329, "[gMASK]": 151331, "<sop>": 151333, "<|system|>": 151335, "<|user|>": 151336,
        "<|assistant|>": 151337, "<|observation|>": 151338, "<|end_of_transcription|>": 151346,
        "<|code_suffix|>": 151349, "<think>": 151350, "</arg_value>": 151359, "/nothink": 151360, "<|video|>": 151364,
    }  # fmt: skip
    assert {name: ids[name] for name in published} == published
    assert len(set(SPECIAL_TOKENS)) == 36
    assert sorted(ids[name] for name in PLAIN_TOKENS) == list(range(151350, 151360))


def test_layout(tokenizer):
    layout = json.loads(tokenizer.backend.to_str())
    assert tokenizer.vocab_size == 480
    assert sorted(layout["model"]["vocab"].values()) == list(range(480 - 36))
    assert [t["content"] for t in layout["added_tokens"]] == list(SPECIAL_TOKENS)
    assert [t["id"] for t in layout["added_tokens"]] == list(range(480 - 36, 480))
    assert {t["content"] for t in layout["added_tokens"] if not t["special"]} == PLAIN_TOKENS
    assert layout["model"]["ignore_merges"] is True and layout["normalizer"] is None
    assert tokenizer.encode("\n") == [198]  # as in the published one


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("it's I'LL", ["it", "'s", " I", "'LL"]),
        ("12345 a1", ["123", "45", " a", "1"]),
        ("x  y\n\n z", ["x", " ", " y", "\n\n", " z"]),
        ("(a) !!\n.b", ["(a", ")", " !!\n", ".b"]),
        ("\ta 天气。", ["\ta", " 天气", "。"]),
        ("a   ", ["a", "   "]),
    ],
)
def test_pre_tokenizer(tokenizer, text, parts):
    found = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [token_to_bytes(piece).decode() for piece, _ in found] == parts


def test_digits_are_single_as_an_option():
    corpus = ["2024 2024 1000 1000 " * 50]
    assert tokens(train_tokenizer(corpus, 400), "2024") != list("2024")
    single = train_tokenizer(corpus, 400, split_digits=True)
    assert tokens(single, "2024 1000") == [*"2024", " ", *"1000"]
    assert not any(any(c.isdigit() for c in token) and len(token) > 1 for token in single.backend.get_vocab())


def test_smallest_vocabulary_and_small_corpora():
    smallest = train_tokenizer(CORPUS, 292)
    assert smallest.vocab_size == 292
    text = "né 天气 <think>"
    assert smallest.encode(text) == [*smallest.encode("né 天气 "), smallest.token_id("<think>")]
    assert len(smallest.encode("né 天气 ")) == len("né 天气 ".encode())
    assert smallest.decode(smallest.encode(text)) == text
    few = train_tokenizer(["ab ab"], 5000)
    assert few.vocab_size < 300
    assert list(few.special_ids.values()) == list(range(few.vocab_size - 36, few.vocab_size))
    assert train_tokenizer([], 292).vocab_size == 292


PRINT_DIGEST = """
import hashlib, sys
from glm45_jax.text import train_tokenizer
corpus = open(sys.argv[1], encoding="utf-8").read().split("|||")
print(hashlib.sha256(train_tokenizer(iter(corpus), 480).backend.to_str().encode()).hexdigest())
"""


def test_training_is_deterministic(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("|||".join(CORPUS), encoding="utf-8")

    def digest(threads: str) -> str:
        env = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", PRINT_DIGEST, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

    assert digest("1") == digest("4") == digest("4")


def test_bad_input_is_refused():
    with pytest.raises(UserError, match=r"vocab_size 291 is too small: .* need 292"):
        train_tokenizer(CORPUS, 291)
    with pytest.raises(UserError, match="put it in a list"):
        train_tokenizer("text", 300)
    with pytest.raises(UserError, match=r"texts\[1\]: expected a string, got int"):
        train_tokenizer(["a", 1], 300)


@pytest.mark.parametrize(("size", "multiple", "padded"), [(1, 128, 128), (128, 128, 128), (151365, 512, 151552)])
def test_padded_vocab_size(size, multiple, padded):
    assert padded_vocab_size(size, multiple) == padded
    with pytest.raises(UserError):
        padded_vocab_size(0)
