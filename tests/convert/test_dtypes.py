"""Casts that have an exact way back, and FP8 scales in both forms."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from glm45_jax.convert import dtypes
from glm45_jax.convert.dtypes import BF16, F8, F16, F32


@pytest.mark.parametrize(
    "narrow,wide", [(BF16, F32), (F16, F32), (F8, BF16), (F8, F16), (F8, F32)], ids=lambda dtype: dtype.name
)
def test_every_bit_pattern_comes_back(narrow: np.dtype, wide: np.dtype) -> None:
    unsigned = np.uint16 if narrow.itemsize == 2 else np.uint8
    patterns = np.arange(2 ** (8 * narrow.itemsize), dtype=np.uint32).astype(unsigned).view(narrow)
    with np.errstate(invalid="ignore"):
        back = dtypes.narrow(dtypes.cast(patterns, wide), narrow)
    assert back.tobytes() == patterns.tobytes()
    assert dtypes.common([narrow, wide]) == wide


def test_common_holds_all() -> None:
    assert dtypes.common([BF16, F16]) == F32
    assert dtypes.common([F8, BF16, F16]) == F32
    assert dtypes.common([F8]) == F8
    assert dtypes.common([F8, F16]) == F16


def test_casts_round_to_nearest_even() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert (dtypes.cast(values, BF16) == values.astype(ml_dtypes.bfloat16)).all()


@pytest.mark.parametrize("form", ["channel", "block"])
@pytest.mark.parametrize("scale_dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("part", [(0, 300, 0, 200), (37, 290, 100, 199), (128, 256, 128, 129)])
def test_dequantise(form: str, scale_dtype: np.dtype, part: tuple[int, int, int, int]) -> None:
    rng, shape = np.random.default_rng(1), (300, 200)
    block = (1, shape[1]) if form == "channel" else (128, 128)
    codes = rng.integers(0, 127, shape).astype(np.uint8).view(F8)
    scales = rng.uniform(0.001, 0.1, dtypes.scale_shape(shape, block)).astype(scale_dtype)
    expected = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected[i, j] = np.float32(codes[i, j]) * np.float32(scales[i // block[0], j // block[1]])
    r0, r1, c0, c1 = part
    touched = scales[r0 // block[0] : -(-r1 // block[0]), c0 // block[1] : -(-c1 // block[1])]
    out = np.empty((r1 - r0, c1 - c0), BF16)
    dtypes.dequantise(codes[r0:r1, c0:c1], touched, block, (r0, c0), out)
    assert out.tobytes() == expected[r0:r1, c0:c1].astype(BF16).tobytes()
