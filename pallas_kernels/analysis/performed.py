"""Runs TPU kernels in interpret mode and sums the copies that they perform themselves: what the counter is held to.

The one place here that reaches into JAX's private interpreter, which has no public hook for its copies.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass
class PerformedCopies:
    """Bytes that kernels' own copies read from main memory and wrote to it, and how many copies there were."""

    read_bytes: int = 0
    written_bytes: int = 0
    copies: int = 0


def performed_copies(fn: Callable[..., Any], *args: Any) -> PerformedCopies:
    """Runs `fn(*args)`, its TPU kernels interpreted, at small shapes. The fetches of a grid are no copies here.

    Raises:
      NotImplementedError: JAX's interpreter isn't what this was written for.
    """
    params = pltpu.InterpretParams(skip_floating_point_ops=False, dma_execution_mode="eager")
    with _observed() as seen, pltpu.force_tpu_interpret_mode(params):
        jax.block_until_ready(jax.jit(lambda *xs: fn(*xs))(*args))
    return seen


@contextlib.contextmanager
def _observed() -> Iterator[PerformedCopies]:
    try:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

        read, spaces = interpreter.DMA.execute_read, interpreter.TPU_MEMORY_SPACE_NAMES
    except (ImportError, AttributeError) as e:
        raise NotImplementedError(f"the copies of this JAX's TPU interpreter cannot be observed: {e}") from e
    far = {i for i, name in spaces.items() if name in ("any", "hbm")}
    seen = PerformedCopies()

    def observe(copy: Any) -> None:
        before = copy.data
        read(copy)
        if before is None and copy.data is not None:
            seen.copies += 1
            seen.read_bytes += copy.data_size * (copy.src_memory_space in far)
            seen.written_bytes += copy.data_size * (copy.dst_memory_space in far)

    with mock.patch.object(interpreter.DMA, "execute_read", observe):
        yield seen
