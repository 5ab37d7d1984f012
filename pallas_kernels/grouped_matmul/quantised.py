"""Quantised weights: int8 or float8_e4m3fn with a scale per output channel, or per block of 128 x 128.

Axes: E groups, K contracted, N output columns. Scales are laid out as [E, K, N] whatever the weights' own layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SCALE_BLOCK = 128
_DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


def is_quantised(dtype: Any) -> bool:
    return jnp.dtype(dtype) in _DTYPES


def check_scale(name: str, weight: Any, scale: Any, contracted: int, columns: int) -> None:
    """Raises ValueError unless quantised weights have a scale that fits them, and others none."""
    if not is_quantised(weight.dtype):
        if scale is not None:
            raise ValueError(f"{name} has a scale but is {weight.dtype}; quantised weights are int8 or float8_e4m3fn")
        return
    blocks = tuple(-(-size // SCALE_BLOCK) for size in (contracted, columns))
    groups = weight.shape[:-2]
    if scale is None or scale.shape not in ((*groups, 1, columns), (*groups, *blocks)):
        raise ValueError(
            f"{name} {weight.shape} is {weight.dtype} and needs a scale {(*groups, 1, columns)}, per channel, or "
            f"{(*groups, *blocks)}, per block of {SCALE_BLOCK}; got {None if scale is None else scale.shape}"
        )


def check_alike(names: str, weights: Sequence[Any]) -> None:
    """Raises ValueError unless the matrices that one op multiplies have one dtype."""
    if len({jnp.dtype(w.dtype) for w in weights}) > 1:
        raise ValueError(f"{names} are {', '.join(str(w.dtype) for w in weights)}; expected one dtype")


def expand_scale(scale: Float[Array, "*E k n"], contracted: int, columns: int) -> Float[Array, "*E K N"]:
    """One factor per weight; an axis on which the scale is constant stays 1."""
    for axis, size in ((-2, contracted), (-1, columns)):
        if scale.shape[axis] not in (1, size):
            scale = jnp.repeat(scale, SCALE_BLOCK, axis=axis)
            scale = jax.lax.slice_in_dim(scale, 0, size, axis=axis)
    return scale


def dequantise(
    weight: Array, scale: Float[Array, "*E k n"] | None, *, transpose_rhs: bool, dtype: Any
) -> Float[Array, "*E K N"]:
    """The weights as [.., K, N] in `dtype`, multiplied by their scale in float32."""
    if transpose_rhs:
        weight = jnp.swapaxes(weight, -1, -2)
    if scale is None:
        return weight.astype(dtype)
    factors = expand_scale(scale.astype(jnp.float32), *weight.shape[-2:])
    return (weight.astype(jnp.float32) * factors).astype(dtype)


@jax.custom_vjp
def frozen(x: Array) -> Array:
    """x, whose gradient is refused."""
    return x


def _refuse(_residuals: None, _cotangent: Array) -> Any:
    raise ValueError(
        "quantised weights and their scales are frozen: differentiate with respect to the other arguments, or "
        "dequantise the weights first"
    )


frozen.defvjp(lambda x: (x, None), _refuse)
