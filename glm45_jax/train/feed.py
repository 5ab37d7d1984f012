"""A run's batches on their way to the devices: each process makes the rows that its devices need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glm45_jax.data import BatchIterator
from glm45_jax.errors import UserError
from glm45_jax.train.distributed import gather
from glm45_jax.train.placement import place_batch, rows_here

Batch = dict[str, Any]


class Feed(Iterator[Batch]):
    """Batches as arrays over the mesh, or as they are without one.

    With several processes, data that have an end (`ends`) end for all with the first for which they do: all ask one
    another before each batch, when no other program is under way that speaks with other processes.
    """

    def __init__(self, data: BatchIterator, mesh: Mesh | None, *, ends: bool):
        self._data, self._mesh = data, mesh
        self.ends = ends and jax.process_count() > 1
        self._rows: dict[int, list[int]] = {}
        self.tokens = 0  # of the last batch, padding left out; with several processes as many as this one's share says

    def __next__(self) -> Batch:
        batch = next(self._data, None)
        if self.ends and None in gather(None if batch is None else 0):
            raise StopIteration
        if batch is None:
            raise StopIteration
        size = len(batch["tokens"])
        if self._mesh is None:
            self.tokens = int(np.count_nonzero(batch["segment_ids"]))
            return batch
        rows = self._rows.setdefault(size, rows_here(size, self._mesh))
        mine = {name: values[rows] for name, values in batch.items()}
        self.tokens = int(np.count_nonzero(mine["segment_ids"])) * size // len(rows)
        return place_batch(mine, rows, size, self._mesh)

    @property
    def skipped(self) -> int:
        return self._data.skipped

    def get_state(self) -> dict[str, Any]:
        """The place in the data of all processes together, which all must ask for."""
        return _merged(gather(self._data.get_state()))

    def set_state(self, state: dict[str, Any]) -> None:
        self._data.set_state(state)

    def close(self) -> None:
        self._data.close()


def _merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    # Every process reads all the data: their places are one and the same.
    if any(state != states[0] for state in states):
        raise UserError(
            "the processes are at different places in the data: do all read the same files, with the same settings?"
        )
    return states[0]
