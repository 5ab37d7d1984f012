"""What the commands that run a model share: loading it, and keeping compiled programs between runs."""

from __future__ import annotations

import dataclasses
import platform
import zlib
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from glm45_jax.config import ModelConfig
from glm45_jax.text import Tokenizer

QuantizeForm = Literal["keep", "int8", "fp8", "int8-block", "fp8-block"]


def load_model(
    checkpoint: str, dtype: str | None = None, quantize: QuantizeForm | None = None, mesh: Any = None
) -> tuple[ModelConfig, Any, Tokenizer]:
    """A checkpoint's config, params and tokenizer; says so on a terminal. For `quantize` see `load_checkpoint`.

    Args:
      mesh: over which the parameters are to lie as serving needs them.

    Raises:
      UserError: no such checkpoint, something wrong with it, or no tokenizer beside it.
    """
    from glm45_jax.convert import load_checkpoint
    from glm45_jax.errors import UserError
    from glm45_jax.parallel import SERVING_RULES

    if not Path(checkpoint).exists():
        raise UserError(f"{checkpoint}: no such checkpoint; expected a directory of weights, config and tokenizer")
    use_compilation_cache()
    with Console(stderr=True).status(f"loading {checkpoint}"):
        folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
        tokenizer = Tokenizer.load(folder)
        rules = None if mesh is None else {name: axes or None for name, *axes in SERVING_RULES}
        config, params = load_checkpoint(checkpoint, dtype=dtype, mesh=mesh, rules=rules, quantize=quantize)
    if mesh is not None:
        config = config.replace(parallel=dataclasses.replace(config.parallel, rules=SERVING_RULES))
    return config, params, tokenizer


def use_compilation_cache() -> None:
    """Keeps compiled programs under ~/.cache/glm45_jax, so that the next run starts at once.

    JAX's own setting (JAX_COMPILATION_CACHE_DIR) goes first.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(_cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _cache_folder() -> Path:
    """Apart for each kind of CPU: programs for one may not run on another that shares the home directory."""
    from pallas_kernels.native import cache_folder, processor

    return cache_folder() / f"xla-{platform.machine()}-{zlib.crc32(processor().encode()):08x}"
