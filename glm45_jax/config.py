"""What defines a model of the GLM-4.5 family: `ModelConfig`, its presets, and Hugging Face's `config.json` in and out.

Architecture fields carry the names of the published `config.json`. Nothing here leans on another library's defaults:
a file that leaves a field out is an error, except for the few fields whose absence has one meaning in the published
files. Values: config.json of GLM-4.5, GLM-4.5-Air, GLM-4.6 and GLM-4.7; table 1 of arXiv 2508.06471.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from glm45_jax.errors import UserError

ARCHITECTURE = "Glm4MoeForCausalLM"
MODEL_TYPE = "glm4_moe"

Dtype = Literal["float32", "bfloat16", "float16"]
RematPolicy = Literal["none", "full", "dots", "save_block_outputs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over the mesh in force; without one nothing of it matters."""

    rules: tuple[tuple[str, ...], ...] = ()  # changes to `parallel.RULES`: a logical axis, then its mesh axes (or none)
    dispatch: Literal["auto", "all_to_all", "all_gather"] = "auto"  # how tokens reach the devices of their experts
    expert_chunks: int | None = None  # in how many parts a device's routed rows go; None: by memory
    expert_capacity: float | None = None  # of all_to_all: rows a device answers, in means; None: none is ever dropped
    microbatches: int | None = None  # of a pipeline; None: as many as it has stages
    pipeline_repeats: int = 1  # rounds of a circular pipeline, in each of which a stage has some of its layers

    def __post_init__(self) -> None:
        checks = [
            (self.expert_chunks is None or self.expert_chunks >= 1, "expert_chunks must be at least 1"),
            (self.expert_capacity is None or self.expert_capacity > 0, "expert_capacity must be positive"),
            (self.microbatches is None or self.microbatches >= 1, "microbatches must be at least 1"),
            (self.pipeline_repeats >= 1, "pipeline_repeats must be at least 1"),
            (all(self.rules), "a rule needs a logical axis: [embed, fsdp]"),
        ]
        if problems := [message for ok, message in checks if not ok]:
            raise UserError("parallel: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of the family. Frozen and hashable, so that jitted functions take it as a static argument."""

    vocab_size: int  # rows of the embedding, padding rows included
    hidden_size: int
    num_hidden_layers: int  # without the MTP layer
    first_k_dense_replace: int  # the first layers, with a dense MLP in place of experts
    num_nextn_predict_layers: int = 1  # MTP layers: 0 or 1
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool  # on q, k and v; never on o
    use_qk_norm: bool
    partial_rotary_factor: float = 0.5
    rope_theta: float = 1e6
    max_position_embeddings: int = 131072
    intermediate_size: int  # dense MLP
    moe_intermediate_size: int  # one expert
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    real_vocab_size: int | None = None  # ids from here on are padding and never sampled; None: every row is real
    mtp_own_embed: bool = False  # the MTP layer has its own embedding (GLM-4.5, Air) or shares the model's (GLM-4.6)
    mtp_own_head: bool = False

    # How it is computed; no part of the architecture.
    dtype: Dtype = "bfloat16"  # activations and matrix products
    param_dtype: Dtype = "bfloat16"  # the router's selection bias is float32 whatever this says
    remat: RematPolicy = "none"
    implementation: str | None = None  # of the kernels; None lets the lowering platform choose
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise UserError("this model configuration cannot be: " + "; ".join(problems))

    @property
    def num_dense_layers(self) -> int:
        return self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that are rotated, from the first on."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def has_mtp(self) -> bool:
        return self.num_nextn_predict_layers > 0

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one token of context holds in the KV cache of the main model (the MTP layer apart)."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; `total` is all of a checkpoint, `active` what one token meets, embeddings apart.

        `active` counts the MTP layer, as the paper's 32B and 12B do (arXiv 2508.06471, table 1).
        """
        return _parameter_counts(self)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> ModelConfig:
        """Reads a `config.json` of transformers v4 or v5.

        Raises:
          UserError: another architecture, a missing field, or an option that the family does not have.
        """
        return _from_hf(hf, overrides)

    def to_hf(self, form: Literal["v4", "v5"] = "v4") -> dict[str, Any]:
        """The `config.json` that transformers v4 (as published) or v5 writes for this model."""
        return _to_hf(self, form)


def load_hf_config(path: str | Path, **overrides: Any) -> ModelConfig:
    """Reads `config.json`, or the one in the directory `path`."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        hf = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; a checkpoint directory holds a config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: not JSON ({e})") from None
    if not isinstance(hf, dict):
        raise UserError(f"{file}: a JSON object is expected, found {type(hf).__name__}")
    return ModelConfig.from_hf(hf, **overrides)


# --- checks ------------------------------------------------------------------------------------------------------


def _problems(c: ModelConfig) -> list[str]:
    positive = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
        "moe_intermediate_size n_routed_experts num_experts_per_tok n_group topk_group max_position_embeddings"
    ).split()
    out = [f"{name} is {getattr(c, name)}, it must be positive" for name in positive if getattr(c, name) < 1]
    if out:
        return out
    checks = [
        (
            0 <= c.first_k_dense_replace <= c.num_hidden_layers,
            "first_k_dense_replace lies outside 0..num_hidden_layers",
        ),
        (c.num_nextn_predict_layers in (0, 1), "num_nextn_predict_layers must be 0 or 1, as in every released model"),
        (c.num_attention_heads % c.num_key_value_heads == 0, "num_key_value_heads does not divide num_attention_heads"),
        (0 <= c.partial_rotary_factor <= 1, "partial_rotary_factor lies outside 0..1"),
        (c.rotary_dim % 2 == 0, f"the rotated part of a head, {c.rotary_dim} dimensions, is odd"),
        (c.n_shared_experts >= 0, "n_shared_experts is negative"),
        (c.n_routed_experts % c.n_group == 0, "n_group does not divide n_routed_experts"),
        (c.topk_group <= c.n_group, "topk_group is above n_group"),
        (
            c.num_experts_per_tok * c.n_group <= c.topk_group * c.n_routed_experts,
            "num_experts_per_tok is above the experts in topk_group groups",
        ),
        (
            c.n_group == 1 or c.n_routed_experts // c.n_group >= 2,
            "groups are scored by their best two experts: n_routed_experts / n_group must be at least 2",
        ),
        (
            c.real_vocab_size is None or 0 < c.real_vocab_size <= c.vocab_size,
            "real_vocab_size lies outside 1..vocab_size",
        ),
    ]
    return [message for ok, message in checks if not ok]


# --- counts ------------------------------------------------------------------------------------------------------


def _parameter_counts(c: ModelConfig) -> dict[str, int]:
    d, hd = c.hidden_size, c.head_dim
    q, kv = c.num_attention_heads * hd, c.num_key_value_heads * hd
    attention = 2 * d * q + 2 * d * kv
    attention += (q + 2 * kv) * c.attention_bias + 2 * hd * c.use_qk_norm
    expert = 3 * d * c.moe_intermediate_size
    dense_layer = attention + 2 * d + 3 * d * c.intermediate_size
    around_experts = attention + 2 * d + (d + 1) * c.n_routed_experts + c.n_shared_experts * expert
    moe_layer = around_experts + c.n_routed_experts * expert
    active_moe_layer = around_experts + c.num_experts_per_tok * expert
    embed = c.vocab_size * d
    head = 0 if c.tie_word_embeddings else embed
    mtp_extra = 2 * d * d + 3 * d
    body = c.num_dense_layers * dense_layer + c.num_moe_layers * moe_layer + d
    mtp = (moe_layer + mtp_extra) * c.has_mtp
    active = c.num_dense_layers * dense_layer + c.num_moe_layers * active_moe_layer + d
    mtp_embeddings = (c.mtp_own_embed + c.mtp_own_head) * embed * c.has_mtp
    return {
        "total": body + embed + head + mtp + mtp_embeddings,
        "active": active + (active_moe_layer + mtp_extra) * c.has_mtp,
        "active_without_mtp": active,
        "body": body,
        "embed": embed,
        "head": head,
        "mtp": mtp,
        "mtp_embeddings": mtp_embeddings,
        "expert": expert,
        "attention_per_layer": attention,
    }


# --- Hugging Face's config.json ------------------------------------------------------------------------------------

# Our own facts ride in config.json under this key; other readers pass over it.
EXTRA_KEY = "glm45_jax"
_EXTRA_FIELDS = ("mtp_own_embed", "mtp_own_head", "real_vocab_size")
_COMPUTE_FIELDS = ("dtype", "param_dtype", "remat", "implementation", "parallel")
# Absent in some published files, with one meaning each.
_OPTIONAL = {
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "pad_token_id": None,
}
_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}  # the family knows no other value


def _copied_fields() -> list[str]:
    apart = {"rope_theta", "partial_rotary_factor", "eos_token_id", *_EXTRA_FIELDS, *_COMPUTE_FIELDS}
    return [f.name for f in dataclasses.fields(ModelConfig) if f.name not in apart]


def _from_hf(hf: Mapping[str, Any], overrides: Mapping[str, Any]) -> ModelConfig:
    architectures, model_type = hf.get("architectures") or [], hf.get("model_type")
    if model_type != MODEL_TYPE or (architectures and ARCHITECTURE not in architectures):
        raise UserError(
            f"config.json is of another architecture (model_type {model_type!r}, architectures {architectures}); "
            f"expected {MODEL_TYPE!r} and [{ARCHITECTURE!r}]"
        )
    wrong = [f"{k} is {hf[k]!r}, only {v!r} exists in the family" for k, v in _FIXED.items() if hf.get(k, v) != v]
    values: dict[str, Any] = {}
    for name in _copied_fields():
        if hf.get(name) is not None:
            values[name] = hf[name]
        elif name in _OPTIONAL:
            values[name] = _OPTIONAL[name]
        else:
            wrong.append(f"{name} is missing")
    values |= _rope_from_hf(hf, wrong)
    if wrong:
        raise UserError("config.json cannot be read as GLM-4.5: " + "; ".join(wrong))
    eos = hf.get("eos_token_id")
    values["eos_token_id"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"
    values["dtype"] = values["param_dtype"] = dtype
    extra = hf.get(EXTRA_KEY) or {}
    values |= {k: extra[k] for k in _EXTRA_FIELDS if k in extra}
    return ModelConfig(**(values | dict(overrides)))


def _rope_from_hf(hf: Mapping[str, Any], wrong: list[str]) -> dict[str, float]:
    """`rope_parameters` of transformers v5, or the flat fields of v4."""
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or {}
    for where in (rope, scaling):
        kind = where.get("rope_type", where.get("type", "default"))
        if kind != "default":
            wrong.append(f"rope of type {kind!r}: the family only has 'default'")
    out = {}
    for name in ("rope_theta", "partial_rotary_factor"):
        value = rope.get(name, scaling.get(name, hf.get(name)))
        if value is None:
            wrong.append(f"{name} is missing")
        else:
            out[name] = float(value)
    return out


def _to_hf(c: ModelConfig, form: str) -> dict[str, Any]:
    hf: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, **_FIXED}
    hf |= {name: getattr(c, name) for name in _copied_fields()}
    hf |= {"eos_token_id": list(c.eos_token_id) or None, "bos_token_id": None, "use_cache": True}
    rope = {"rope_theta": c.rope_theta, "partial_rotary_factor": c.partial_rotary_factor}
    if form == "v5":
        hf |= {"rope_parameters": {"rope_type": "default", **rope}, "dtype": c.param_dtype}
    elif form == "v4":
        hf |= {**rope, "rope_scaling": None, "torch_dtype": c.param_dtype}
    else:
        raise UserError(f"config.json form {form!r} is unknown; choose 'v4' or 'v5'")
    hf[EXTRA_KEY] = {name: getattr(c, name) for name in _EXTRA_FIELDS}
    return dict(sorted(hf.items()))


# --- presets -------------------------------------------------------------------------------------------------------

_EOS, _EOS_BASE, _PAD = (151329, 151336, 151338), (151334, 151329), 151329

_GLM45 = ModelConfig(
    vocab_size=151552, real_vocab_size=151365, hidden_size=5120, num_hidden_layers=92, first_k_dense_replace=3,
    num_attention_heads=96, num_key_value_heads=8, head_dim=128, attention_bias=True, use_qk_norm=True,
    intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160, num_experts_per_tok=8,
    routed_scaling_factor=2.5, eos_token_id=_EOS, pad_token_id=_PAD, mtp_own_embed=True, mtp_own_head=True,
)  # fmt: skip
_AIR = _GLM45.replace(
    hidden_size=4096, num_hidden_layers=46, first_k_dense_replace=1, use_qk_norm=False, intermediate_size=10944,
    moe_intermediate_size=1408, n_routed_experts=128, routed_scaling_factor=1.0,
)  # fmt: skip
_GLM46 = _GLM45.replace(max_position_embeddings=202752, mtp_own_embed=False, mtp_own_head=False)
_TINY = ModelConfig(
    vocab_size=320, hidden_size=64, num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=8,
    num_key_value_heads=2, head_dim=16, attention_bias=True, use_qk_norm=True, intermediate_size=112,
    moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, routed_scaling_factor=2.5,
    max_position_embeddings=512, rope_theta=1e4, dtype="float32", param_dtype="float32",
)  # fmt: skip
_MINI = _TINY.replace(
    vocab_size=2048, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, head_dim=64, intermediate_size=704,
    moe_intermediate_size=64, n_routed_experts=48, num_experts_per_tok=4, max_position_embeddings=4096,
    tie_word_embeddings=True,
)  # fmt: skip
_NANO = _MINI.replace(
    tie_word_embeddings=False,
    vocab_size=16384, hidden_size=512, num_hidden_layers=8, num_attention_heads=12, head_dim=64,
    intermediate_size=1408, moe_intermediate_size=256, n_routed_experts=28, max_position_embeddings=8192,
)  # fmt: skip
_SMALL = _NANO.replace(
    vocab_size=32768, hidden_size=1024, num_hidden_layers=16, num_attention_heads=24, num_key_value_heads=4,
    intermediate_size=2816, moe_intermediate_size=384, n_routed_experts=48, num_experts_per_tok=6,
    dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    "glm-4.5": _GLM45,
    "glm-4.5-base": _GLM45.replace(eos_token_id=_EOS_BASE),
    "glm-4.5-air": _AIR,
    "glm-4.5-air-base": _AIR.replace(eos_token_id=_EOS_BASE),
    "glm-4.6": _GLM46,
    "glm-4.7": _GLM46,
    "tiny": _TINY,
    "mini": _MINI,
    "nano": _NANO,
    "small": _SMALL,
}


def get_preset(name: str, **overrides: Any) -> ModelConfig:
    """The preset `name` (`glm-4.5`, `glm-4.5-air`, …, `tiny`, `mini`, `nano`, `small`) with fields replaced."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"no preset is called {name!r}{hint} Presets: {', '.join(PRESETS)}")
    return PRESETS[name].replace(**overrides)
