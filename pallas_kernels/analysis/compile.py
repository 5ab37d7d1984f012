"""Compiles for chips that are not there: libtpu and the CUDA plugin bring the real compilers, and need no device.

The environment has to be right before libtpu is loaded: call `prepare_environment` early, or leave it to `schedule`,
which compiles in a process of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.analysis.cases import shapes_of
from pallas_kernels.analysis.traffic import described
from pallas_kernels.chip import named_chip

# the smallest slice of each generation that libtpu describes
TPU_TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# An H100 SXM as XLA describes one (its GpuTargetConfig), from the card's data sheet and CUDA's device properties.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
COMPILED_CHIPS = (*TPU_TOPOLOGIES, "h100")


class CompilerMissingError(RuntimeError):
    """The compiler for a chip isn't installed."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said: bytes on the device. `processor_seconds` are those of all its threads."""

    seconds: float
    processor_seconds: float
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int


def prepare_environment() -> None:
    """Lets libtpu compile on a machine without TPUs, in several processes at once, and quietly."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def missing_compiler(chip: str) -> str | None:
    """Why nothing can be compiled for the chip here; None where it can."""
    if named_chip(chip).platform == "tpu":
        found = importlib.util.find_spec("libtpu") is not None
        return None if found else f"compiling for {chip} needs libtpu: pip install 'glm45-jax[aot]'"
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return f"compiling for {chip} needs jax-cuda13-plugin: pip install 'glm45-jax[aot]'"
    return None if cuda_folder() else f"compiling for {chip} needs ptxas: pip install nvidia-cuda-nvcc"


def cuda_folder() -> str | None:
    """Where ptxas is (in bin/): the nvidia-cuda-nvcc wheel, else a toolkit of the machine."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(p) / "cu13" for p in (spec.submodule_search_locations or ())] if spec else []
    on_path = shutil.which("ptxas")
    places += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *([Path(on_path).parents[1]] if on_path else [])]
    return next((str(p) for p in places if (p / "bin" / "ptxas").exists()), None)


@functools.cache
def described_mesh(chip: str, devices: int = 1) -> Mesh:
    """A mesh of one axis, "x", of devices of the chip, described to the compiler; a TPU's has up to four.

    Raises:
      CompilerMissingError: libtpu, or the CUDA plugin with ptxas, is not installed.
    """
    if why := missing_compiler(chip):
        raise CompilerMissingError(why)
    prepare_environment()
    if chip in TPU_TOPOLOGIES:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPU_TOPOLOGIES[chip])
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=chip, target_config=H100, topology="1x1x1"
        )
    return Mesh(np.array(topology.devices[:devices]), ("x",))


def compile_for(chip: str, fn: Callable[..., Any], *args: Any) -> Compiled:
    """Compiles `fn` for one device of the chip, traced with its mesh in force.

    Args:
      args: arrays or shapes; shapes are all that is used of them.
    """
    mesh = described_mesh(chip)
    gpu = named_chip(chip).platform == "gpu"
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere)  # noqa: E731
    placed = jax.tree.map(place, shapes_of(args))
    options = {"xla_gpu_cuda_data_dir": cuda_folder(), "xla_gpu_autotune_level": "0"} if gpu else None
    start, busy = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        traced = jax.jit(lambda *xs: fn(*xs)).trace(*placed)
        compiled = traced.lower(lowering_platforms=("cuda" if gpu else "tpu",)).compile(compiler_options=options)
    memory: Any = compiled.memory_analysis()
    return Compiled(
        time.perf_counter() - start,
        time.process_time() - busy,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
    )


def program_hash(chip: str, fn: Callable[..., Any], *args: Any) -> str:
    """A hash of the program lowered for the chip, the same wherever its source lies. Needs no compiler."""
    platform = "cuda" if named_chip(chip).platform == "gpu" else "tpu"
    config: Any = jax.config
    before = config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)  # a kernel carries the lines that it comes from with it
    try:
        with described(chip):
            text = jax.jit(lambda *xs: fn(*xs)).trace(*shapes_of(args)).lower(lowering_platforms=(platform,)).as_text()
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
