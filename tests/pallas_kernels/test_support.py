"""The interpreter's finding of a race fails a test."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels.support import on


def test_a_race_is_an_error() -> None:
    def reads_too_early(x, out, buffer, done):
        copy = pltpu.make_async_copy(x, buffer, done)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    # jax 0.12 raises where 0.10 prints
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"), on("tpu"):
        pl.pallas_call(
            reads_too_early,
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        )(jnp.ones((8, 128)))
