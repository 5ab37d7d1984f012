"""The TPU's work list covers every row once, and its tilings fit every chip."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.analysis import count_traffic
from pallas_kernels.chip import CHIPS
from pallas_kernels.fused_moe import tiling as fused_tiling
from pallas_kernels.grouped_matmul import tiling, work
from pallas_kernels.mosaic import VMEM_SHARE
from tests.support import quick_jit

TPUS = [chip for chip in CHIPS.values() if chip.platform == "tpu"]


@pytest.mark.few(1)
@pytest.mark.parametrize("cores", [1, 2])
def test_every_row_is_visited_once(cores: int) -> None:
    """By one core and for its own region; the matrix at hand is that of the group, which each core fetches once."""
    rng = np.random.default_rng(0)
    run = quick_jit(work.over_all_rows, static_argnums=(2, 3, 4))
    for rows in (0, 1, *[100] * 12):
        sizes = rng.multinomial(rows, rng.dirichlet([0.3] * 6))
        first = int(rng.integers(0, 101 - rows))
        visits = run(jnp.asarray(sizes, jnp.int32), jnp.int32(first), 100, 16, cores)
        owner, region_of = np.zeros(100, int), np.full(100, -1)
        for core in range(cores):
            bounds, count = np.asarray(visits.bounds[core]), int(visits.count[core])
            for region, tile in zip(visits.region[core, :count], visits.tile[core, :count]):
                mine = np.arange(max(16 * tile, bounds[region]), min(16 * tile + 16, bounds[region + 1]))
                owner[mine] += 1
                region_of[mine] = region
            matrix, region = np.asarray(visits.matrix[core, :count]), np.asarray(visits.region[core, :count])
            grouped = (region > 0) & (region <= 6)
            fetched, tiles = np.asarray(visits.fetched[core, :count]), np.asarray(visits.tile[core, :count])
            np.testing.assert_array_equal(fetched[grouped], tiles[grouped])
            assert count > 0 and set(fetched) <= (set(tiles[grouped]) or {0})
            np.testing.assert_array_equal(matrix[grouped], region[grouped] - 1)
            assert (np.diff(matrix) >= 0).all() and set(matrix) <= (set(region[grouped] - 1) or {0})
        assert (owner == 1).all()
        expected = np.concatenate([np.zeros(first), np.repeat(np.arange(6) + 1, sizes)])
        np.testing.assert_array_equal(region_of, np.pad(expected, (0, 100 - len(expected)), constant_values=7))


def test_every_group_is_visited_for_its_gradient() -> None:
    visits = work.over_groups(jnp.array([3, 0, 20, 0]), jnp.int32(5), 32, 8)
    count = int(visits.count[0])
    assert list(visits.region[0, :count]) == [0, 1, 2, 2, 2, 3]
    assert list(visits.tile[0, :count])[2:5] == [1, 2, 3]


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_tilings_fit(chip) -> None:
    """Every shape of the models and some far from them; as few tiles of columns as the model of VMEM allows."""
    budget = VMEM_SHARE * chip.on_chip_bytes
    for rows, k, n, groups in [(8192, 4096, 2816, 16), (8, 5120, 1536, 160), (1, 7, 3, 2), (10**6, 65536, 300, 1)]:
        for size, weight in [("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "int8")]:
            for operands in [(1, 1, 0, 1), (1, 2, 1, 2), (2, 2, 0, 1)]:
                shape = tiling.Shape(rows, k, n, groups, operands, (size, weight, size))
                chosen = tiling.tile_rows(shape, chip)
                assert tiling.row_bytes(chosen, shape) < budget
                assert k % chosen.contracted == 0 and chosen.rows % chosen.step == 0
            gradient = tiling.tile_gradient(rows, k, n, (size, size), chip)
            assert tiling.gradient_bytes(gradient, (size, size)) < budget
    for tokens in (1, 64, 256):
        for d, f in [(4096, 1408), (5120, 1536), (10, 7)]:
            for weight in ("bfloat16", "int8"):
                shape = fused_tiling.Shape(tokens, d, f, ("bfloat16", weight))
                try:
                    chosen = fused_tiling.tile(shape, chip)
                except NotImplementedError:
                    assert chip.name == "v4" and tokens >= 64  # they go by way of the grouped matmuls
                    continue
                assert fused_tiling.kernel_bytes(chosen, shape) < budget and d % chosen.model == 0


def test_tiles_of_known_shapes() -> None:
    """The tilings whose figures the docs quote: whole matrices of Air's experts on every chip but the v4."""
    shape = tiling.Shape(8192, 4096, 1408, 16, (1, 1, 0, 1), ("bfloat16",) * 3)
    for chip in TPUS:
        chosen = tiling.tile_rows(shape, chip)
        assert (chosen.contracted, chosen.columns) == ((4096, 1408) if chip.name != "v4" else (4096, 512)), chip.name


@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_rows_of_no_group_are_not_fetched(chip: str) -> None:
    """A shard's share of the rows is one of eight, wherever it lies; results are written whole."""
    rows, weights = jax.ShapeDtypeStruct((8192, 512), jnp.bfloat16), jax.ShapeDtypeStruct((4, 512, 256), jnp.bfloat16)
    for offset in (0, 12, 28):
        op = functools.partial(grouped_matmul, group_offset=offset, implementation="tpu", chip=chip)
        (kernel,) = count_traffic(op, rows, weights, np.full(32, 256, np.int32)).kernels
        assert kernel.read_bytes <= 1024 * 512 * 2 + 2 * 512 * (512 * 2) + (4 + 1) * 512 * 256 * 2
        assert kernel.written_bytes >= 8192 * 256 * 2


@pytest.mark.few(1)
@pytest.mark.parametrize("offset", [0, 3, 7])
def test_cores_share_the_rows_of_a_shard(offset: int) -> None:
    visits = work.over_all_rows(jnp.full(4, 64), jnp.int32(offset * 256), 2048, 32, 2)
    in_groups = [
        int(((visits.region[c, : visits.count[c]] > 0) & (visits.region[c, : visits.count[c]] < 5)).sum())
        for c in range(2)
    ]
    assert in_groups == [4, 4]
