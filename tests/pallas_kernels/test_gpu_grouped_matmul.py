"""The Mosaic GPU grouped matmul: in the interpreter against float64, and its model of shared memory."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.grouped_matmul import gpu, gpu_gradient, gpu_rows
from tests.pallas_kernels.gpu_interpreter import interpreted, needs_interpreter
from tests.support import quick_jit

# rows of all groups, first group of this shard, groups of this shard, rows past the last group, K, N
CASES = {
    "tile edges": ([127, 0, 129, 128], 0, 4, 0, 64, 128),
    "a shard between others": ([3, 70, 0, 61, 9], 1, 3, 5, 128, 192),
    "one row": ([0, 1, 0], 0, 3, 0, 64, 64),
    "all in one, many columns": ([0, 0, 300], 0, 3, 20, 64, 448),
    "no rows routed": ([0, 0], 0, 2, 13, 64, 64),
    "another shard's alone": ([9, 150], 0, 1, 0, 192, 64),
}


def _inputs(case):
    sizes, offset, groups, past, k, n = CASES[case]
    rng = np.random.default_rng(0)
    lhs, rhs, dout = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in [(sum(sizes) + past, k), (2, groups, k, n), (sum(sizes) + past, n)]
    )
    ends = np.cumsum(sizes)
    rows = [slice(ends[offset + g] - sizes[offset + g], ends[offset + g]) for g in range(groups)]
    # another group's rows must not leak into a gradient, whatever they hold
    mine = np.zeros(len(lhs), bool)
    mine[rows[0].start : rows[-1].stop] = True
    return jnp.where(mine[:, None], lhs, jnp.nan), rhs, dout, jnp.asarray(sizes, jnp.int32), jnp.int32(offset), rows


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True], ids=["KN", "NK"])
@pytest.mark.parametrize("case", CASES)
def test_forward(case: str, transpose: bool) -> None:
    lhs, rhs, _, sizes, offset, rows = _inputs(case)
    expected = np.zeros((len(lhs), rhs.shape[-1]))
    for group, mine in enumerate(rows):
        expected[mine] = np.asarray(lhs, np.float64)[mine] @ np.asarray(rhs, np.float64)[1, group]
    given = jnp.swapaxes(rhs, 2, 3) if transpose else rhs
    with interpreted():
        out = gpu.forward(
            lhs, given, None, sizes, offset, jnp.int32(1), transpose_rhs=transpose, dtype=jnp.dtype(jnp.float32)
        )
    np.testing.assert_allclose(out, expected, atol=2e-5)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_rhs_gradient(case: str) -> None:
    lhs, _, dout, sizes, offset, rows = _inputs(case)
    expected = [np.asarray(lhs, np.float64)[mine].T @ np.asarray(dout, np.float64)[mine] for mine in rows]
    transpose = case == "tile edges"
    with interpreted():
        out = gpu.rhs_gradient(
            lhs, dout, sizes, offset, num_groups=len(rows), transpose_rhs=transpose, dtype=jnp.dtype(jnp.float32)
        )
    np.testing.assert_allclose(jnp.swapaxes(out, 1, 2) if transpose else out, np.stack(expected), atol=1e-4)


@needs_interpreter
@pytest.mark.slow
def test_rows_written_in_bfloat16() -> None:
    lhs, rhs, _, sizes, offset, _rows = _inputs("a shard between others")
    arguments = (lhs, rhs, None, sizes, offset, jnp.int32(0))
    with interpreted():
        out, out32 = (gpu.forward(*arguments, transpose_rhs=False, dtype=jnp.dtype(t)) for t in ("bfloat16", "float32"))
    assert out.dtype == jnp.bfloat16 and (out == out32.astype(jnp.bfloat16)).all()


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("columns", [64, 128, 192, 1408, 1536, 2816, 4096, 5120])
def test_buffers_fit_shared_memory(columns: int, matrices: int) -> None:
    limit = 227 << 10
    rows, gradient = gpu_rows.tiling(columns, matrices), gpu_gradient.tiling(columns)
    for tiling, count in ((rows, matrices), (gradient, 1)):
        assert tiling.shared_bytes(count) <= mosaic_gpu.shared_memory_bytes() < limit
        assert tiling.stages >= 3 and tiling.columns * count <= 256
    # by hand, for the widest: three arrays' stages and two buffers of 128 rows of 128 bytes
    widest = gpu_rows.tiling(4096)
    assert (widest.columns, widest.stages) == (256, 4)
    assert widest.shared_bytes() == 4 * (128 * 128 + 256 * 128) + 2 * 128 * 128


def test_work_list_covers_every_row_once() -> None:
    rng = np.random.default_rng(0)
    work_list = quick_jit(gpu_rows.work_list, static_argnums=(2, 3))
    for total in (0, 1, 8, *[1000] * 16):
        sizes = rng.multinomial(total, rng.dirichlet([0.3] * 7))
        work = work_list(jnp.asarray(sizes, jnp.int32), jnp.int32(2), 4, 1000)
        assert int(work.count) <= len(work.group)
        owner = np.full(1000, 99)
        for group, row, begin, end in list(zip(*map(np.asarray, work[:-1])))[: int(work.count)]:
            assert row % 8 == 0 and 0 <= begin < end <= gpu_rows.ROWS
            assert (owner[row + begin : row + end] == 99).all()
            owner[row + begin : row + end] = group
        expected = np.repeat(np.arange(7) - 2, sizes)
        expected = np.where((expected >= 0) & (expected < 4), expected, np.where(expected < 0, -1, 4))
        np.testing.assert_array_equal(owner, np.concatenate([expected, np.full(1000 - total, 4)]))


def test_what_has_no_kernel_is_said() -> None:
    arguments = jnp.zeros(2, jnp.int32), jnp.int32(0), jnp.int32(0)
    keywords = {"transpose_rhs": False, "dtype": jnp.dtype(jnp.float32)}
    wide = jnp.zeros((1, 2, 64, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16, not float32"):
        gpu.forward(jnp.zeros((8, 64)), wide, None, *arguments, **keywords)
    with pytest.raises(NotImplementedError, match="64 n"):
        gpu.forward(jnp.zeros((8, 72), jnp.bfloat16), wide, None, *arguments, **keywords)
    with pytest.raises(NotImplementedError, match="quantised"):
        gpu.forward(jnp.zeros((8, 64), jnp.bfloat16), wide, jnp.ones((2, 1, 64)), *arguments, **keywords)
