"""The small operations every layer is made of: norm, linear, rotary embedding, SwiGLU.

Axes: B batch, S sequence, D model, H heads, h head dim, O output features.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.model.quantized import Quantized, is_quantized
from glm45_jax.parallel import local
from pallas_kernels import fused_moe, grouped_matmul, native
from pallas_kernels.grouped_matmul.quantised import SCALE_BLOCK
from pallas_kernels.residuals import RESIDUAL

FEW_ROWS = 128  # of more XLA's products on a CPU are as quick as ours
_LARGE_WEIGHT = 1 << 12  # elements
_MOST_LAYER_OUTPUTS = 1 << 14  # a weight with more is the head


# A function whose backward pass computes anew, from its arguments and from what it marks by `keep`, all that it needs:
# for what is cheap to compute but large to store.
recomputed = functools.partial(
    jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(RESIDUAL)
)


@functools.partial(recomputed, static_argnums=2)
def rms_norm(x: Float[Array, "*n D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*n D"]:
    """Root-mean-square norm in float32; the scale is multiplied after the cast back, as the published model does."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


def linear(x: Float[Array, "*n I"], module: Any) -> Float[Array, "*n O"]:
    """x @ weight.T, plus the bias where there is one. Weights [O, I] are cast to the dtype of `x`."""
    y = product(x, module.weight.get_value())
    return y + module.bias[...].astype(x.dtype) if hasattr(module, "bias") else y


def product(
    x: Float[Array, "*n I"], weight: Any, dtype: Any = None, precision: jax.lax.Precision | None = None
) -> Float[Array, "*n O"]:
    """x @ weight.T of a matrix [O, I], or of a `Quantized` one, whose bytes are read as they lie."""
    if isinstance(weight, InStack):
        if weight.values.dtype == x.dtype:
            return matmul_t(x, weight, dtype, precision)
        weight = weight.cut_out()
    if not is_quantized(weight):
        return matmul_t(x, weight.astype(x.dtype), dtype, precision)
    if not weight.per_channel:
        return _by_blocks(x, weight, dtype or x.dtype)
    weight = weight.cut_out()
    y = matmul_t(x, weight.values.astype(x.dtype), jnp.float32) * weight.scales[0]
    return y.astype(dtype or x.dtype)


def _by_blocks(x: Float[Array, "*n I"], weight: Quantized, dtype: Any) -> Float[Array, "*n O"]:
    """With a scale for each block the matrix has to be made before it is multiplied by: on TPU in a kernel, out of the
    stack of layers, since XLA would write it to memory in float32 first."""

    def plain(x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        return matmul_t(x, weight.dequantized(x.dtype), dtype)

    def kernel(x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        rows = x.reshape(-1, x.shape[-1])
        stack = lambda a: a.reshape(-1, 1, *a.shape[-2:])  # noqa: E731
        y = grouped_matmul(
            rows, stack(weight.values), jnp.full(1, rows.shape[0], jnp.int32), rhs_scale=stack(weight.scales),
            layer=0 if weight.layer is None else weight.layer, transpose_rhs=True, preferred_element_type=dtype,
            implementation="tpu",
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], -1)

    if any(size % SCALE_BLOCK for size in weight.shape):
        return plain(x)
    return jax.lax.platform_dependent(x, tpu=kernel, default=plain)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InStack:
    """One layer's matrix [O, I], not cut out of the stack in which it lies: a CPU would copy it at every step."""

    values: Float[Array, "L O I"]
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape[1:]

    def cut_out(self) -> Float[Array, "O I"]:
        return jax.lax.dynamic_index_in_dim(self.values, self.layer, keepdims=False)


def matmul_t(
    x: Float[Array, "*n I"], weight: Any, dtype: Any = None, precision: jax.lax.Precision | None = None
) -> Float[Array, "*n O"]:
    """x @ weight.T of a matrix [O, I] or `InStack`, accumulated and returned in `dtype` (by default that of `x`)."""
    plain = functools.partial(_contract, dtype=dtype, precision=precision)
    if x.size > FEW_ROWS * x.shape[-1] or math.prod(weight.shape) < _LARGE_WEIGHT:
        return plain(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=functools.partial(_few_rows, dtype=dtype), default=plain)


def _contract(x: Float[Array, "*n I"], weight: Any, dtype: Any, precision: Any = None) -> Float[Array, "*n O"]:
    weight = weight.cut_out() if isinstance(weight, InStack) else weight
    contracted = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contracted, precision=precision, preferred_element_type=dtype)


def _few_rows(x: Float[Array, "*n I"], weight: Any, dtype: Any) -> Float[Array, "*n O"]:
    """On a CPU, where XLA packs a matrix anew for each product: the rows are the one group of a grouped one."""
    if not native.available():
        return _weight_first(x, weight.cut_out() if isinstance(weight, InStack) else weight, dtype)
    rows = x.reshape(-1, x.shape[-1])
    stack, layer = (weight.values, weight.layer) if isinstance(weight, InStack) else (weight[None], 0)
    y = grouped_matmul(
        rows, stack[:, None], jnp.full(1, rows.shape[0], jnp.int32), layer=layer, transpose_rhs=True,
        preferred_element_type=dtype, implementation=("native", "cpu"),
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], -1)


def _weight_first(x: Float[Array, "*n I"], weight: Float[Array, "O I"], dtype: Any) -> Float[Array, "*n O"]:
    """XLA for CPU packs the right side, here the few rows, and takes the left where it lies.

    A layer's weight is cut out of its stack by one thread, so by halves both have something to do; only the head is as
    large as not to come from a stack.
    """
    rows, out = x.reshape(-1, x.shape[-1]), weight.shape[0]
    parts = [weight] if out > _MOST_LAYER_OUTPUTS else jnp.array_split(weight, 2)
    y = jnp.concatenate([_contract(part, rows, dtype) for part in parts])
    return y.T.reshape(*x.shape[:-1], out)


def swiglu(x: Float[Array, "*n D"], mlp: Any) -> Float[Array, "*n D"]:
    """down(silu(gate x) * up x)."""
    return leave_tensor(_swiglu(enter_tensor(x), mlp), x)


def _swiglu(x: Float[Array, "*n D"], mlp: Any) -> Float[Array, "*n D"]:
    def plain(x: Float[Array, "*n D"], *weights: Any) -> Float[Array, "*n D"]:
        gate, up, down = weights
        return product(gated(product(x, gate), product(x, up)), down)

    def expert(x: Float[Array, "*n D"], *weights: InStack) -> Float[Array, "*n D"]:
        """On a CPU, of few rows: an expert that all of them chose, in one call of native code instead of three."""
        if not native.available():
            return plain(x, *weights)
        rows = x.reshape(-1, x.shape[-1])
        chosen = jnp.zeros((rows.shape[0], 1), jnp.int32), jnp.ones((rows.shape[0], 1))
        how = {"layer": weights[0].layer, "transpose_rhs": True, "implementation": ("native", "cpu")}
        return fused_moe(rows, *(w.values[:, None] for w in weights), *chosen, **how).reshape(x.shape)

    weights = [m.weight.get_value() for m in (mlp.gate, mlp.up, mlp.down)]
    if not all(isinstance(w, InStack) and w.values.dtype == x.dtype for w in weights):
        return plain(x, *weights)
    return jax.lax.platform_dependent(x, *weights, cpu=expert, default=plain)


# Heads and widths are cut over the mesh axis `tensor`, and between the products the tokens are: what enters is put
# together, and the parts of sums that leave are added up and cut again. Where the tokens are the same on all devices of
# the axis (decoding), nothing is put together, and the sums are whole.


def enter_tensor(x: Float[Array, "*n t D"]) -> Float[Array, "*n T D"]:
    """All tokens for products whose outputs are cut over `tensor`."""
    return local.gather(x, "tensor", axis=x.ndim - 2)


def leave_tensor(y: Float[Array, "*n T D"], x: Float[Array, "*n t D"]) -> Float[Array, "*n t D"]:
    """The sums of the devices' parts `y`, cut as `x`, from which `enter_tensor` made what they were computed from."""
    if local.varying_over(x, "tensor"):
        return local.scatter_total(y, "tensor", axis=y.ndim - 2)
    return local.total(y, "tensor")


@recomputed
def gated(gate: Float[Array, "*n F"], up: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
    return jax.nn.silu(gate) * up


def rotary_tables(
    config: ModelConfig, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S r"], Float[Array, "B S r"]]:
    """Cosines and sines for half of the rotated dimensions (the other half repeats them), from float32 angles."""
    angles = positions.astype(jnp.float32)[..., None] * _inverse_frequencies(config.rotary_dim, config.rope_theta)
    return jnp.cos(angles).astype(config.dtype), jnp.sin(angles).astype(config.dtype)


def _inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """theta ** (-2i / dim), rounded as PyTorch rounds it: one bit less here is 1e-3 of an angle at position 100,000."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(max(dim, 1))
    return np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)


@recomputed
def rotate(
    x: Float[Array, "B H S h"], cos: Float[Array, "B S r"], sin: Float[Array, "B S r"]
) -> Float[Array, "B H S h"]:
    """Rotary embedding of the first 2r dimensions of each head; the rest of the head passes through.

    Pairs the first half with the second (NEOX), not neighbours as the dense GLM-4 does.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None].astype(x.dtype), sin[:, None].astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
