"""Matrices that come into memory quantised: FP8 as it lies in the checkpoint, or quantised matrix by matrix while read.

Either reads codes and scales of any part of a matrix, or of a stack, so that nothing but the result is ever whole.

Axes: O output features, I input features.
"""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import Executor
from typing import Protocol

import numpy as np

from glm45_jax.convert import dtypes, names
from glm45_jax.convert.hf_source import Quantised
from glm45_jax.convert.pieces import AnyLeaf, Index, Leaf
from glm45_jax.errors import UserError
from glm45_jax.model.quantize import CODES, KEEP, LARGEST, LEAST_SCALE, check_form, is_quantizable, rounded
from pallas_kernels.grouped_matmul.quantised import SCALE_BLOCK


class QuantizedLeaf(Protocol):
    """An array of the params tree that is read as codes and scales, laid out as `model.Quantized`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        ...

    def read_matrix(self, index: Index, codes: np.ndarray, scales: np.ndarray) -> None:
        """Fills [o, i] and [i blocks, o blocks] with a part of one matrix that begins and ends with whole blocks."""
        ...


@dataclasses.dataclass(frozen=True)
class Kept:
    """FP8 codes and scales of the checkpoint."""

    codes: Leaf
    scales: Leaf  # [..., o blocks, i blocks]
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        return self.codes.dtype

    def read_matrix(self, index: Index, codes: np.ndarray, scales: np.ndarray) -> None:
        self.codes.read(index, out=codes.reshape([part.stop - part.start for part in index]))
        parts = (slice(part.start // b, -(-part.stop // b)) for part, b in zip(index[-2:], self.block))
        stored = self.scales.read((*index[:-2], *parts))
        scales[...] = dtypes.cast(stored.reshape(stored.shape[-2:]), dtypes.F32).T


@dataclasses.dataclass(frozen=True)
class WhileRead:
    """A matrix in floating point, quantised as it is read."""

    leaf: AnyLeaf
    form: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return CODES[self.kind]

    @property
    def kind(self) -> str:
        return self.form.partition("-")[0]

    @property
    def block(self) -> tuple[int, int]:
        return (SCALE_BLOCK, SCALE_BLOCK) if "-" in self.form else (1, self.shape[-1])

    def read_matrix(self, index: Index, codes: np.ndarray, scales: np.ndarray) -> None:
        rows, columns = index[-2:]
        whole = columns if "-" in self.form else slice(0, self.shape[-1])  # a channel's scale is of all its columns
        shape = [part.stop - part.start for part in (*index[:-2], rows, whole)]
        values = self.leaf.read((*index[:-2], rows, whole), out=np.empty(shape, np.float32)).reshape(shape[-2:])
        tall, wide = self.block
        for o, i in itertools.product(range(scales.shape[1]), range(scales.shape[0])) if "-" in self.form else ():
            part = values[o * tall : (o + 1) * tall, i * wide : (i + 1) * wide]
            scales[i, o] = max(np.abs(part).max() / LARGEST[self.kind], LEAST_SCALE)
            part /= scales[i, o]
        if "-" not in self.form:
            scales[0] = np.maximum(np.abs(values).max(1) / LARGEST[self.kind], LEAST_SCALE)
            values /= scales[0][:, None]
            values = values[:, columns]
        codes[...] = rounded(values, self.kind, np)


def read(leaf: QuantizedLeaf, index: Index, pool: Executor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a part, which begins and ends with whole blocks."""
    sizes = [part.stop - part.start for part in index]
    tall, wide = (-(-size // b) for size, b in zip(sizes[-2:], leaf.block))
    if leaf.block[0] == 1:  # of a channel's part too there is one scale
        wide = 1
    codes = np.empty(sizes, leaf.dtype)
    scales = np.empty((*sizes[:-2], wide, tall), np.float32)

    def one(at: tuple[int, ...]) -> None:
        lead = tuple(slice(part.start + i, part.start + i + 1) for part, i in zip(index, at))
        leaf.read_matrix((*lead, *index[-2:]), codes[at], scales[at])

    for _ in pool.map(one, itertools.product(*map(range, sizes[:-2]))):
        pass
    return codes, scales


def quantised_leaves(
    leaves: dict[str, Leaf], floats: dict[str, AnyLeaf], quantised: Quantised | None, form: str, head: bool
) -> dict[str, Kept | WhileRead]:
    """Which arrays are read quantised, and how.

    Args:
      leaves: as they lie in the checkpoint, FP8 codes and their scales apart.
      floats: the model's arrays.
      form: "keep", or one of `quantize_params`; of "fp8" what is FP8 already stays as it is.
      head: the output heads too.

    Raises:
      UserError: an unknown form; "keep" where nothing is FP8; blocks of another size than 128.
    """
    if form != KEEP:
        check_form(form)
    kept = _kept(leaves, quantised) if form.startswith((KEEP, "fp8")) else {}
    if form == KEEP:
        if not kept:
            raise UserError(
                "quantize 'keep': no matrices of this checkpoint are FP8; choose int8 or fp8 to make them so"
            )
        return {**kept}
    wanted = {path: WhileRead(leaf, form) for path, leaf in floats.items() if is_quantizable(path, head)}
    return wanted | {path: leaf for path, leaf in kept.items() if is_quantizable(path, head=True)}


def _kept(leaves: dict[str, Leaf], quantised: Quantised | None) -> dict[str, Kept]:
    """Stacks that are FP8 throughout; of the experts' three all or none, since one op multiplies by them."""
    found = {}
    for path, leaf in leaves.items():
        scales = leaves.get(path + names.SCALE)
        joint = path.endswith("eh_proj.weight")
        if quantised and scales and leaf.dtype == dtypes.F8 and (joint or is_quantizable(path, head=True)):
            found[path] = Kept(leaf, scales, quantised.of(leaf.shape))
    if found and quantised and quantised.form == "block" and tuple(quantised.block) != (SCALE_BLOCK, SCALE_BLOCK):
        raise UserError(
            f"FP8 with scales per block of {list(quantised.block)}: only blocks of {SCALE_BLOCK} can be kept"
        )
    for path in [path for path in found if ".experts." in path]:
        group = path.rpartition(".")[0]
        if not all(f"{group}.{part}" in found for part in ("gate", "up", "down")):
            del found[path]
    return found
