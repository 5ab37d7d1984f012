"""The config: published sizes, Hugging Face's config.json in both forms, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import pytest

from glm45_jax.config import PRESETS, ModelConfig, get_preset, load_hf_config
from glm45_jax.errors import UserError
from glm45_jax.model import abstract_params, param_axes

PUBLISHED = ["glm-4.5", "glm-4.5-base", "glm-4.5-air", "glm-4.5-air-base", "glm-4.6", "glm-4.7"]


@pytest.mark.parametrize(
    "name, total, body_and_mtp, active, cache",
    [
        ("glm-4.5", 358.34, 355.23, 32.08, 376_832),
        ("glm-4.5-air", 110.469, None, 12.18, 188_416),
        ("glm-4.6", 356.79, 355.23, 32.08, 376_832),
    ],
)
def test_published_sizes(name: str, total: float, body_and_mtp: float | None, active: float, cache: int) -> None:
    config = get_preset(name)
    counts = config.parameter_counts()
    assert counts["total"] / 1e9 == pytest.approx(total, abs=0.006)
    assert counts["active_without_mtp"] / 1e9 == pytest.approx(active, abs=0.006)
    assert config.kv_cache_bytes_per_token() == cache
    if body_and_mtp:
        assert (counts["body"] + counts["mtp"]) / 1e9 == pytest.approx(body_and_mtp, abs=0.006)


def test_active_counts_the_mtp_layer_as_the_paper_does() -> None:
    assert get_preset("glm-4.5").parameter_counts()["active"] / 1e9 == pytest.approx(32.48, abs=0.006)


def test_air_total_to_the_million() -> None:
    assert round(get_preset("glm-4.5-air").parameter_counts()["total"] / 1e6) == 110_469


@pytest.mark.parametrize("name, low, high", [("mini", 7e6, 14e6), ("nano", 70e6, 140e6), ("small", 0.7e9, 1.4e9)])
def test_small_presets_have_their_size(name: str, low: float, high: float) -> None:
    assert low < get_preset(name).parameter_counts()["total"] < high


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_declared_parameters(name: str) -> None:
    config = get_preset(name)
    tree = abstract_params(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == config.parameter_counts()["total"]
    axes = param_axes(config)
    jax.tree.map(lambda leaf, names: _same_length(leaf.shape, names), tree, axes)


def _same_length(shape: tuple[int, ...], names: tuple[str | None, ...]) -> None:
    assert len(shape) == len(names)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "n_shared_experts": 0},
        {"n_shared_experts": 3, "use_qk_norm": False, "attention_bias": False},
        {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
        {"first_k_dense_replace": 3, "mtp_own_embed": True, "mtp_own_head": True},
    ],
)
def test_counts_follow_every_option(changes: dict) -> None:
    config = get_preset("tiny", **changes)
    assert sum(x.size for x in jax.tree.leaves(abstract_params(config))) == config.parameter_counts()["total"]


# --- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["v4", "v5"])
@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str, form: Any) -> None:
    config = get_preset(name)
    text = json.dumps(config.to_hf(form))
    assert ModelConfig.from_hf(json.loads(text)) == config


def test_the_two_forms_differ_where_they_should() -> None:
    v4, v5 = (get_preset("glm-4.5").to_hf(form) for form in ("v4", "v5"))
    assert v4["rope_theta"] == 1e6 and v4["partial_rotary_factor"] == 0.5 and v4["torch_dtype"] == "bfloat16"
    assert v5["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    assert v5["dtype"] == "bfloat16" and "rope_theta" not in v5 and "rope_parameters" not in v4
    with pytest.raises(UserError, match="v6"):
        get_preset("tiny").to_hf("v6")  # pyright: ignore[reportArgumentType]


REQUIRED = [
    "vocab_size", "hidden_size", "num_hidden_layers", "first_k_dense_replace", "num_attention_heads", "head_dim",
    "num_key_value_heads", "attention_bias", "use_qk_norm", "intermediate_size", "moe_intermediate_size",
    "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor",
    "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "rope_theta", "partial_rotary_factor",
]  # fmt: skip


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    hf = get_preset("glm-4.5").to_hf("v4")
    del hf[field]
    with pytest.raises(UserError, match=f"{field} is missing"):
        ModelConfig.from_hf(hf)


def test_all_missing_fields_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf({"model_type": "glm4_moe"})
    assert all(field in str(error.value) for field in REQUIRED)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"]}, "another architecture"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "qwen3_moe"),
        ({"architectures": ["Glm4vMoeForConditionalGeneration"]}, "Glm4vMoeForConditionalGeneration"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
    ],
)
def test_other_architectures_are_refused(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf(get_preset("glm-4.5").to_hf("v4") | change)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"partial_rotary_factor": 0.45}, "odd"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 2, "topk_group": 3}, "topk_group"),
        ({"n_group": 8, "topk_group": 8}, "best two"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"real_vocab_size": 321}, "real_vocab_size"),
    ],
)
def test_impossible_models_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        get_preset("tiny", **changes)


def test_bad_files_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="object"):
        load_hf_config(tmp_path)


def test_unknown_preset_suggests_a_near_one() -> None:
    with pytest.raises(UserError, match=r"glm-4\.5-air"):
        get_preset("glm-4.5-ari")


def test_configs_are_values() -> None:
    a, b = get_preset("tiny"), get_preset("tiny")
    assert a == b and hash(a) == hash(b)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.vocab_size = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_golden_forms_read_the_same(golden) -> None:
    folders = sorted(golden.glob("checkpoints/*/*"))
    assert folders
    for folder in folders:
        v5, v4 = load_hf_config(folder / "config.json"), load_hf_config(folder / "config.hub_v4.json")
        assert v5 == v4


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("form", ["v4", "v5"])
@pytest.mark.parametrize("name", [*PUBLISHED, "tiny"])
def test_transformers_reads_the_same_values(name: str, form: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = get_preset(name)
    theirs = transformers.Glm4MoeConfig.from_dict(config.to_hf(form))
    skipped = {
        "rope_theta",
        "partial_rotary_factor",
        "eos_token_id",
        "dtype",
        "param_dtype",
        "remat",
        "implementation",
        "parallel",
    }
    skipped |= {"mtp_own_embed", "mtp_own_head", "real_vocab_size"}
    for field in dataclasses.fields(config):
        if field.name not in skipped:
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["partial_rotary_factor"] == config.partial_rotary_factor
    assert tuple(theirs.eos_token_id or ()) == config.eos_token_id
    assert str(theirs.dtype).removeprefix("torch.") == config.param_dtype
    assert theirs.num_mtp_layers == config.num_nextn_predict_layers


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_transformers_saves_reads_back(name: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = get_preset(name)
    transformers.Glm4MoeConfig.from_dict(config.to_hf("v4")).save_pretrained(tmp_path)
    assert load_hf_config(tmp_path) == config


@pytest.mark.parity
@pytest.mark.parametrize("name", ["glm-4.5", "glm-4.5-air", "tiny"])
def test_transformers_has_as_many_parameters(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = get_preset(name)
    with torch.device("meta"):
        model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig.from_dict(config.to_hf("v5")))
    biases = sum(value.numel() for key, value in model.named_buffers() if "e_score_correction_bias" in key)
    counts = config.parameter_counts()
    assert sum(p.numel() for p in model.parameters()) + biases == counts["body"] + counts["embed"] + counts["head"]
