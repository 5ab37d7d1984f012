"""The stream by logical shards: the same batches for any number of processes, wherever a run stops."""

import itertools
import json

import numpy as np
import pytest

from glm45_jax.data import DataConfig, SourceConfig, build_data, count_shards, merge_states, owned_shards
from glm45_jax.data.shard import cumulative_shares, pick_source
from glm45_jax.errors import UserError
from glm45_jax.text import train_tokenizer

BATCH, SEQ = 8, 24


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x): return x + 1"], 300)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Code turned round to fill in, whole conversations' worth of tokens, and a source with fewer records than
    shards and a corrupt one among them; both kinds of packing."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    code = [{"text": f"def f{i}(x):\n    return x + {i} * '€ü'\n" * int(rng.integers(1, 4))} for i in range(30)]
    whole = [{"tokens": [int(i)] * int(rng.integers(1, 30))} for i in range(1, 50)]
    few = ['{"tokens": [7, 8, 9]}', '{"tokens": [7', '{"tokens": [3, 3]}']
    for name, lines in {"code": map(json.dumps, code), "whole": map(json.dumps, whole), "few": few}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = lambda name: (str(folder / f"{name}.jsonl"),)  # noqa: E731
    return DataConfig(
        sources=(
            SourceConfig(path=path("code"), weight=0.5, fim_rate=0.5),
            SourceConfig(path=path("whole"), weight=0.3, packing="best_fit", overlong="split"),
            SourceConfig(path=path("few"), weight=0.2, on_error="skip"),
        ),
        shards=4,
    )


class Run:
    """A run of some processes, each with the shards it owns."""

    def __init__(self, config, tokenizer, processes, state=None):
        self.parts = [
            build_data(config, tokenizer, BATCH, SEQ, 5, shards=owned_shards(4, process, processes))
            for process in range(processes)
        ]
        if state is not None:
            for part in self.parts:
                part.set_state(json.loads(json.dumps(state)))

    def take(self, count, batch_size=None):
        """Global batches: the processes' rows one behind the other."""
        for _ in range(count):
            rows = [part.next_batch(batch_size) for part in self.parts]
            yield {key: np.concatenate([batch[key] for batch in rows]) for key in rows[0]}

    def state(self):
        return merge_states([part.get_state() for part in reversed(self.parts)])

    def close(self):
        for part in self.parts:
            part.close()


def assert_equal(wanted, found):
    for want, got in itertools.zip_longest(wanted, found):
        for key in want:
            np.testing.assert_array_equal(want[key], got[key], err_msg=key)


@pytest.fixture(autouse=True)
def few_bins(monkeypatch):
    monkeypatch.setattr("glm45_jax.data.shard._BINS", (3, 3))


@pytest.fixture(scope="module")
def reference(mixture, tokenizer):
    """Batches of one process that is never stopped, and the state in front of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm45_jax.data.shard._BINS", (3, 3))
        run, states, batches = Run(mixture, tokenizer, 1), [], []
        for _ in range(30):
            states.append(run.state())
            batches += run.take(1)
        states.append(run.state())
        run.close()
    return states, batches


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_are_the_same_for_any_number_of_processes(mixture, tokenizer, reference, processes):
    run = Run(mixture, tokenizer, processes)
    assert_equal(reference[1][:12], run.take(12))
    assert run.state() == reference[0][12]
    run.close()


@pytest.mark.parametrize("first, then, at", [(1, 4, 3), (4, 1, 7), (2, 4, 10), (4, 2, 13), (1, 2, 16)])
def test_a_run_goes_on_with_another_number_of_processes(mixture, tokenizer, reference, first, then, at):
    states, batches = reference
    run = Run(mixture, tokenizer, first, states[at - 2])
    assert_equal(batches[at - 2 : at], run.take(2))
    assert run.state() == states[at]
    again = Run(mixture, tokenizer, then, run.state())
    assert again.state() == states[at], "nothing is lost by stopping at once again"
    assert_equal(batches[at : at + 6], again.take(6))
    assert again.state() == states[at + 6]
    run.close(), again.close()


def test_the_batch_size_may_change_between_batches(mixture, tokenizer, reference):
    """The rows of a shard are a sequence, whatever the batches they are dealt in."""
    run = Run(mixture, tokenizer, 1)
    per_shard = lambda batches: np.concatenate(  # noqa: E731
        [batch["tokens"].reshape(4, -1, SEQ) for batch in batches], axis=1
    )
    small = list(run.take(4, batch_size=4))
    resumed = Run(mixture, tokenizer, 2, run.state())
    rows = per_shard([*small, *resumed.take(2, batch_size=16), *resumed.take(1)])
    np.testing.assert_array_equal(rows, per_shard(reference[1][:7]))
    with pytest.raises(UserError, match="6 rows cannot be cut into 4 data shards"):
        run.parts[0].next_batch(6)
    run.close(), resumed.close()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("records, shards", [(40, 4), (41, 8), (5, 8), (1, 4)])
def test_every_record_once_an_epoch_over_all_shards(tmp_path, records, shards, shuffle):
    """Also where there are fewer records than shards, or the shards do not divide them."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"tokens": [i] * (1 + i % 5)}) + "\n" for i in range(records)))
    config = DataConfig(
        sources=(SourceConfig(path=(str(tmp_path / "a.jsonl"),)),), epochs=3, shards=shards, shuffle=shuffle
    )
    data = build_data(config, None, shards, 6, 1, vocab_size=100)
    found = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in data])
    want = np.concatenate([[i] * (1 + i % 5) for i in range(records)] * 3)
    np.testing.assert_array_equal(np.sort(found), np.sort(want))
    assert data.epochs() == {str(tmp_path / "a.jsonl"): 3.0}


def test_epochs_and_skipped_records_are_counted_over_a_stop(mixture, tokenizer, reference):
    states, batches = reference
    names = [source.name for source in mixture.sources]
    run = Run(mixture, tokenizer, 1, states[15])
    (data,) = run.parts
    epochs, skipped = data.epochs(), data.skipped_by_source()
    # `few` has three records of three and two tokens: so many rows of it hold a known number of epochs
    rows = sum((batch["tokens"] < 10).all(1).sum() for batch in batches[:15])
    assert epochs[names[2]] == pytest.approx(rows * SEQ / 5, rel=0.1)
    assert skipped[names[2]] == {"unreadable": pytest.approx(epochs[names[2]], rel=0.1)}
    assert skipped[names[0]] == skipped[names[1]] == {} and data.skipped == skipped[names[2]]["unreadable"]
    list(run.take(5))
    again = Run(mixture, tokenizer, 4, states[20])
    parts = [part.epochs() for part in again.parts]
    assert {name: sum(part[name] for part in parts) / 4 for name in names} == pytest.approx(data.epochs())
    run.close(), again.close()


def test_processes_that_end_before_others(tmp_path):
    """Shards are over after different numbers of rows; those that are give padding of the same shape."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"tokens": [i] * (40 if i % 2 else 8)}) + "\n" for i in range(8))
    )
    config = DataConfig(sources=(SourceConfig(path=(str(tmp_path / "a.jsonl"),)),), epochs=1, shards=2, shuffle=False)
    first, second = (build_data(config, None, 2, 8, vocab_size=9, shards=[shard]) for shard in range(2))
    assert len(list(first)) == 4 and first.next_batch() is None
    state, padding = first.get_state(), first.padding_batch()
    assert padding["tokens"].shape == (1, 8) and not padding["segment_ids"].any() and not padding["loss_mask"].any()
    assert len(list(second)) == 20
    first.set_state(state)
    assert first.next_batch() is None


def test_back_from_the_end(tmp_path):
    """As evaluation does, which begins again at the same place."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"tokens": [i] * 8}) + "\n" for i in range(1, 9)))
    config = DataConfig(sources=(SourceConfig(path=(str(tmp_path / "a.jsonl"),)),), epochs=1)
    data = build_data(config, None, 2, 8, vocab_size=9)
    next(data)
    state, rest = data.get_state(), list(data)
    data.set_state(state)
    assert len(rest) == 3
    assert_equal(rest, list(data))


def test_sources_keep_their_shares_in_every_batch_and_every_shard():
    for shards, weights in itertools.product((1, 8, 13, 55, 64), ([1, 1], [0.7, 0.2, 0.1], [1, 63], [1, 64])):
        shares = cumulative_shares(weights)
        rows = max(400, 6400 // shards)
        picks = np.array(
            [[pick_source(row, shard, shards, shares, 3) for shard in range(shards)] for row in range(rows)]
        )
        for i, weight in enumerate(weights):
            share = weight / sum(weights)
            assert np.mean(picks == i) == pytest.approx(share, abs=2e-3)
            per_batch, per_shard = np.mean(picks == i, axis=1), np.mean(picks == i, axis=0)
            assert np.abs(per_batch - share).max() <= 2.5 / shards, "a batch has each source's share, within two rows"
            assert np.abs(per_shard - share).max() < 0.1, "and so has each shard in the long run"
            window = np.lib.stride_tricks.sliding_window_view(picks == i, 64, axis=0).mean(-1)
            assert np.abs(window - share).max() < 0.4, "no shard is without a source for long"


def test_numbers_of_shards():
    one = (SourceConfig(path=("a",)),)
    assert [count_shards(DataConfig(sources=one), size) for size in (1, 6, 64, 96, 4096, 130, 67)] == [
        1, 6, 64, 48, 64, 26, 1,
    ]  # fmt: skip
    assert count_shards(DataConfig(sources=one), [32, 48, 64]) == 16
    assert count_shards(DataConfig(sources=one, shards=3), [3, 9]) == 3
    with pytest.raises(UserError, match=r"8 rows cannot be cut into 3 data shards: set data\.shards"):
        count_shards(DataConfig(sources=one, shards=3), [6, 8])
    assert [list(owned_shards(8, process, 4)) for process in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match="6 data shards cannot be dealt to 4 processes"):
        owned_shards(6, 0, 4)


def test_states_that_do_not_fit(mixture, tokenizer, reference, tmp_path):
    states = reference[0]
    one = build_data(mixture, tokenizer, BATCH, SEQ, 5, shards=[1])
    with pytest.raises(UserError, match=r"lack shards \[0, 2, 3\]"):
        merge_states([one.get_state()])
    partial = {**states[1], "shards": {"0": states[1]["shards"]["0"]}}
    with pytest.raises(UserError, match=r"lacks shards \[1\]"):
        one.set_state(partial)
    other = build_data(mixture, tokenizer, BATCH, SEQ, 6)
    with pytest.raises(UserError, match="seed: checkpoint 5, now 6"):
        other.set_state(states[1])
    with pytest.raises(UserError, match="not those of the checkpoint"):
        merge_states([one.get_state(), other.get_state()])
    (tmp_path / "a.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    eight, four = (
        build_data(
            DataConfig(sources=(SourceConfig(path=(str(tmp_path / "a.jsonl"),)),)), None, size, SEQ, vocab_size=9
        )
        for size in (8, 4)
    )
    with pytest.raises(UserError, match=r"cut into 8 shards, here into 4: set data\.shards=8"):
        four.set_state(eight.get_state())
    with pytest.raises(UserError, match="there are 4, 0 to 3"):
        build_data(mixture, tokenizer, BATCH, SEQ, shards=[4])
    for data in (one, other, eight, four):
        data.close()
