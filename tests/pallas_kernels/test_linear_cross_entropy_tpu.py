"""The tiles of linear_cross_entropy's TPU kernel, and the bytes that they make it move."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import linear_cross_entropy
from pallas_kernels.analysis.traffic import count_traffic
from pallas_kernels.chip import CHIPS
from pallas_kernels.linear_cross_entropy.problem import Tiling
from pallas_kernels.linear_cross_entropy.tiling import choose, vmem_bytes
from pallas_kernels.mosaic import VMEM_SHARE

TPUS = [chip for chip in CHIPS.values() if chip.platform == "tpu"]


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_tiles_fit_every_chip(chip) -> None:
    widths, dtypes = (32, 4096, 5120, 8192), (jnp.bfloat16, jnp.float32)
    for tokens, width, hidden, head in itertools.product((1, 100, 3000, 131072), widths, dtypes, dtypes):
        tiling = choose(chip, tokens, width, 151552, hidden, head)
        assert vmem_bytes(tiling, width, hidden, head) <= VMEM_SHARE * chip.on_chip_bytes
        assert min(tiling.tokens, tiling.vocabulary) > 0 == tiling.tokens % 128 == tiling.vocabulary % 128
        tiles = -(-tokens // tiling.tokens)
        assert tiles * tiling.tokens - tokens < 128 * tiles  # shared out evenly
        assert tiles >= chip.cores or tokens <= 128


def test_the_model_of_vmem() -> None:
    """A tile of hidden once, two of the head and its cast copy, three blocks of logits, rows of eight."""
    tiling = Tiling(tokens=256, vocabulary=128)
    hidden, head, logits, rows = 256 * 64 * 2, 128 * 64 * (2 * 4 + 2), 3 * 256 * 128 * 4, 8 * 256 * 4 * 12
    assert vmem_bytes(tiling, 64, jnp.bfloat16, jnp.float32) == hidden + head + logits + rows


def test_rows_too_wide_are_left_to_another() -> None:
    with pytest.raises(NotImplementedError, match="too wide"):
        choose(CHIPS["v4"], 128, 1 << 17, 1000, jnp.float32, jnp.float32)
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((4, 1 << 17), "f4"), ((1 << 17, 9), "f4"), ((4,), "i4"))]
    jax.export.export(jax.jit(linear_cross_entropy), platforms=["tpu"])(*shapes)


@pytest.mark.parametrize(("tokens", "least"), [(100, 1.01), (2048, 1.01), (8192, 4)])
def test_the_head_is_read_once_for_each_tile_of_tokens(tokens: int, least: float) -> None:
    """Counted bytes of the kernel against hidden and head read once."""
    width, vocabulary = 4096, 151552
    shapes = (tokens, width), (vocabulary, width)
    hidden, head = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    call = lambda *args: linear_cross_entropy(*args, transpose_head=True, implementation="tpu")  # noqa: E731
    (kernel,) = count_traffic(call, hidden, head, targets, chip="v5e").kernels
    assert kernel.total_bytes <= least * 2 * width * (tokens + vocabulary)
