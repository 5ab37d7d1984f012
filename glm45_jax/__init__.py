"""GLM-4.5 in JAX: one pure-functional model for training, fine-tuning, decoding and serving.

    import glm45_jax as glm
    config, params = glm.load_checkpoint("GLM-4.5-Air", dtype="bfloat16")
    out = glm.forward(params, config, tokens)
    texts = glm.generate(params, config, prompts, max_new_tokens=64)

Names are imported when first used, so that `import glm45_jax` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "glm45_jax.config": ("ModelConfig", "PRESETS", "get_preset"),
    "glm45_jax.convert": ("load_checkpoint",),
    "glm45_jax.errors": ("UserError",),
    "glm45_jax.infer": ("generate",),
    "glm45_jax.model": (
        "abstract_params",
        "decode_step",
        "forward",
        "init_cache",
        "init_params",
        "mtp_forward",
        "param_axes",
        "param_shardings",
        "prefill",
    ),
    "glm45_jax.train": ("loss_fn", "train_step"),
}
_MODULES = ("config", "convert", "data", "errors", "infer", "model", "parallel", "text", "train")
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME), *_MODULES]

if TYPE_CHECKING:
    from glm45_jax.config import PRESETS, ModelConfig, get_preset
    from glm45_jax.convert import load_checkpoint
    from glm45_jax.errors import UserError
    from glm45_jax.infer import generate
    from glm45_jax.model import (
        abstract_params,
        decode_step,
        forward,
        init_cache,
        init_params,
        mtp_forward,
        param_axes,
        param_shardings,
        prefill,
    )
    from glm45_jax.train import loss_fn, train_step


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"glm45_jax.{name}")
    raise AttributeError(f"module 'glm45_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
