"""When a run stops before its last step: a signal to any of its processes, or the end of its time."""

from __future__ import annotations

import collections
import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

SIGNAL, TIME = 2, 1  # why


class Stopping:
    """Whether, and why, to take no further step. Several processes agree without waiting for one another.

    Each gives its vote to every step, the devices find the highest, and that is read one step later, when it is there
    anyway: all stop after the same step, at most two after the one at which the first of them wanted to.
    """

    def __init__(self, signalled: threading.Event, mesh: Mesh | None, max_minutes: float | None):
        self._signalled = signalled
        self._deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._mesh = mesh if jax.process_count() > 1 else None
        self._counted: collections.deque[jax.Array] = collections.deque(maxlen=2)

    def reason(self) -> int:
        """`SIGNAL` or `TIME`, once all processes know of it; 0 before."""
        if self._mesh is None:
            return self._wanted()
        return int(self._counted[0]) if len(self._counted) == 2 else 0

    def vote(self) -> Int[Array, " devices"] | None:
        """For the next step. None where a process decides for itself."""
        if self._mesh is None:
            return None
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        mine = np.full(1, self._wanted(), np.int32)
        return jax.make_array_from_callback((self._mesh.size,), sharding, lambda _: mine)

    def count(self, highest: Int[Array, ""] | None) -> None:
        """The highest vote that the step found."""
        if highest is not None:
            self._counted.append(highest)

    def _wanted(self) -> int:
        if self._signalled.is_set():
            return SIGNAL
        return TIME if time.monotonic() > self._deadline else 0


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
