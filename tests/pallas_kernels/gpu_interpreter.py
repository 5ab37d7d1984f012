"""Running Mosaic GPU kernels without a GPU: in the interpreter that newer JAX has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

HAS_INTERPRETER = hasattr(plgpu, "force_gpu_interpret_mode")
needs_interpreter = pytest.mark.skipif(
    not HAS_INTERPRETER, reason="the Mosaic GPU interpreter is public from jax 0.12 on (docs/kernels/gpu.md)"
)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """GPU kernels traced in here run on the CPU; a race between warpgroups or copies raises."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        try:
            yield
        except BaseException:
            gpu_callbacks.reset_gpu_interpret_mode_state()
            raise
