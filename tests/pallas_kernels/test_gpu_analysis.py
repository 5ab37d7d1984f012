"""The counter on kernels of Mosaic GPU, against products and bytes counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention, grouped_matmul, grouped_swiglu, linear_cross_entropy
from pallas_kernels.analysis import UnknownValueError, count_traffic

SIZES = np.array([256, 128, 0, 384], np.int32)
M, K, N, E = 768, 128, 192, len(SIZES)


def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def counted(fn, *args):
    return count_traffic(fn, *args, chip="h100", platform="cuda").kernels


def product(lhs, rhs, sizes, **options):
    return grouped_matmul(lhs, rhs, sizes, implementation="gpu", **options)


def by_operand(kernel) -> list[tuple[float, float]]:
    return [(o.read_bytes, o.written_bytes) for o in kernel.operands]


def test_whole_tiles_of_a_grouped_product() -> None:
    """Every row meets its matrix once; the matrix of the group without rows is not read."""
    (kernel,) = counted(product, shape(M, K), shape(E, K, N), SIZES)
    assert kernel.name == "grouped_matmul_gpu_rows"
    assert kernel.flops == 2 * M * K * N
    assert by_operand(kernel) == [(2 * M * K, 0), (2 * 3 * K * N, 0), (0, 2 * M * N)]


def test_tiles_that_groups_share_count_what_they_pad() -> None:
    """128 and 130 rows: parts of 64 rows, of which the second group has three, the last for two rows."""
    (kernel,) = counted(product, shape(258, K), shape(2, K, N), np.array([128, 130], np.int32))
    assert kernel.flops == 2 * 5 * 64 * K * N
    assert by_operand(kernel)[2] == (0, 2 * 264 * N)  # rows come by eights


def test_the_blocks_of_a_cluster_share_what_they_load() -> None:
    """Groups large enough for clusters: each half of a tile of a matrix is loaded by one block for both."""
    sizes = np.full(4, 1024, np.int32)
    (kernel,) = counted(product, shape(4096, K), shape(4, K, N), sizes)
    assert kernel.flops == 2 * 4096 * K * N
    assert by_operand(kernel) == [(2 * 4096 * K, 0), (2 * 4 * K * N, 0), (0, 2 * 4096 * N)]


def test_gradients_of_a_grouped_product() -> None:
    def loss(lhs, rhs, sizes):
        return product(lhs, rhs, sizes).astype(jnp.float32).sum()

    kernels = counted(jax.grad(loss, (0, 1)), shape(M, K), shape(E, K, N), SIZES)
    assert [k.name for k in kernels] == ["grouped_matmul_gpu_rows", "grouped_matmul_gpu_gradient"]
    assert all(k.flops == 2 * M * K * N for k in kernels)
    assert by_operand(kernels[1]) == [(2 * M * K, 0), (2 * M * N, 0), (0, 2 * E * K * N)]


def test_two_products_in_one_kernel() -> None:
    def swiglu(x, gate, up, sizes):
        return grouped_swiglu(x, gate, up, sizes, implementation="gpu")

    (kernel,) = counted(swiglu, shape(M, K), shape(E, K, N), shape(E, K, N), SIZES)
    assert kernel.flops == 2 * 2 * M * K * N


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_the_blocks_that_are_seen(causal: bool) -> None:
    heads, kv_heads, length, dim, block = 4, 2, 512, 128, 128

    def attend(q, k, v):
        return flash_attention(q, k, v, causal=causal, implementation="gpu")

    (kernel,) = counted(attend, shape(1, length, heads, dim), *[shape(1, length, kv_heads, dim)] * 2)
    blocks = length // block
    met = blocks * (blocks + 1) // 2 if causal else blocks**2
    assert kernel.flops == 2 * 2 * heads * met * block * block * dim
    assert sum(o.read_bytes for o in kernel.operands) == 2 * length * dim * (heads + 2 * kv_heads)


def test_the_heads_product() -> None:
    tokens, vocabulary, width = 256, 512, 128

    def loss(x, head, targets):
        return linear_cross_entropy(x, head, targets, implementation="gpu")[0].sum()

    kernels = counted(loss, shape(tokens, width), shape(width, vocabulary), np.zeros(tokens, np.int32))
    assert sum(k.flops for k in kernels) == 2 * tokens * vocabulary * width


def test_sizes_that_are_not_known_are_refused() -> None:
    with pytest.raises(UnknownValueError, match="depends on values that were not given"):
        counted(product, shape(M, K), shape(E, K, N), shape(E, dtype=jnp.int32))
