"""Batches hold every record once an epoch, resume exactly, and mark documents and targets rightly."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from glm45_jax.data import DataConfig, SourceConfig, build_data
from glm45_jax.errors import UserError

FIELDS = {"tokens": "int32", "segment_ids": "int32", "positions": "int32", "loss_mask": "bool"}


@pytest.fixture(autouse=True)
def few_bins(monkeypatch):
    """Best-fit packing in small groups of rows, so that the tests' few batches cross many."""
    monkeypatch.setattr("glm45_jax.data.shard._PACKING_TOKENS", 1)


def write_tokens(path, documents):
    path.write_text("".join(json.dumps({"tokens": document}) + "\n" for document in documents))
    return str(path)


def numbered_documents(count, rng, longest=13):
    """Document i is i repeated: whatever row it lands in, its tokens name it."""
    return [[i] * int(rng.integers(1, longest)) for i in range(1, count + 1)]


@pytest.fixture
def documents():
    return numbered_documents(40, np.random.default_rng(0))


def open_data(path, *, batch=2, seq=16, seed=3, tokenizer=None, epochs=None, shuffle=True, prefetch=2, **source):
    config = DataConfig(
        sources=(SourceConfig(path=(path,), **source),), epochs=epochs, shuffle=shuffle, prefetch=prefetch
    )
    return build_data(config, tokenizer, batch, seq, seed, vocab_size=1000)


def take(data, count=None):
    return list(itertools.islice(data, count))


def real_tokens(batches):
    return np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_token_once_an_epoch(tmp_path, documents, packing):
    path = write_tokens(tmp_path / "a.jsonl", documents)
    got = real_tokens(take(open_data(path, batch=1, epochs=1, packing=packing)))
    want = np.concatenate(documents)
    if packing == "concat":  # the last row is padded, so nothing is left out
        assert len(got) == len(want)
    np.testing.assert_array_equal(np.sort(got), np.sort(want))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_epochs_differ_in_order_and_repeat_by_seed(tmp_path, documents, packing):
    path = write_tokens(tmp_path / "a.jsonl", documents)
    total = sum(map(len, documents))
    two = real_tokens(take(open_data(path, batch=1, epochs=2, packing="concat")))
    assert len(two) == 2 * total
    assert list(two[:total]) != list(two[total:])
    again = take(open_data(path, packing=packing), 8)
    for a, b in zip(again, take(open_data(path, packing=packing), 8)):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    other = take(open_data(path, packing=packing, seed=4), 8)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(again, other))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_goes_on_exactly(tmp_path, documents, packing, prefetch):
    """At every batch of several epochs, a state through JSON continues with the very next batch."""
    path = write_tokens(tmp_path / "a.jsonl", documents)

    def fresh():
        return open_data(path, packing=packing, prefetch=prefetch)

    data, states, batches = fresh(), [], []
    for _ in range(24):
        states.append(json.dumps(data.get_state()))
        batches.append(next(data))
    for at in (0, 1, 5, 11, 17, 23):
        resumed = fresh()
        resumed.set_state(json.loads(states[at]))
        for want, got in zip(batches[at:], take(resumed, 3)):
            for key in want:
                np.testing.assert_array_equal(want[key], got[key])
        resumed.close()


def test_resume_of_a_mixture(tmp_path, documents):
    a = write_tokens(tmp_path / "a.jsonl", documents)
    b = write_tokens(tmp_path / "b.jsonl", [[i + 500] * 5 for i in range(30)])
    config = DataConfig(
        sources=(SourceConfig(path=(a,), weight=3.0), SourceConfig(path=(b,), weight=1.0, packing="best_fit"))
    )

    def fresh():
        return build_data(config, None, 2, 16, 0, vocab_size=1000)

    data = fresh()
    take(data, 7)
    resumed = fresh()
    resumed.set_state(json.loads(json.dumps(data.get_state())))
    for want, got in zip(take(data, 10), take(resumed, 10)):
        np.testing.assert_array_equal(want["tokens"], got["tokens"])


def test_weights_are_shares_of_rows(tmp_path):
    a = write_tokens(tmp_path / "a.jsonl", [[1] * 100 for _ in range(9)])  # long documents
    b = write_tokens(tmp_path / "b.jsonl", [[2] * 3 for _ in range(9)])  # short ones
    config = DataConfig(sources=(SourceConfig(path=(a,), weight=0.75), SourceConfig(path=(b,), weight=0.25)))
    rows = np.concatenate([x["tokens"] for x in take(build_data(config, None, 4, 32, 0, vocab_size=9), 25)])
    assert (rows == rows[:, :1]).all(), "a row holds one source"
    assert np.mean(rows[:, 0] == 1) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_segments_positions_and_targets(tmp_path, documents, packing):
    path = write_tokens(tmp_path / "a.jsonl", documents)
    for batch in take(open_data(path, packing=packing), 20):
        assert {k: v.dtype.name for k, v in batch.items()} == FIELDS
        for tokens, segments, positions, mask in zip(*(batch[k] for k in FIELDS)):
            for segment in np.unique(segments[segments > 0]):
                where = np.flatnonzero(segments == segment)
                assert len(np.unique(tokens[where])) == 1, "a segment is one document"
                np.testing.assert_array_equal(where, np.arange(where[0], where[-1] + 1))
                np.testing.assert_array_equal(positions[where], np.arange(len(where)))
                np.testing.assert_array_equal(mask[where], np.arange(len(where)) > 0)
            assert not mask[segments == 0].any()
            if packing == "concat":
                assert (segments > 0).all()


def test_best_fit_keeps_documents_whole(tmp_path, documents):
    path = write_tokens(tmp_path / "a.jsonl", documents)
    lengths = dict(zip(range(1, len(documents) + 1), map(len, documents)))
    for batch in take(open_data(path, packing="best_fit", epochs=1, batch=1)):
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"]):
            for segment in np.unique(segments[segments > 0]):
                inside = tokens[segments == segment]
                assert len(inside) == lengths[inside[0]]


def test_loss_mask_travels_with_its_tokens(tmp_path):
    """Token t is even exactly where it is a target: an offset of one would show."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(2, 900, int(rng.integers(2, 30))) for _ in range(30)]
    lines = [json.dumps({"tokens": r.tolist(), "loss_mask": (r % 2 == 0).astype(int).tolist()}) for r in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for packing in ("concat", "best_fit"):
        for batch in take(open_data(str(tmp_path / "a.jsonl"), packing=packing), 10):
            inside = (batch["segment_ids"] > 0) & (batch["positions"] > 0)
            np.testing.assert_array_equal(batch["loss_mask"], inside & (batch["tokens"] % 2 == 0))


@pytest.mark.parametrize("overlong, kept", [("truncate", 8 + 3), ("split", 20 + 3), ("drop", 3)])
def test_documents_longer_than_a_row(tmp_path, overlong, kept):
    path = write_tokens(tmp_path / "a.jsonl", [[7] * 20, [9] * 3])
    data = open_data(path, batch=1, seq=8, packing="best_fit", overlong=overlong, epochs=1)
    assert len(real_tokens(take(data))) == kept
    assert data.skipped == (overlong == "drop")


def test_a_corrupt_line_is_named_or_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": [1, 2]}\n\n{"tokens": [3, 4\n{"tokens": [5, 6]}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:3: not JSON"):
        take(open_data(str(path), batch=1, seq=2, epochs=1))
    data = open_data(str(path), batch=1, seq=2, epochs=3, on_error="skip")
    assert sorted(real_tokens(take(data))) == sorted([1, 2, 5, 6] * 3)
    assert data.skipped_by_source() == {str(path): {"unreadable": 3}}, "once an epoch"


def test_data_without_end_but_without_a_usable_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("nothing\nhere\n")
    with pytest.raises(UserError, match="none of the last 60 records read can be used"):
        next(open_data(str(path), on_error="skip"))
    path.write_text('{"tokens": []}\n')
    with pytest.raises(UserError, match="empty"):
        next(open_data(str(path)))


def test_the_last_batch_is_filled_up_with_padding(tmp_path):
    path = write_tokens(tmp_path / "a.jsonl", [[1, 2, 3]])
    (batch,) = take(open_data(path, batch=4, seq=4, epochs=1))
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 0]] + [[0] * 4] * 3)
    np.testing.assert_array_equal(batch["loss_mask"], [[0, 1, 1, 0]] + [[0] * 4] * 3)


def test_tokens_outside_the_vocabulary(tmp_path):
    path = write_tokens(tmp_path / "a.jsonl", [[1, 1000]])
    with pytest.raises(UserError, match=r"a\.jsonl:1: 'tokens' holds 1000, the vocabulary ends at 1000"):
        next(open_data(path))


def test_changed_data_are_refused_on_resume(tmp_path, documents):
    path = write_tokens(tmp_path / "a.jsonl", documents)
    data = open_data(path)
    next(data)
    state = data.get_state()
    write_tokens(tmp_path / "a.jsonl", documents[1:])
    with pytest.raises(UserError, match="not those of the checkpoint"):
        open_data(path).set_state(state)


def test_closed_batches_say_so(tmp_path, documents):
    data = open_data(write_tokens(tmp_path / "a.jsonl", documents))
    next(data)
    data.close()
    data.close()
    with pytest.raises(UserError, match="closed"):
        next(data)


def test_an_open_pipeline_does_not_disturb_the_end_of_the_program(tmp_path, documents):
    path = write_tokens(tmp_path / "a.jsonl", documents)
    program = (
        "from glm45_jax.data import *\n"
        f"config = DataConfig(sources=(SourceConfig(path=({path!r},)),))\n"
        "data = build_data(config, None, 2, 16, vocab_size=1000)\nnext(data)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
