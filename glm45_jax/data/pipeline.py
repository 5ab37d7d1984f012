"""From sources to batches: shuffle, tokenise, pack, mix and batch, as one grain pipeline whose position can be saved.

Each source is shuffled anew in every epoch, tokenised on the fly and packed into rows by itself; the mixture then
draws rows in proportion to the weights, which so are shares of tokens, whatever the documents' lengths. The order
depends on the seed alone, and a saved state continues it with no record repeated or left out.

Axes: B batch, S sequence.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from grain.experimental import (
    BestFitPackIterDataset,
    ConcatThenSplitIterDataset,
    FlatMapIterDataset,
    FlatMapTransform,
    ThreadPrefetchIterDataset,
)

from glm45_jax.data.config import DataConfig, SourceConfig
from glm45_jax.data.encode import encode_record
from glm45_jax.data.sources import RecordError, Source, fingerprint, open_source
from glm45_jax.errors import UserError
from glm45_jax.text import Tokenizer

Batch = dict[str, np.ndarray]
Row = dict[str, np.ndarray]

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
_PACKING_TOKENS = 1 << 20  # rows that best-fit packing fills at a time hold this many tokens in all
_WAYS_TO_SPLIT = 1 << 20


def build_data(
    config: DataConfig, tokenizer: Tokenizer | None, batch_size: int, seq_len: int, seed: int = 0, *,
    vocab_size: int | None = None,
) -> BatchIterator:  # fmt: skip
    """Batches of `config`, from the beginning.

    Each is a dict of [B, S] arrays: `tokens` int32; `segment_ids` int32, the number of the document within its row from
    1 on, 0 for padding; `positions` int32, from 0 in every document; `loss_mask` bool, whether the token is a target
    (never the first of a document, which nothing predicts).

    Args:
      tokenizer: None where every source holds tokens already.
      vocab_size: ids in the data from here on are refused; the tokenizer's by default.

    Raises:
      UserError: a source has no records or cannot be read. While iterating: a bad record, by file and line.
    """
    if batch_size < 1 or seq_len < 2:
        raise UserError(f"batches of {batch_size} x {seq_len} tokens: need at least 1 row of 2 tokens")
    records = [_TokenRecords(source, tokenizer, config, vocab_size, seq_len) for source in config.sources]
    rows = [
        _packed_rows(tokens, source, config, seq_len, _seed(seed, i), tokenizer.pad_id if tokenizer else 0)
        for i, (tokens, source) in enumerate(zip(records, config.sources))
    ]
    mixed = rows[0] if len(rows) == 1 else grain.IterDataset.mix(rows, [source.weight for source in config.sources])
    batches = mixed.map(_finish).batch(batch_size, drop_remainder=True)
    if config.prefetch:
        batches = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch)
    digest = [fingerprint(source) for source in config.sources]
    settings = f"{digest} shuffle={config.shuffle} seq_len={seq_len} seed={seed}"
    return BatchIterator(iter(batches), settings, records)


class BatchIterator(Iterator[Batch]):
    """Batches without end, or until `epochs` are over; the last rows that fill no batch are left out."""

    def __init__(self, batches: Any, settings: str, records: list[_TokenRecords]):
        self._open, self._settings, self._records = [batches], settings, records
        self._any = False
        # Also at the end of the interpreter, whose dismantling grain's threads and finalisers do not survive quietly.
        self._close = weakref.finalize(self, _close, self._open)

    @property
    def _batches(self) -> Any:
        if not self._open:
            raise UserError("these batches are closed; build_data opens them again")
        return self._open[0]

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except StopIteration:
            if not self._any:
                raise UserError(
                    "the data end before one batch is full: give more data, a smaller batch, or more epochs"
                ) from None
            raise
        self._any = True
        return batch

    @property
    def skipped(self) -> int:
        """Records left out so far by this process as unreadable (`on_error: skip`), empty or too long, each once."""
        return sum(len(records.unusable) for records in self._records)

    def get_state(self) -> dict[str, Any]:
        """The position, as plain JSON values: what `set_state` needs to go on behind the last batch."""
        return {"settings": self._settings, "position": _plain(self._batches.get_state())}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
          UserError: the state is of other files, packing, shuffling, row length or seed.
        """
        if state.get("settings") != self._settings:
            raise UserError(
                "the data are not those of the checkpoint (files, sizes, packing, shuffle, sequence length or seed "
                "differ), so its place in them means nothing. Bring them back as they were, or start a new run from "
                f"the checkpoint's weights.\n  checkpoint: {state.get('settings')}\n  now:        {self._settings}"
            )
        self._batches.set_state(_tuples(state["position"]))
        self._any = True

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._close()


def _close(batches: list[Any]) -> None:
    while batches:
        batches.pop().close()


class _TokenRecords:
    """Records as tokens, by number; None for one that is left out."""

    def __init__(
        self, config: SourceConfig, tokenizer: Tokenizer | None, data: DataConfig, vocab_size: int | None, seq_len: int
    ) -> None:
        self._source: Source = open_source(config)
        self._config, self._tokenizer, self._data, self._vocab_size = config, tokenizer, data, vocab_size
        self._longest = seq_len if config.packing == "best_fit" and config.overlong == "drop" else None
        self._lock = threading.Lock()
        self.unusable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Row | None:
        index = int(index)
        try:
            tokens, mask = encode_record(
                self._source[index],
                self._tokenizer,
                append_eos=self._data.append_eos,
                loss_on=self._data.loss_on,
                vocab_size=self._vocab_size,
            )
        except RecordError as error:
            if self._config.on_error == "fatal":
                raise UserError(
                    f"{self._source.place(index)}: {error}. Mend the record, or skip such records with on_error: skip"
                ) from error
            return self._leave_out(index, str(error))
        if not len(tokens):
            return self._leave_out(index, "it is empty")
        if self._longest is not None and len(tokens) > self._longest:
            return self._leave_out(index, f"its {len(tokens)} tokens are more than a row")
        return {"tokens": tokens, "loss_mask": mask}

    def _leave_out(self, index: int, why: str) -> None:
        with self._lock:
            self.unusable[index] = why
            none_left = len(self.unusable) == len(self)
        if none_left:  # without an end of epochs the pipeline would look for a record for ever
            raise UserError(f"no record of this source can be used; {self._source.place(index)}: {why}")


def _packed_rows(
    records: _TokenRecords, source: SourceConfig, config: DataConfig, seq_len: int, seed: int, pad_id: int
) -> grain.IterDataset:
    documents = grain.MapDataset.source(records)  # pyright: ignore[reportArgumentType]
    if config.shuffle:
        documents = documents.shuffle(seed)
    stream = documents.repeat(config.epochs).to_iter_dataset(_READ)
    lengths = {"tokens": seq_len, "loss_mask": seq_len}
    if source.packing == "concat":
        return ConcatThenSplitIterDataset(stream, length_struct=lengths)
    if source.overlong == "split":
        stream = FlatMapIterDataset(stream, _SplitLong(seq_len))
    elif source.overlong == "truncate":
        stream = stream.map(_Truncate(seq_len))
    return BestFitPackIterDataset(
        stream,
        length_struct=lengths,
        num_packing_bins=min(128, max(8, _PACKING_TOKENS // seq_len)),
        seed=seed,
        padding_struct={"tokens": pad_id, "loss_mask": False},
    )


class _Truncate(grain.transforms.Map):
    def __init__(self, seq_len: int):
        self._seq_len = seq_len

    def map(self, element: Row) -> Row:
        return {key: value[: self._seq_len] for key, value in element.items()}


class _SplitLong(FlatMapTransform):
    """A document into pieces of at most `seq_len` tokens."""

    max_fan_out = _WAYS_TO_SPLIT

    def __init__(self, seq_len: int):
        self._seq_len = seq_len

    def flat_map(self, element: Row) -> list[Row]:
        starts = range(0, len(element["tokens"]), self._seq_len)
        return [{key: value[at : at + self._seq_len] for key, value in element.items()} for at in starts]


def _finish(packed: Row) -> Row:
    segments, positions = packed["tokens_segment_ids"], packed["tokens_positions"]
    target = packed["loss_mask"].astype(bool) & (segments > 0) & (positions > 0)
    return {"tokens": packed["tokens"], "segment_ids": segments, "positions": positions, "loss_mask": target}


def _seed(seed: int, source: int) -> int:
    # grain shuffles epoch e with seed + e: neighbouring seeds would share their orders
    return int(np.random.SeedSequence([seed, source]).generate_state(1)[0])


def _plain(state: Any) -> Any:
    """grain's state in the values that JSON has."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_plain(value) for value in state]
    return state.item() if isinstance(state, np.generic) else state


def _tuples(state: Any) -> Any:
    """The reverse: grain compares its slices with tuples, which JSON gives back as lists."""
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    return tuple(_tuples(value) for value in state) if isinstance(state, list) else state
