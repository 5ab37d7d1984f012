"""What the tests share: oracles (small checkpoints with what transformers computed from them), random models.

Oracles lie in `tests/fixtures` (made by scripts/make_fixtures.py, always there) and in `../shared/golden/checkpoints`
(used where it is present).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.config import ModelConfig, get_preset
from glm45_jax.text import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
GOLDEN = ROOT.parent / "shared" / "golden"


# --- oracles ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A checkpoint in float32 and the arrays that transformers computed from it in float32."""

    name: str
    path: Path
    config: ModelConfig
    params: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays


def oracle_paths(inside: str = "", slow: Collection[str] = (), fast: Collection[str] | None = None) -> list[Any]:
    """pytest parameters, one per folder with an oracle (with arrays named so).

    Marked slow are those in `slow`, or all that are not in `fast` where that is given.
    """
    found = sorted(FIXTURES.glob("*/oracle.npz")) + sorted(GOLDEN.glob("checkpoints/*/*/oracle.npz"))
    kept = [file.parent for file in found if not inside or any(inside in name for name in np.load(file).files)]

    def marks(name: str) -> list[Any]:
        return [pytest.mark.slow] if name in slow or (fast is not None and name not in fast) else []

    return [pytest.param(path, id=oracle_name(path), marks=marks(oracle_name(path))) for path in kept]


def oracle_name(path: Path) -> str:
    return path.name if path.parent == FIXTURES else f"golden_{path.parent.name}_{path.name}"


def load_oracle(path: Path) -> Oracle:
    with np.load(path / "oracle.npz") as file:
        arrays = {name: file[name] for name in file.files}
    # bfloat16 folders of the golden set hold both computations; the float32 one is exact enough to compare with
    computed = {name.removeprefix("f32compute_"): value for name, value in arrays.items() if "f32compute_" in name}
    config, params = glm.load_checkpoint(path, dtype="float32")
    return Oracle(oracle_name(path), path, config, params, arrays | computed)


def published_gradient(grads: Any, config: ModelConfig, name: str) -> np.ndarray:
    """The gradient of the parameter that transformers calls `name` (experts fused: [E, 2F, D], gate rows first)."""
    outer = {"model.embed_tokens.weight": "embed", "lm_head.weight": "head", "model.norm.weight": "final_norm"}
    if name in outer:
        return next(iter(grads[outer[name]].values()))
    _, _, layer, *rest = name.split(".")
    dense = config.first_k_dense_replace
    kind, index = ("dense_layers", int(layer)) if int(layer) < dense else ("moe_layers", int(layer) - dense)
    tree = jax.tree.map(lambda leaf: leaf[index], grads[kind])
    match rest:
        case ["input_layernorm" | "post_attention_layernorm" as norm, "weight"]:
            return tree[{"input_layernorm": "input_norm"}.get(norm, "post_attention_norm")]["scale"]
        case ["self_attn", "q_norm" | "k_norm" as norm, "weight"]:
            return tree["attention"][norm]["scale"]
        case ["self_attn", projection, what]:
            return tree["attention"][projection.removesuffix("_proj")][what]
        case ["mlp", "gate", "weight"]:
            return tree["moe"]["router"]["weight"]
        case ["mlp", "experts", "gate_up_proj"]:
            return np.concatenate([tree["moe"]["experts"]["gate"], tree["moe"]["experts"]["up"]], axis=1)
        case ["mlp", "experts", "down_proj"]:
            return tree["moe"]["experts"]["down"]
        case ["mlp", "shared_experts", projection, "weight"]:
            return tree["moe"]["shared"][projection.removesuffix("_proj")]["weight"]
        case ["mlp", projection, "weight"]:
            return tree["mlp"][projection.removesuffix("_proj")]["weight"]
    raise KeyError(name)


# --- random models ---------------------------------------------------------------------------------------------------


def small_config(**changes: Any) -> ModelConfig:
    """Smaller than `tiny`: one dense and two MoE layers, every option of GLM-4.5 on."""
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24,
        "moe_intermediate_size": 8, "max_position_embeddings": 128, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    return get_preset("tiny", **sizes | changes)


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters of which none is neutral: norms off one, biases off zero, matrices that keep activations near one."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = [key.key for key in path]
        noise = rng.standard_normal(leaf.shape)
        if names[-1] == "scale":
            value = 1 + 0.2 * noise
        elif names[-1] == "bias":
            value = (0.2 if "router" in names else 0.3) * noise
        elif "embed" in names:
            value = noise * (0.2 if config.tie_word_embeddings else 1.0)
        else:
            value = noise * 1.2 * leaf.shape[-1] ** -0.5
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, glm.abstract_params(config))


def small_tokenizer() -> Tokenizer:
    """Of 330 tokens, trained on one sentence."""
    return train_tokenizer(["the cat sat on the mat and the dog ran\n"] * 8, 330)


def write_checkpoint(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    """A random model in Hugging Face's format with its tokenizer, in a folder inside `folder`."""
    tokenizer.save(folder / "tokenizer")
    glm.convert.export_hf(random_params(config), config, folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder / "model"


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


# --- compiling -------------------------------------------------------------------------------------------------------

QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # for other processes
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


def quick_jit(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    """`jax.jit` for tests whose time is all compilation: about four times quicker to compile, slower to run."""
    return jax.jit(function, compiler_options=_quick_options(), **arguments)


@functools.cache
def _quick_options() -> dict[str, Any]:
    """Those of the options that this version of XLA knows."""
    known = {}
    for name, value in _QUICK.items():
        try:
            jax.jit(lambda x: x + 1, compiler_options={name: value})(1)
            known[name] = value
        except jax.errors.JaxRuntimeError:
            pass
    return known
