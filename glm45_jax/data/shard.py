"""One logical shard of the stream: its share of every source's records, packed into rows, and these mixed by weight.

Position p of a source's stream is record p mod n of epoch p div n, in that epoch's order; shard s of S reads positions
s, s + S, s + 2 S, … So all shards together read every record once an epoch, also where there are fewer records than
shards. A shard knows nothing of the others, nor of processes: its rows depend on its number and the settings alone.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
import xxhash
from grain.experimental import (
    BestFitPackIterDataset,
    ConcatThenSplitIterDataset,
    FlatMapIterDataset,
    FlatMapTransform,
)

from glm45_jax.data.config import DataConfig, SourceConfig
from glm45_jax.data.records import Signed, TokenRecords, signed

Row = dict[str, np.ndarray]

# Rows that best-fit packing fills at a time: of all shards they hold this many tokens, which bounds memory.
_PACKING_TOKENS = 1 << 22
_BINS = (8, 128)  # of one shard, at least and at most
_FEW = 1 << 16  # records: an order of so many is kept whole
_WAYS_TO_SPLIT = 1 << 20
_WEYL = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples mod 2^64 fill every interval evenly


class ShardRows(grain.IterDataset):
    """Rows of shard `shard` of `shards`, without end or until a source's epochs are over."""

    def __init__(
        self, records: Sequence[TokenRecords], config: DataConfig, seq_len: int, seed: int, shard: int, shards: int, *,
        pad_id: int, threads: int,
    ) -> None:  # fmt: skip
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 * threads)
        super().__init__(
            [
                _packed(
                    _stream(tokens, config, derive_seed(seed, i), shard, shards, reading), source, seq_len,
                    _bins(len(tokens), seq_len, shards), derive_seed(seed, i, shard), pad_id,
                )
                for i, (tokens, source) in enumerate(zip(records, config.sources))
            ]
        )  # fmt: skip
        self._shares = cumulative_shares([source.weight for source in config.sources])
        self._place = (shard, shards, seed)

    def __iter__(self) -> grain.DatasetIterator:
        return _Mixed([parent.__iter__() for parent in self.parents], self._shares, *self._place)


class _Mixed(grain.DatasetIterator):
    """Rows of several sources. A source's state is rendered when it gives a row, not at every row of any."""

    def __init__(
        self, sources: list[grain.DatasetIterator], shares: list[int], shard: int, shards: int, seed: int
    ) -> None:
        super().__init__(sources)
        self._shares, self._shard, self._shards, self._seed = shares, shard, shards, seed
        self._usable = [_find_usable(source) for source in sources]
        self._row = 0
        self._states = [self._render(i) for i in range(len(sources))]

    def __next__(self) -> Row:
        source = pick_source(self._row, self._shard, self._shards, self._shares, self._seed)
        row = next(self._parents[source])
        self._row += 1
        self._states[source] = self._render(source)
        return row

    def get_state(self) -> dict[str, Any]:
        return {"row": self._row, "sources": list(self._states)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._row, self._states = state["row"], list(state["sources"])
        for source, text in zip(self._parents, self._states):
            source.set_state(_tuples(json.loads(text)["position"]))

    def _render(self, source: int) -> str:
        usable, position = self._usable[source], self._parents[source].get_state()
        return json.dumps(
            {"read": usable.read, "skipped": usable.skipped, "position": position}, default=lambda scalar: scalar.item()
        )


def cumulative_shares(weights: Sequence[float]) -> list[int]:
    """Where each source's interval of 0..2^64 ends."""
    total = sum(weights)
    ends = [int(2**64 * (part / total)) for part in itertools.accumulate(weights)]
    return [*ends[:-1], 2**64]


def pick_source(row: int, shard: int, shards: int, shares: Sequence[int], seed: int) -> int:
    """Which source gives a shard's row.

    The rows of all shards are one sequence, round after round, in which the sources keep their shares as evenly as
    whole rows can. Within a round, the shards are turned by a number drawn for it: else a period of the sequence could
    be that of the shards, and one of them would never see some source.
    """
    if len(shares) == 1:
        return 0
    turn = xxhash.xxh3_64_intdigest(f"{seed} {row}".encode()) % shards
    point = (row * shards + (shard + turn) % shards) * _WEYL % 2**64
    return next(i for i, end in enumerate(shares) if point < end)


def derive_seed(*key: int) -> int:
    # grain shuffles epoch e with seed + e: neighbouring seeds would share their orders
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# --- one source ----------------------------------------------------------------------------------------------------


def _stream(
    records: TokenRecords, config: DataConfig, seed: int, shard: int, shards: int, reading: grain.ReadOptions
) -> grain.IterDataset:
    documents = grain.MapDataset.range(len(records)).map_with_index(records.at)
    if config.shuffle:
        few = len(records) <= _FEW
        documents = _ShuffledFew(documents, seed) if few else documents.shuffle(seed)
    share = documents.repeat(config.epochs)[shard::shards]
    return _Usable(share.to_iter_dataset(reading), records)


class _ShuffledFew(grain.MapDataset):
    """`shuffle` for small sources: grain's computes each place by trial, 10 ms for one of three."""

    def __init__(self, documents: grain.MapDataset, seed: int):
        super().__init__(documents)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._parent[epoch * len(self) + int(_order(len(self), self._seed, epoch)[place])]


@functools.lru_cache(64)
def _order(records: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(records).astype(np.uint16)


class _Usable(grain.IterDataset):
    """Documents, without what stands in the place of those left out."""

    def __init__(self, documents: grain.IterDataset, records: TokenRecords):
        super().__init__(documents)
        self._records = records

    def __iter__(self) -> grain.DatasetIterator:
        return _UsableIterator(self._parent.__iter__(), self._records)


class _UsableIterator(grain.DatasetIterator):
    """Counts what it reads, and what of it is left out and why."""

    def __init__(self, documents: grain.DatasetIterator, records: TokenRecords):
        super().__init__(documents)
        self._records = records
        self.read, self.skipped = 0, Counter()
        # Without an end of epochs, a shard would look for ever where there is nothing; and it may miss what there is
        # for long, since in every epoch it sees but a share of the records.
        self._patience = min(20 * len(records), len(records) + 100_000) + 20

    def __next__(self) -> Row:
        for _ in range(self._patience):
            document: Signed | str = next(self._parent)
            self.read += 1
            if not isinstance(document, str):
                return {"tokens": document}
            self.skipped[document] += 1
        raise self._records.nothing_usable(self._patience, self.skipped)

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "read": self.read, "skipped": dict(self.skipped)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self.read, self.skipped = state["read"], Counter(state["skipped"])


def _find_usable(iterator: Any) -> _UsableIterator:
    while not isinstance(iterator, _UsableIterator):
        iterator = iterator._parent
    return iterator


def _packed(
    documents: grain.IterDataset, source: SourceConfig, seq_len: int, bins: int, seed: int, pad_id: int
) -> grain.IterDataset:
    if source.packing == "concat":
        return ConcatThenSplitIterDataset(documents, length_struct={"tokens": seq_len})
    if source.overlong == "split":
        documents = FlatMapIterDataset(documents, _SplitLong(seq_len))
    elif source.overlong == "truncate":
        documents = documents.map(_Truncate(seq_len))
    return BestFitPackIterDataset(
        documents,
        length_struct={"tokens": seq_len},
        num_packing_bins=bins,
        seed=seed,
        padding_struct={"tokens": int(signed(np.asarray(pad_id), np.asarray(False)))},
    )


def _bins(records: int, seq_len: int, shards: int) -> int:
    """Rows filled at a time: more leave less padding, but mix what lies far apart, so at most a shard's epoch."""
    least, most = _BINS
    return min(most, max(least, min(_PACKING_TOKENS // (seq_len * shards), records // shards)))


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


def _tuples(state: Any) -> Any:
    """grain compares its slices with tuples, which JSON gives back as lists."""
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    return tuple(_tuples(value) for value in state) if isinstance(state, list) else state
