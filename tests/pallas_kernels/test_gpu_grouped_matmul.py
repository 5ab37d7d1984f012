"""The Mosaic GPU grouped matmul: in the interpreter against float64, and its model of shared memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import grouped_matmul, mosaic_gpu
from pallas_kernels.analysis.traffic import described
from pallas_kernels.grouped_matmul import gpu_gradient, gpu_rows
from tests.pallas_kernels.hopper import needs_hopper, on_hopper
from tests.support import quick_jit

# rows of all groups, first group of this shard, groups of this shard, rows past the last group, K, N, [E, N, K]
CASES = {
    "tile edges": ([127, 0, 129, 128], 0, 4, 0, 64, 128, False),
    "a shard between others": ([3, 70, 0, 61, 9], 1, 3, 5, 128, 192, True),
    "one row": ([0, 1, 0], 0, 3, 0, 64, 64, False),
    "all in one, many columns": ([0, 0, 300], 0, 3, 20, 64, 448, True),
    "no rows routed": ([0, 0], 0, 2, 13, 64, 64, False),
    "another shard's alone": ([9, 150], 0, 1, 0, 192, 64, False),
}


def _inputs(case):
    """lhs, rhs [L, E, K, N], dout, group sizes, and each group's rows; NaN in rows of no group of this shard."""
    sizes, offset, groups, past, k, n, _ = CASES[case]
    rng, num_rows, ends = np.random.default_rng(0), sum(sizes) + past, np.cumsum(sizes)
    rows = [slice(ends[offset + g] - sizes[offset + g], ends[offset + g]) for g in range(groups)]
    elsewhere = np.ones((num_rows, 1), bool)
    elsewhere[rows[0].start : rows[-1].stop] = False
    lhs, rhs, dout = (rng.normal(size=shape) for shape in [(num_rows, k), (2, groups, k, n), (num_rows, n)])
    lhs, dout = (np.where(elsewhere, np.nan, x) for x in (lhs, dout))
    return *(jnp.asarray(x, jnp.bfloat16) for x in (lhs, rhs, dout)), jnp.asarray(sizes, jnp.int32), rows


@needs_hopper
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str) -> None:
    _, offset, _, _, _, _, transpose = CASES[case]
    lhs, rhs, dout, sizes, rows = _inputs(case)
    given = jnp.swapaxes(rhs, 2, 3) if transpose else rhs

    def product(lhs, rhs):
        options = {"group_offset": offset, "transpose_rhs": transpose, "layer": 1, "implementation": "gpu"}
        return grouped_matmul(lhs, rhs, sizes, **options)

    with on_hopper():
        out, pull = jax.vjp(product, lhs, given)
        dlhs, drhs = pull(jnp.where(jnp.isnan(dout), jnp.inf, dout))
    drhs = jnp.swapaxes(drhs, 2, 3) if transpose else drhs
    x, w, g = (np.asarray(a, np.float64) for a in (lhs, rhs[1], dout))
    expected = [np.zeros(out.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)]
    for group, mine in enumerate(rows):
        expected[0][mine] = x[mine] @ w[group]
        expected[1][mine] = g[mine] @ w[group].T
        expected[2][1, group] = x[mine].T @ g[mine]
    for found, right in zip((out, dlhs, drhs), expected):  # in bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), right, rtol=2**-8, atol=1e-4)


@needs_hopper
@pytest.mark.slow
def test_float32_result_has_float32_accuracy() -> None:
    lhs, rhs, _, sizes, rows = _inputs("tile edges")
    with on_hopper():
        out = grouped_matmul(lhs, rhs[0], sizes, preferred_element_type=jnp.float32, implementation="gpu")
    for group, mine in enumerate(rows):
        expected = np.asarray(lhs, np.float64)[mine] @ np.asarray(rhs, np.float64)[0, group]
        np.testing.assert_allclose(out[mine], expected, atol=2e-5)


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("columns", [64, 128, 192, 1408, 1536, 2816, 4096, 5120])
def test_buffers_fit_shared_memory(columns: int, matrices: int) -> None:
    limit = 227 << 10
    rows, gradient = gpu_rows.tiling(columns, matrices), gpu_gradient.tiling(columns)
    for tiling, count in ((rows, matrices), (gradient, 1)):
        assert tiling.shared_bytes(count) <= mosaic_gpu.shared_memory_bytes() < limit
        assert tiling.stages >= 3 and tiling.columns * count <= 256
    # by hand, for the widest: stages of two arrays' bytes, and two buffers of 128 rows of 128 bytes
    widest = gpu_rows.tiling(4096)
    assert (widest.columns, widest.stages) == (256, 4)
    assert widest.shared_bytes() == 4 * (128 * 128 + 256 * 128) + 2 * 128 * 128


def test_vectors_come_in_whole_pieces() -> None:
    """On a GPU a copy of the last 8 of 72 numbers as a piece of 64 goes on into the next row: seen on an H200."""
    mosaic_gpu.check_whole(jnp.zeros((2, 128)), 64)
    with pytest.raises(AssertionError, match="vectors of 72"):
        mosaic_gpu.check_whole(jnp.zeros((2, 72)), 64)


def test_few_rows_get_narrow_tiles() -> None:
    """With a tile of rows for each of eight experts, no multiprocessor of an H100's 132 is idle."""
    assert gpu_rows.tiling(1408, 2, row_tiles=8).columns == 64
    assert gpu_rows.tiling(1408, 2, row_tiles=64).columns == 128


@pytest.mark.parametrize("tile_rows", [gpu_rows.ROWS, 2 * gpu_rows.ROWS])  # of a block, of a cluster of two
def test_work_list_covers_every_row_once(tile_rows: int) -> None:
    rng = np.random.default_rng(0)
    work_list = quick_jit(gpu_rows.work_list, static_argnums=(2, 3))
    for total in (0, 1, 8, *[1000] * 16):
        sizes = rng.multinomial(total, rng.dirichlet([0.3] * 7)).astype(np.int32)
        work = work_list(jnp.asarray(sizes[2:6]), jnp.int32(sizes[:2].sum()), 1000, tile_rows)
        assert int(work.count) <= len(work.group)
        owner = np.full(1000, 99)
        for group, row, begin, end in list(zip(*map(np.asarray, work[:-1])))[: int(work.count)]:
            assert row % 8 == 0 and 0 <= begin < end <= tile_rows
            assert (owner[row + begin : row + end] == 99).all()
            owner[row + begin : row + end] = group
        expected = np.repeat([-1, -1, 0, 1, 2, 3, 4], sizes)
        np.testing.assert_array_equal(owner, np.concatenate([expected, np.full(1000 - total, 4)]))


def test_in_a_checked_shard_map() -> None:
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def with_gradients(lhs, rhs, sizes):
        options = {"group_offset": 2 * jax.lax.axis_index("expert"), "implementation": "gpu"}
        out, pull = jax.vjp(lambda *x: grouped_matmul(*x, sizes, **options), lhs, rhs)
        return out, *pull(out)

    shapes = (16, 64), (2, 64, 128)
    lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    specs = P("expert"), P("expert"), P()
    spread = jax.shard_map(with_gradients, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=True)
    found = jax.eval_shape(spread, lhs, rhs, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert [x.shape for x in found] == [(16, 128), *shapes]


def test_what_has_no_kernel_is_said() -> None:
    sizes, wide = jnp.zeros(2, jnp.int32), jnp.zeros((2, 64, 64), jnp.bfloat16)
    narrow = jnp.zeros((2, 72, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16, not float32"):
        grouped_matmul(jnp.zeros((8, 64)), wide, sizes, implementation="gpu")
    with pytest.raises(NotImplementedError, match="64 n"):
        grouped_matmul(jnp.zeros((8, 72), jnp.bfloat16), narrow, sizes, implementation="gpu")
    with pytest.raises(NotImplementedError, match="quantised"):
        quantised, scale = wide.astype(jnp.int8), jnp.ones((2, 1, 64))
        grouped_matmul(jnp.zeros((8, 64), jnp.bfloat16), quantised, sizes, rhs_scale=scale, implementation="gpu")


@pytest.mark.slow
def test_left_to_choose_a_hopper_takes_the_kernel() -> None:
    """Lowered for CUDA it is the kernel where the mesh in force is an H100's and the kernel can; else portable XLA."""

    def is_kernel(dtype) -> bool:
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((64, 64), (2, 64, 64))]
        traced = jax.jit(grouped_matmul).trace(*shapes, jax.ShapeDtypeStruct((2,), jnp.int32))
        return "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()

    assert not is_kernel(jnp.bfloat16)
    with described("h100"):
        assert is_kernel(jnp.bfloat16) and not is_kernel(jnp.float32)
