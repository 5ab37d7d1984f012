"""Running Mosaic GPU kernels: on a Hopper GPU where there is one, else in the interpreter that newer JAX has.

The interpreter knows `wgmma` of two buffers only. A left side in registers, which attention has, is added here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.chip import chip_of_kind

HOPPER_AT_HAND = (chip := chip_of_kind(jax.devices()[0].device_kind)) is not None and chip.platform == "gpu"
needs_hopper = pytest.mark.skipif(
    not (HOPPER_AT_HAND or hasattr(plgpu, "force_gpu_interpret_mode")),
    reason="the Mosaic GPU interpreter is public from jax 0.12 on (docs/kernels/gpu.md)",
)


def on_hopper() -> contextlib.AbstractContextManager[None]:
    """Where GPU kernels run: on the GPU at hand as they are, else on the CPU."""
    return contextlib.nullcontext() if HOPPER_AT_HAND else _interpreted()


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    """GPU kernels traced in here run on the CPU; a race between warpgroups or copies raises.

    On two multiprocessors, so that each goes through several tiles and uses its buffers again.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret

    interpreter = jaxpr_interpret.JaxprInterpreter
    buffers_only = interpreter._interpret_wgmma_ref_p

    def wgmma(self, eqn, token, get_invals):
        run = _wgmma_of_registers if type(eqn.invars[1].aval) is jax.core.ShapedArray else buffers_only
        return run(self, eqn, token, get_invals)

    with (
        mock.patch.object(interpreter, "_interpret_wgmma_ref_p", wgmma),
        mock.patch.object(mosaic_gpu, "_MULTIPROCESSORS", 2),
        mock.patch.object(mosaic_gpu, "_CLUSTER", 1),  # the interpreter has no copies to several blocks
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
    ):
        try:
            yield
        except BaseException:
            gpu_callbacks.reset_gpu_interpret_mode_state()
            raise


def _wgmma_of_registers(self: Any, eqn: Any, token: jax.Array, get_invals: Any) -> tuple[jax.Array, list[Any]]:
    """acc += a @ b, where a is an array: what the interpreter does for two buffers, with one buffer less."""
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    acc, a, b, *leaves = get_invals()
    assert not eqn.params["acc_transforms_tree"] and not eqn.params["a_transforms_tree"]
    transforms = jax.tree.unflatten(eqn.params["b_transforms_tree"] or jax.tree.structure([]), leaves)
    add = gpu_callbacks.fail_on_exception(functools.partial(_add_product, source_info=eqn.source_info))
    operands = {"acc": acc, "a": a, "b": b, "transforms": transforms}
    where = {"mesh_location": self.mesh_location, "thread": self.thread}
    return callback.io_callback(add, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, **operands, **where), []


def _add_product(*, token, acc, a, b, transforms, mesh_location, thread, source_info):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory

    shared = gpu_callbacks._get_shared_memory()
    info = {"logging_info": memory.GPULoggingInfo(mesh_location, thread, source_info)}
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    acc, b = (gpu_callbacks.HostAllocationKey.from_array(x) for x in (acc, b))
    right, _, _ = shared.get_buffer_content(b, shared.access(b, transforms), thread, **info)
    everything = shared.access(acc, ())
    sum_, _, _ = shared.get_buffer_content(acc, everything, thread, **info)
    sum_ = sum_ + np.matmul(np.asarray(a), right, dtype=sum_.dtype)
    shared.store_buffer_content(acc, everything, sum_, thread, **info)
    return token
