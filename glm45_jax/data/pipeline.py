"""From sources to batches, by logical shards: identical for any number of processes, and for a run that stops.

The stream is cut into a fixed number of shards, each with its own order, packer, mixture and state (`shard.py`). A
process reads whole shards; of a batch of B rows, shard s of S gives rows s B/S to (s + 1) B/S. A saved state holds
each shard's place, whoever reads it, so that another number of processes goes on with the very same batches.

Axes: B batch, S sequence.
"""

from __future__ import annotations

import json
import logging
import math
import os
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from glm45_jax.data.config import DataConfig
from glm45_jax.data.records import TokenRecords, unsigned
from glm45_jax.data.shard import Row, ShardRows
from glm45_jax.data.sources import fingerprint
from glm45_jax.errors import UserError
from glm45_jax.text import Tokenizer

Batch = dict[str, np.ndarray]
State = dict[str, Any]

_SHARDS_AT_MOST = 64

logger = logging.getLogger(__name__)


def count_shards(config: DataConfig, batch_sizes: int | Iterable[int]) -> int:
    """The number of logical shards of a run with these batch sizes.

    Raises:
      UserError: `config.shards` does not divide one of them.
    """
    sizes = [batch_sizes] if isinstance(batch_sizes, int) else list(batch_sizes)
    if config.shards is None:
        common = math.gcd(*sizes)
        return max(n for n in range(1, min(common, _SHARDS_AT_MOST) + 1) if common % n == 0)
    for size in sizes:
        _check_divides(config.shards, size)
    return config.shards


def owned_shards(shards: int, process: int, processes: int) -> range:
    """The shards of one of several processes, in equal runs: the rows of a batch that is cut into as many parts."""
    if shards % processes:
        raise UserError(
            f"{shards} data shards cannot be dealt to {processes} processes in equal parts: set data.shards to a "
            "multiple of the number of processes"
        )
    return range(process * shards // processes, (process + 1) * shards // processes)


def build_data(
    config: DataConfig, tokenizer: Tokenizer | None, batch_size: int, seq_len: int, seed: int = 0, *,
    vocab_size: int | None = None, shards: Collection[int] | None = None,
) -> BatchIterator:  # fmt: skip
    """Batches of `config`, from the beginning.

    Each is a dict of [B, S] arrays: `tokens` int32; `segment_ids` int32, the number of the document within its row from
    1 on, 0 for padding; `positions` int32, from 0 in every document; `loss_mask` bool, whether the token is a target
    (never the first of a document, which nothing predicts).

    Args:
      tokenizer: None where every source holds tokens already.
      batch_size: rows of a batch, of all processes together; `next_batch` can take another for one batch.
      vocab_size: ids in the data from here on are refused; the tokenizer's by default.
      shards: the logical shards to read, of the `count_shards(config, batch_size)` that there are; None for all. A
        batch then holds their rows alone, in the order of the shards' numbers.

    Raises:
      UserError: a source has no records or cannot be read. While iterating: a bad record, by file and line.
    """
    if batch_size < 1 or seq_len < 2:
        raise UserError(f"batches of {batch_size} x {seq_len} tokens: need at least 1 row of 2 tokens")
    count = count_shards(config, batch_size)
    owned = sorted(range(count) if shards is None else set(shards))
    if not owned or not 0 <= owned[0] <= owned[-1] < count:
        raise UserError(f"data shards {owned}: there are {count}, 0 to {count - 1}, and a process reads at least one")
    records = [
        TokenRecords(source, i, tokenizer, config, vocab_size, seq_len, seed) for i, source in enumerate(config.sources)
    ]
    pad_id = tokenizer.pad_id if tokenizer else 0
    # Each shard has a thread that reads ahead; where they are few, more threads tokenise for each.
    threads = max(0, (os.cpu_count() or 1) // len(owned) - 1) if config.prefetch else 0
    rows_ahead = config.prefetch * batch_size // count
    iterators = {
        shard: iter(
            ThreadPrefetchIterDataset(
                ShardRows(records, config, seq_len, seed, shard, count, pad_id=pad_id, threads=min(threads, 16)),
                prefetch_buffer_size=rows_ahead,
            )
        )
        for shard in owned
    }
    settings = {
        "sources": [fingerprint(source) for source in config.sources],
        "shuffle": config.shuffle,
        "seq_len": seq_len,
        "seed": seed,
        "shards": count,
    }
    return BatchIterator(
        iterators, records, settings, batch_size=batch_size, pad_id=pad_id, prefetch=bool(config.prefetch)
    )


class BatchIterator(Iterator[Batch]):
    """Batches without end, or until the `epochs` of all its shards are over, the last ones filled up with padding."""

    def __init__(
        self, shards: dict[int, Any], records: Sequence[TokenRecords], settings: State, *, batch_size: int,
        pad_id: int, prefetch: bool,
    ):  # fmt: skip
        self.batch_size, self.shards = batch_size, settings["shards"]
        self._settings, self._records, self._pad_id, self._prefetch = settings, records, pad_id, prefetch
        self._open, self._over, self._any = shards, set[int](), False
        # Also at the end of the interpreter, whose dismantling grain's threads and finalisers do not survive quietly.
        self._close = weakref.finalize(self, _close, self._open)

    def __next__(self) -> Batch:
        batch = self.next_batch()
        if batch is None:
            raise StopIteration
        return batch

    def next_batch(self, batch_size: int | None = None) -> Batch | None:
        """The rows that this process reads of the next batch; None where all its shards are over.

        With `epochs`, some processes may be over before others: they go on with `padding_batch` until all are.

        Args:
          batch_size: of all processes together, any multiple of `shards`; that of `build_data` by default. States
            count rows, not batches, so it may change from one batch to the next.
        """
        each = self._rows_per_shard(batch_size)
        if self._prefetch:  # all shards' threads at once, before the first is waited for
            for iterator in self._iterators().values():
                iterator.start_prefetch()
        rows = [self._take(shard) for shard in self._iterators() for _ in range(each)]
        if all(row is None for row in rows):
            if not self._any:
                raise UserError("the data end before the first row is full: there is no record in these shards")
            return None
        self._any = True
        return self._batch(rows)

    def padding_batch(self, batch_size: int | None = None) -> Batch:
        """A batch of the same shape as `next_batch`'s without any document."""
        return self._batch([None] * (self._rows_per_shard(batch_size) * len(self._iterators())))

    def epochs(self) -> dict[str, float]:
        """Times through each source so far, by its name; of these shards alone it is an estimate for all.

        Best-fit packing reads ahead by the rows that it fills at a time.
        """
        share = self.shards / len(self._iterators())
        read = self._per_source(lambda source: source["read"])
        return {name: share * count / len(self._records[i]) for i, (name, count) in enumerate(read.items())}

    def skipped_by_source(self) -> dict[str, dict[str, int]]:
        """How often records were left out of these shards, by source and reason; one is counted in every epoch."""
        return {
            name: dict(counts) for name, counts in self._per_source(lambda source: Counter(source["skipped"])).items()
        }

    @property
    def skipped(self) -> int:
        """How often records were left out in all."""
        return sum(sum(counts.values()) for counts in self.skipped_by_source().values())

    def get_state(self) -> State:
        """The places of this process's shards, as plain JSON values: what `set_state` needs to go on behind the last
        batch. `merge_states` joins those of all processes."""
        return {"settings": self._settings, "shards": {str(shard): state for shard, state in self._states().items()}}

    def set_state(self, state: State) -> None:
        """Goes on where `state` was taken, by any number of processes.

        Raises:
          UserError: the state is of other files, packing, shuffling, row length, seed or number of shards, or does not
            hold all shards that are read here.
        """
        _check_settings(state.get("settings"), self._settings)
        missing = [shard for shard in self._iterators() if str(shard) not in state["shards"]]
        if missing:
            raise UserError(
                f"the state of the data lacks shards {missing}, which this process reads: merge_states of all processes"
            )
        for shard, iterator in self._iterators().items():
            saved = state["shards"][str(shard)]
            iterator.set_state({**saved, "sources": [json.dumps(source) for source in saved["sources"]]})
        self._over.clear()
        self._any = True

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._close()

    def _iterators(self) -> dict[int, Any]:
        if not self._open:
            raise UserError("these batches are closed; build_data opens them again")
        return self._open

    def _rows_per_shard(self, batch_size: int | None) -> int:
        size = self.batch_size if batch_size is None else batch_size
        _check_divides(self.shards, size)
        return size // self.shards

    def _take(self, shard: int) -> Row | None:
        if shard in self._over:
            return None
        row = next(self._iterators()[shard], None)
        if row is None:
            self._over.add(shard)
        return row

    def _batch(self, rows: Sequence[Row | None]) -> Batch:
        shape = (len(rows), self._settings["seq_len"])
        tokens = np.full(shape, ~self._pad_id, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            if row is not None:
                tokens[i], segments[i] = row["tokens"], row["tokens_segment_ids"]
                positions[i] = row["tokens_positions"]
        tokens, targets = unsigned(tokens)
        targets &= (segments > 0) & (positions > 0)
        return {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": targets}

    def _states(self) -> dict[int, State]:
        states = {shard: iterator.get_state() for shard, iterator in self._iterators().items()}
        return {
            shard: {**state, "sources": [json.loads(source) for source in state["sources"]]}
            for shard, state in states.items()
        }

    def _per_source(self, value: Any) -> dict[str, Any]:
        """The sum over shards of what `value` takes of each source's state, by the sources' names."""
        states = self._states().values()
        sums: dict[str, Any] = {}
        for i, records in enumerate(self._records):
            first, *rest = [value(state["sources"][i]) for state in states]
            for more in rest:
                first = first + more
            sums[records.name if records.name not in sums else f"{records.name} ({i})"] = first
        return sums


def merge_states(states: Iterable[State]) -> State:
    """The state of a whole run from those of its processes.

    Raises:
      UserError: they are of different runs, or shards are missing.
    """
    first, *rest = list(states)
    merged = dict(first["shards"])
    for state in rest:
        _check_settings(state["settings"], first["settings"])
        merged |= state["shards"]
    missing = [shard for shard in range(first["settings"]["shards"]) if str(shard) not in merged]
    if missing:
        raise UserError(f"the states of the data lack shards {missing}: give those of all processes")
    return {"settings": first["settings"], "shards": dict(sorted(merged.items(), key=lambda item: int(item[0])))}


def _check_divides(shards: int, batch_size: int) -> None:
    if batch_size < 1 or batch_size % shards:
        raise UserError(
            f"a batch of {batch_size} rows cannot be cut into {shards} data shards: set data.shards to a divisor of "
            "every batch size of the run"
        )


def _check_settings(saved: Any, now: State) -> None:
    if saved == now:
        return
    saved = saved if isinstance(saved, dict) else {}
    different = [key for key in now if saved.get(key) != now[key]]
    if different == ["shards"]:
        raise UserError(
            f"the data of the checkpoint are cut into {saved.get('shards')} shards, here into {now['shards']}: "
            f"set data.shards={saved.get('shards')}"
        )
    raise UserError(
        "the data are not those of the checkpoint (files, sizes, packing, shuffle, sequence length, seed differ), so "
        "its place in them means nothing. Bring them back as they were, or start a new run from the checkpoint's "
        "weights" + "".join(f"\n  {key}: checkpoint {saved.get(key)}, now {now[key]}" for key in different)
    )


def _close(shards: dict[int, Any]) -> None:
    while shards:
        shards.popitem()[1].close()
