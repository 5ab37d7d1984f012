"""paged_attention inside larger programs, and what only its TPU kernel has: tiling, two cores, copies in place."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from pallas_kernels import paged_attention
from pallas_kernels.chip import CHIPS
from pallas_kernels.mosaic import VMEM_SHARE
from pallas_kernels.paged_attention import rows, tpu
from pallas_kernels.paged_attention.tiling import Problem, Tiling, check, choose, vmem_bytes
from tests.pallas_kernels.support import on
from tests.pallas_kernels.test_paged_attention import MIXTURES, Case
from tests.support import quick_jit

GLM = Problem(2048, 96, 8, 128, 64, 2048, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))


def _layers(pages, q, k, v, table, lengths, starts, num_rows):
    """A model's use of it: every layer writes to its pages, and reads them, in one scan."""

    def layer(carry, i):
        q, pages = carry
        out, pages = paged_attention(q, k, v, pages, table, lengths, starts, num_rows, layer=i)
        return (q + out, pages), None

    return jax.lax.scan(layer, (q, pages), jnp.arange(pages.shape[0]))[0]


def _shapes(dtype, page_dtype, rows_=8, layers=4, num_pages=512):
    array, integers = (lambda *s: jax.ShapeDtypeStruct(s, dtype)), lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    pages = jax.ShapeDtypeStruct((layers, num_pages, 2, 64, 256), page_dtype)
    new = array(rows_, 2, 128)
    return pages, array(rows_, 12, 128), new, new, integers(rows_, 64), integers(rows_), integers(rows_ + 1), integers()


def test_a_scan_over_layers_updates_float32_pages_in_place_on_cpu() -> None:
    shapes = _shapes(jnp.float32, jnp.float32)
    compiled = jax.jit(_layers, donate_argnums=0).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    pages = int(np.prod(shapes[0].shape)) * 4
    assert memory.temp_size_in_bytes < pages / shapes[0].shape[0] / 20 and memory.alias_size_in_bytes >= pages


@pytest.mark.slow
def test_a_scan_over_layers_updates_pages_in_place_on_a_tpu(tpu_mesh) -> None:
    shapes = _shapes(jnp.bfloat16, jnp.bfloat16)
    with jax.set_mesh(tpu_mesh):
        place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(tpu_mesh, Spec()))  # noqa: E731
        lowered = jax.jit(_layers, donate_argnums=0).trace(*map(place, shapes)).lower(lowering_platforms=("tpu",))
        memory = lowered.compile().memory_analysis()
    pages = int(np.prod(shapes[0].shape)) * 2
    assert "tpu_custom_call" in lowered.as_text()
    assert memory.temp_size_in_bytes < pages / shapes[0].shape[0] / 20 and memory.alias_size_in_bytes >= pages


@pytest.fixture
def tpu_mesh():
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return jax.sharding.Mesh(np.array(devices)[:1], ("x",))


@pytest.mark.slow
def test_heads_over_devices_in_a_checked_shard_map() -> None:
    """In a process of its own: two devices, with the threads of eight, for the interpreter may wait forever for one."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    program = "from tests.pallas_kernels import test_paged_attention_tpu as t; t.heads_over_devices()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("done") == 2


def heads_over_devices() -> None:
    """Each device has a KV head and its pages: nothing is exchanged."""
    case = Case(MIXTURES["mixture"], page_dtype="int8", layers=2)
    args, options = case.arguments()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("heads",))
    heads, stacked = Spec(None, "heads"), Spec(None, None, "heads")

    def attend(implementation, *args):
        *args, layer, kv_scale = args
        tiling = Tiling(2 * case.page_size, (8,))
        return paged_attention(*args, layer=layer, kv_scale=kv_scale, implementation=implementation, tiling=tiling)

    for implementation in ("cpu", "tpu"):
        sharded = jax.shard_map(
            functools.partial(attend, implementation),
            mesh=mesh,
            in_specs=(heads, heads, heads, stacked, *[Spec()] * 5, stacked),
            out_specs=(heads, stacked),
        )
        with on(implementation):
            out = jax.block_until_ready(quick_jit(sharded)(*args, options["layer"], options["kv_scale"]))
        case.check(*out, 3e-6)
        print(implementation, "done")


@pytest.mark.slow
def test_two_cores_share_the_rows() -> None:
    """A chip whose cores share a device: they run side by side, in memory of their own."""
    case = Case(MIXTURES["mixture"])
    args, _ = case.arguments()
    call = functools.partial(paged_attention, implementation="tpu", chip="v5p", tiling=Tiling(16, (8,)))
    with on("tpu", num_cores_or_threads=2):
        out = jax.block_until_ready(quick_jit(call)(*args))
    case.check(*out, 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mixture", ["mixture", "one long prompt"])
def test_copies_that_happen_when_they_start(mixture: str) -> None:
    """As late as they are waited for they happen in the other tests: what is fetched too early shows only here."""
    case = Case(MIXTURES[mixture])
    args, _ = case.arguments()
    call = functools.partial(paged_attention, implementation="tpu", tiling=Tiling(16, (8,)))
    with on("tpu", dma_execution_mode="eager"):
        out = jax.block_until_ready(quick_jit(call)(*args))
    case.check(*out, 3e-6)


def test_cores_get_whole_rows_and_equal_shares() -> None:
    cut = quick_jit(lambda s, n: (i := rows.cut(s, n, 64, 8), tpu._bounds(i, 16, 2)))
    for tokens, lengths in (
        ([1] * 8, [160] * 8),
        ([1, 0, 40, 1, 1], [900, 3, 40, 400, 400]),
        ([0, 0], [0, 5]),
        ([64], [64]),
    ):
        items, bounds = cut(jnp.asarray(np.cumsum([0, *tokens]), jnp.int32), jnp.asarray(lengths, jnp.int32))
        row, bounds = np.asarray(items.row), np.asarray(bounds)
        assert bounds[0] == 0 and bounds[-1] == int(items.count) and (np.diff(bounds) >= 0).all()
        assert not set(row[: bounds[1]]) & set(row[bounds[1] : bounds[2]])
        if len(tokens) == 8:
            assert bounds[1] == 4


@pytest.mark.parametrize("chip", [c for c in CHIPS.values() if c.platform == "tpu"], ids=lambda c: c.name)
def test_tiling_fits_every_chip_and_uses_it(chip) -> None:
    budget = VMEM_SHARE * chip.on_chip_bytes
    for changes in (
        {},
        {"num_tokens": 64},
        {"num_tokens": 1, "pages_per_row": 1},
        {"page_size": 128, "page_dtype": jnp.dtype(jnp.int8)},
        {"num_heads": 12, "kv_heads": 1},
        {"num_heads": 96, "kv_heads": 1},
        {"num_heads": 64, "head_dim": 64},
        {"dtype": jnp.dtype(jnp.float32), "page_dtype": jnp.dtype(jnp.float32)},
        {"page_size": 256, "pages_per_row": 512},
    ):
        problem = dataclasses.replace(GLM, **changes)
        tiling = choose(problem, chip)
        assert vmem_bytes(problem, tiling) <= budget, problem
        assert tiling.kv_block % problem.page_size == 0 and tiling.token_tiles == tuple(sorted(tiling.token_tiles))
    assert choose(GLM, chip).token_tiles[-1] >= 16 and choose(GLM, chip).kv_block >= 256


def test_what_the_kernel_cannot_take_is_said_and_left_to_others() -> None:
    with pytest.raises(NotImplementedError, match="head size 80"):
        check(dataclasses.replace(GLM, head_dim=80))
    with pytest.raises(NotImplementedError, match="pages of 16 tokens of int8, not a multiple of 32"):
        check(dataclasses.replace(GLM, page_size=16, page_dtype=jnp.dtype(jnp.int8)))
    args, _ = Case(MIXTURES["one token"]).arguments()
    args = (args[0][..., :20], args[1][..., :20], args[2][..., :20], args[3][..., :40], *args[4:])
    with pytest.raises(NotImplementedError, match="tpu: head size 20"):
        paged_attention(*args, implementation="tpu")
    jax.block_until_ready(quick_jit(functools.partial(paged_attention, implementation=("tpu", "cpu")))(*args))
