"""Number formats in checkpoints: their names, exact casts between them, and FP8 codes with their scales.

A cast to a format that holds every value is exact and has an exact way back (`narrow`), NaN payloads included: that is
what a byte-identical round trip of a bfloat16 tensor stored in a float32 stack needs.
"""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np

F8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)

# safetensors' names of the formats that weights come in
BY_NAME = {"F32": F32, "BF16": BF16, "F16": F16, "F8_E4M3": F8}
NAMES = {dtype: name for name, dtype in BY_NAME.items()}
# Bits of every format that a safetensors file may hold; a GLM-4.5 checkpoint uses only the four above.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64,
    "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip
FLOATS = ("float32", "bfloat16", "float16")  # what params may be cast to

_F8_VALUES = np.arange(256, dtype=np.uint8).view(F8).astype(F32)
_STRIP = 256  # rows dequantised at a time: temporaries stay in the cache


def named(name: str) -> np.dtype:
    """The numpy dtype that zarr3, jax and numpy call `name`."""
    return np.dtype(getattr(ml_dtypes, name, name))


def common(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The smallest of the four formats that holds every value of all of `dtypes`."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    for dtype in (BF16, F16):
        if found <= {F8, dtype}:
            return dtype
    return F32


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` in `dtype`, rounded to nearest even where it is narrower."""
    if values.dtype == dtype:
        return values
    if values.dtype == F8:
        return _F8_VALUES[values.view(np.uint8)].astype(dtype, copy=False)
    if values.dtype == BF16 and dtype == F32:
        bits = np.ascontiguousarray(values).view(np.uint16).astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(F32)
    return values.astype(dtype)


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The inverse of a `cast` to a wider format: exact, also for NaNs."""
    if values.dtype == F32 and dtype == BF16:
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16).view(BF16)
    return values if values.dtype == dtype else values.astype(dtype)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of matrices [..., rows, columns] with one scale per block."""
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


def dequantise(
    codes: np.ndarray, scales: np.ndarray, block: tuple[int, int], origin: tuple[int, int], out: np.ndarray
) -> None:
    """`out` = bfloat16(float32(codes) * scales), for the part [R, C] of a matrix that begins at `origin`.

    `scales` are those of the blocks that the part touches. A scale per output channel is a block of one whole row.
    """
    rows = (np.arange(codes.shape[0]) + origin[0]) // block[0] - origin[0] // block[0]
    columns = (np.arange(codes.shape[1]) + origin[1]) // block[1] - origin[1] // block[1]
    scales = cast(scales, F32)
    for at in range(0, len(rows), _STRIP):
        strip = slice(at, at + _STRIP)
        factors = scales[rows[strip]]
        if factors.shape[1] > 1:
            factors = factors[:, columns]
        values = cast(codes[strip], F32) * factors
        out[strip] = cast(cast(values, BF16), out.dtype)
