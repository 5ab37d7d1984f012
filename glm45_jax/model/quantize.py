"""Quantising weights for inference: `quantize_params`.

Matrices of attention, dense MLPs, routed and shared experts become `Quantized`, and the output head if asked for.
Embeddings, norms, biases, the router and the MTP layer's joint projection stay as they are, as in the published FP8
checkpoints. Scales are symmetric: the largest value of a channel or block becomes the largest code.

Axes: L layers, O output features, I input features.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model.params import Params, abstract_params
from glm45_jax.model.quantized import Quantized, is_quantized
from pallas_kernels.grouped_matmul.quantised import SCALE_BLOCK

Form = Literal["int8", "fp8", "int8-block", "fp8-block"]
FORMS: tuple[str, ...] = get_args(Form)
KEEP = "keep"  # to loaders: FP8 as it lies in the checkpoint
LARGEST = {"int8": 127.0, "fp8": 448.0}
CODES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
LEAST_SCALE = 1e-12  # of a channel of zeros
_PARTS = ("attention", "mlp", "moe")


def check_form(form: str) -> None:
    if form not in FORMS:
        raise UserError(f"quantize {form!r}: choose one of {', '.join(FORMS)}")


def is_quantizable(path: str, head: bool = False) -> bool:
    """Whether the matrix at a dotted path of the params tree is one that is quantised."""
    names = path.split(".")
    if names[-2:] == ["head", "weight"]:
        return head
    matrix = names[-1] == "weight" or "experts" in names
    return matrix and "router" not in names and any(part in names for part in _PARTS)


def quantize_params(params: Params, config: ModelConfig, form: Form = "int8", *, head: bool = False) -> Params:
    """The params tree with quantised matrices, for `forward`, `generate`, `Engine`; not for training.

    Each array is quantised layer by layer, on the devices that it lies on. Under `jit` nothing but the result is kept.

    Args:
      params: as `load_checkpoint` gives them; to quantise while loading, which never holds them whole, see there.
      form: "int8" or "fp8" (e4m3) with a scale per output channel; "int8-block", "fp8-block" with one per 128 x 128.
      head: the output heads too (the MTP layer's own as well); not where the head is the embedding.

    Raises:
      UserError: another form; quantised already.
    """
    check_form(form)

    def one(path: Any, leaf: Any, _: Any) -> Any:
        name = ".".join(str(key.key) for key in path)
        if is_quantized(leaf):
            raise UserError(f"{name} is quantised already")
        return quantize(leaf, form) if is_quantizable(name, head) else leaf

    return jax.tree_util.tree_map_with_path(one, params, abstract_params(config), is_leaf=is_quantized)


@functools.partial(jax.jit, static_argnames="form")
def quantize(matrix: Float[Array, "*l O I"], form: Form) -> Quantized:
    """One matrix, or a stack of them, of which one layer is widened at a time."""
    if matrix.ndim == 2:
        return _quantize(matrix, form)
    return jax.lax.map(lambda layer: _quantize(layer, form), matrix)


def _quantize(matrix: Float[Array, "*e O I"], form: Form) -> Quantized:
    kind, _, block = form.partition("-")
    out, into = matrix.shape[-2:]
    blocks = (SCALE_BLOCK, SCALE_BLOCK) if block else (1, into)
    wide = matrix.astype(jnp.float32)
    grow = [(0, 0)] * (matrix.ndim - 2) + [(0, -out % blocks[0]), (0, -into % blocks[1])]
    cut = jnp.pad(wide, grow) if block else wide
    grown = cut.shape
    cut = cut.reshape(*cut.shape[:-2], cut.shape[-2] // blocks[0], blocks[0], cut.shape[-1] // blocks[1], blocks[1])
    scales = jnp.maximum(jnp.abs(cut).max((-3, -1)) / LARGEST[kind], LEAST_SCALE)
    codes = (cut / scales[..., None, :, None]).reshape(*grown)[..., :out, :into]
    return Quantized(rounded(codes, kind, jnp), jnp.swapaxes(scales, -1, -2))


def rounded(codes: Any, kind: str, xp: Any) -> Any:
    """Scaled values as codes: rounded to nearest even, saturated."""
    largest = LARGEST[kind]
    codes = xp.rint(codes) if kind == "int8" else codes
    return xp.clip(codes, -largest, largest).astype(CODES[kind])
