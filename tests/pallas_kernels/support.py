"""What the tests of the kernels share: the implementations that run on this machine, and quantised weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

# The TPU's kernels run in the interpreter, which is slow: only with the whole suite.
IMPLEMENTATIONS = ["reference", "cpu", pytest.param("tpu", marks=pytest.mark.slow)]
NATIVE = ("native", "cpu")  # as left to choose on a CPU: native code does not do all that is asked
WITH_NATIVE = [*IMPLEMENTATIONS, pytest.param(NATIVE, id="native")]


@contextlib.contextmanager
def on(implementation: str | tuple[str, ...], **interpreter: Any) -> Iterator[None]:
    """Where `implementation` runs: the TPU's in the interpreter, unwritten memory NaN; a race is an error.

    Copies happen as late as they are waited for, and one core runs, unless the interpreter is told otherwise.
    """
    if implementation != "tpu":
        yield
        return
    printed = io.StringIO()  # the interpreter says of a race no more than this
    with contextlib.redirect_stdout(printed):
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, **interpreter)):
            yield
        jax.effects_barrier()
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()[:2000]


def quantise(weights: np.ndarray, dtype: str, per: str) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """[E, K, N] as quantised values, their scale, and in float64 what both stand for."""
    groups, k, n = weights.shape
    kb, nb = (1, n) if per == "channel" else (-(-k // 128), -(-n // 128))
    scale = np.random.default_rng(7).uniform(0.01, 0.05, size=(groups, kb, nb)).astype(np.float32)
    factors = scale if per == "channel" else scale.repeat(128, 1)[:, :k].repeat(128, 2)[..., :n]
    values = jnp.asarray(np.clip(np.round(weights * 40), -127, 127), dtype)
    return values, jnp.asarray(scale), np.asarray(values, np.float64) * factors
