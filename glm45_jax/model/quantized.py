"""Weights in one byte: `Quantized` stands in the params tree where a matrix stood, and the layers multiply by it.

Values are int8 or float8_e4m3fn; a scale belongs to an output channel, or to a block of 128 x 128 as DeepSeek's
checkpoints have it. What they stand for is value * scale in float32. Scales lie as the kernels of `pallas_kernels` take
them, the contracted axis first, whatever the matrix's own layout.

Axes: O output features, I input features, n tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Num

from glm45_jax.errors import UserError
from pallas_kernels.grouped_matmul.quantised import SCALE_BLOCK, dequantise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix [O, I], or a stack of them, as the checkpoint lays it out; with `layer` one of a stack, not cut out."""

    values: Num[Array, "*l O I"]  # int8 or float8_e4m3fn
    scales: Float[Array, "*l i o"]  # float32, [1, O] per channel or [ceil(I / 128), ceil(O / 128)] per block
    layer: Int[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape if self.layer is None else self.values.shape[1:]

    @property
    def per_channel(self) -> bool:
        return tuple(self.scales.shape[-2:]) == (1, self.values.shape[-2])

    def cut_out(self) -> Quantized:
        """Without the other layers."""
        if self.layer is None:
            return self
        take = lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False)  # noqa: E731
        return Quantized(take(self.values), take(self.scales))

    def dequantized(self, dtype: Any) -> Float[Array, "*l O I"]:
        """The matrix that it stands for, rounded to `dtype`."""
        own = self.cut_out()
        return dequantise(own.values, jnp.swapaxes(own.scales, -1, -2), transpose_rhs=False, dtype=dtype)

    def rows(self, first: Int[Array, ""], count: int) -> Quantized:
        """Output features `first` to `first + count`; of blocks whole ones."""
        if self.layer is not None:
            return self.cut_out().rows(first, count)
        values = jax.lax.dynamic_slice_in_dim(self.values, first, count, axis=self.values.ndim - 2)
        if not self.per_channel:
            if count % SCALE_BLOCK:
                raise UserError(f"{count} rows of a matrix with scales per block of {SCALE_BLOCK}: not whole blocks")
            first, count = first // SCALE_BLOCK, count // SCALE_BLOCK
        return Quantized(values, jax.lax.dynamic_slice_in_dim(self.scales, first, count, axis=self.scales.ndim - 1))


def is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def has_quantized(params: Any) -> bool:
    return any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))


def refuse_quantized(params: Any, what: str) -> None:
    """Raises UserError where `params` have quantised weights."""
    if has_quantized(params):
        raise UserError(f"{what}: these parameters are quantised, which is for inference; load them without `quantize`")


def values_and_scales(matrices: Any) -> tuple[list[Array], list[Array | None]]:
    """Of several matrices, quantised or not, what the kernels take."""
    split = [(m.values, m.scales) if is_quantized(m) else (m, None) for m in matrices]
    return [values for values, _ in split], [scales for _, scales in split]


def scale_spec(name: str, weight: Quantized, spec: PartitionSpec, parts: Any) -> PartitionSpec:
    """How the scales of a matrix lie that lies as `spec` says.

    Args:
      parts: of an entry of `spec`, over how many devices it cuts.

    Raises:
      UserError: devices would share blocks of 128.
    """
    *lead, out, into = [*spec, *[None] * (len(weight.shape) - len(spec))]
    if weight.per_channel:
        return PartitionSpec(*lead, None, out)
    for axis, size in ((out, weight.shape[-2]), (into, weight.shape[-1])):
        if parts(axis) > 1 and size % (SCALE_BLOCK * parts(axis)):
            raise UserError(
                f"{name}: {size} cut over {parts(axis)} devices ({axis}) does not leave whole blocks of {SCALE_BLOCK} "
                "to each: quantise per channel, or choose another mesh"
            )
    return PartitionSpec(*lead, into, out)
