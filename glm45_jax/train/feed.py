"""A run's batches on their way to the devices: each process makes the rows that its devices need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glm45_jax.data import BatchIterator
from glm45_jax.data.pipeline import merge_states
from glm45_jax.errors import UserError
from glm45_jax.train.distributed import gather
from glm45_jax.train.placement import place_batch, rows_here

Batch = dict[str, Any]


class Feed(Iterator[Batch]):
    """Batches as arrays over the mesh, or as they are without one.

    With several processes, data that have an end (`ends`) end for all when they have ended for each: all ask one
    another before each batch, when no other program is under way that speaks with other processes.
    """

    def __init__(self, data: BatchIterator, mesh: Mesh | None, shards: Sequence[int] | None, *, ends: bool):
        self._data, self._mesh, self._shards = data, mesh, shards
        self.ends = ends and jax.process_count() > 1
        self.tokens = 0  # of the last batch, padding left out; with several processes as many as this one's share says

    def __next__(self) -> Batch:
        batch = self.take()
        if batch is None:
            raise StopIteration
        return batch

    def take(self, batch_size: int | None = None) -> Batch | None:
        """The next `batch_size` rows of all processes together; None where the data end."""
        size = batch_size or self._data.batch_size
        batch = self._data.next_batch(size)
        if self.ends and any(state is not None for state in gather(None if batch is None else 0)):
            batch = self._data.padding_batch(size) if batch is None else batch
        if batch is None:
            return None
        rows = self._rows(size)
        self.tokens = int(np.count_nonzero(batch["segment_ids"])) * size // len(rows)
        return batch if self._mesh is None else place_batch(batch, rows, size, self._mesh)

    def report(self) -> list[str]:
        """How often each source was read, and what was left out."""
        lines = []
        for name, passes in self._data.epochs().items():
            left_out = ", ".join(f"{n:,} {reason}" for reason, n in self._data.skipped_by_source()[name].items())
            lines.append(f"{name}: read {passes:.2f} times" + (f"; records left out: {left_out}" if left_out else ""))
        return lines

    def get_state(self) -> dict[str, Any]:
        """The place in the data of all processes together, which all must ask for."""
        return merge_states(gather(self._data.get_state()))

    def set_state(self, state: dict[str, Any]) -> None:
        self._data.set_state(state)

    def close(self) -> None:
        self._data.close()

    def _rows(self, size: int) -> list[int]:
        """Which rows of a batch of all processes this one makes."""
        each = size // self._data.shards
        return [
            row for shard in self._shards or range(self._data.shards) for row in range(shard * each, (shard + 1) * each)
        ]


def shards_here(count: int, batch_size: int, mesh: Mesh) -> list[int]:
    """The data shards whose rows this process's devices need; several processes may need the same.

    Raises:
      UserError: with several processes, some rows of a shard alone.
    """
    each = batch_size // count
    rows = rows_here(batch_size, mesh)
    shards = sorted({row // each for row in rows})
    if len(rows) != len(shards) * each:
        raise UserError(
            f"{count} data shards of {each} rows each cannot be dealt to {jax.process_count()} processes in whole "
            "shards: set data.shards to a multiple of their number"
        )
    return shards
