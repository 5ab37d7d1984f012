"""Fill in the middle: the document's own text in another order, between the right tokens, by record and epoch."""

import json

import numpy as np
import pytest

from glm45_jax.data import DataConfig, SourceConfig, build_data
from glm45_jax.data.fim import Cuts, draw_cuts
from glm45_jax.errors import UserError
from glm45_jax.text import Tokenizer, train_tokenizer

TEXT = "def größe(x):\n    return '€' * x  # 日本語 🙂\n"
EOS, PREFIX, MIDDLE, SUFFIX = "<|endoftext|>", "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, 340)


def parts(text, suffix_first):
    """Prefix, middle, suffix of a document that was turned round, whose form is checked."""
    assert text.startswith(SUFFIX if suffix_first else PREFIX)
    first, rest = text[len(PREFIX) :].split(PREFIX if suffix_first else SUFFIX)
    second, middle = rest.split(MIDDLE)
    return (second, middle, first) if suffix_first else (first, middle, second)


@pytest.mark.parametrize("suffix_first", [False, True])
def test_forms(tokenizer, suffix_first):
    for first in np.linspace(0, 0.999, 23):
        text = tokenizer.decode(Cuts(first, 0.4, suffix_first).encode(TEXT, tokenizer))
        prefix, middle, suffix = parts(text, suffix_first)
        assert prefix + middle + suffix == TEXT, "no character is cut, lost or turned"
        assert len(prefix) == int(min(first, 0.4) * (len(TEXT) + 1))


def test_control_tokens_in_the_text_stay_text(tokenizer):
    for cuts in (Cuts(0, 0, False), Cuts(0, 0.99999, False), Cuts(0.99999, 0.99999, True)):  # all in one part
        ids = cuts.encode(f"a {MIDDLE} b {EOS} c", tokenizer)
        assert ids.count(tokenizer.token_id(MIDDLE)) == 1 and tokenizer.token_id(EOS) not in ids


def test_every_place_can_be_cut():
    drawn = [draw_cuts(1.0, 0.5, (0, 0, 0, record)) for record in range(4000)]
    cuts = np.array([[cut.first, cut.second] for cut in drawn])
    assert np.histogram(cuts, 4, (0, 1))[0] == pytest.approx(2000, rel=0.1)
    assert np.mean([cut.suffix_first for cut in drawn]) == pytest.approx(0.5, abs=0.03)
    assert {int(cut.first * 3) for cut in drawn} == {0, 1, 2}, "of two characters: before, between and behind"
    assert np.mean([draw_cuts(0.3, 0.5, (0, 0, 0, i)) is not None for i in range(4000)]) == pytest.approx(0.3, abs=0.03)


def documents(path, tokenizer, epochs=1, seed=0, **kwargs):
    """The documents of a source by epochs, as text, in the order of the file."""
    source = SourceConfig(path=(str(path),), packing="best_fit", overlong="drop", **kwargs)
    data = build_data(DataConfig(sources=(source,), epochs=epochs, shuffle=False), tokenizer, 1, 256, seed)
    batches = list(data)
    tokens = [b["tokens"][b["segment_ids"] == s] for b in batches for s in range(1, b["segment_ids"].max() + 1)]
    return [tokenizer.decode(document) for document in tokens]


@pytest.fixture
def code(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}: {TEXT}"}) + "\n" for i in range(40)))
    return tmp_path / "a.jsonl"


def restored(document):
    """The document as it was, and whether it had been turned round."""
    assert document.endswith(EOS)
    document = document.removesuffix(EOS)
    if document.startswith((PREFIX, SUFFIX)):
        return "".join(parts(document, document.startswith(SUFFIX))), True
    return document, False


def test_a_share_of_the_documents_anew_in_every_epoch(code, tokenizer):
    found = documents(code, tokenizer, epochs=2, fim_rate=0.5)
    texts, turned = zip(*map(restored, found))
    assert sorted(texts) == sorted(2 * [f"{i}: {TEXT}" for i in range(40)])
    assert 25 <= sum(turned) <= 55
    by_number = lambda epoch: {restored(d)[0]: d for d in epoch}  # noqa: E731
    first, second = by_number(found[:40]), by_number(found[40:])
    assert sum(first[text] != second.get(text) for text in first) > 10
    assert documents(code, tokenizer, epochs=2, fim_rate=0.5) == found
    assert documents(code, tokenizer, epochs=2, fim_rate=0.5, seed=1) != found
    source = SourceConfig(path=(str(code),), fim_rate=1.0)
    batch = next(build_data(DataConfig(sources=(source,)), tokenizer, 4, 32))
    np.testing.assert_array_equal(batch["loss_mask"], batch["positions"] > 0, err_msg="the loss is on all tokens")
    only = documents(code, tokenizer, fim_rate=1.0, fim_spm_rate=1.0)
    assert all(document.startswith(SUFFIX) for document in only)
    assert all(document.startswith(PREFIX) for document in documents(code, tokenizer, fim_rate=1.0, fim_spm_rate=0.0))


def test_conversations_and_other_sources_stay_as_they_are(code, tokenizer, tmp_path):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    (document,) = documents(tmp_path / "chat.jsonl", tokenizer, fim_rate=1.0)
    assert MIDDLE not in document
    assert not any(MIDDLE in document for document in documents(code, tokenizer))


def test_what_is_refused(code, tokenizer, tmp_path):
    layout = json.loads(tokenizer.backend.to_str())
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] != SUFFIX]
    lacking = Tokenizer(type(tokenizer.backend).from_str(json.dumps(layout)))
    with pytest.raises(UserError, match=r"fim_rate needs the tokens <\|code_suffix\|>, which the tokenizer lacks"):
        documents(code, lacking, fim_rate=0.1)
    with pytest.raises(UserError, match="needs a tokenizer"):
        documents(code, None, fim_rate=0.1)
    with pytest.raises(UserError, match=r"fim_rate is 1\.5, it must lie in 0\.\.1"):
        SourceConfig(path=("a",), fim_rate=1.5)
