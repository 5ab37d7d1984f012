"""The table of names: every array of the tree is filled exactly once, by the names of the published checkpoints."""

from __future__ import annotations

import json
import math

import pytest

from glm45_jax.config import get_preset
from glm45_jax.convert import names

VARIANTS = {
    "plain": {},
    "glm46": {"mtp_own_embed": False, "mtp_own_head": False},
    "whole_mtp": {"mtp_own_embed": True, "mtp_own_head": True},
    "no_mtp": {"num_nextn_predict_layers": 0},
    "all_dense": {"first_k_dense_replace": 3},
    "all_moe": {"first_k_dense_replace": 0},
    "tied": {"tie_word_embeddings": True},
    "no_shared": {"n_shared_experts": 0},
    "two_shared": {"n_shared_experts": 2},
    "no_bias": {"attention_bias": False, "use_qk_norm": False},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_slots_tile_the_tree(changes) -> None:
    config = get_preset("tiny", **changes)
    shapes = names.flat_shapes(config)
    filled: dict[str, int] = dict.fromkeys(shapes, 0)
    places = set()
    for slot in names.hf_slots(config).values():
        assert shapes[slot.path].shape == shapes[slot.path].shape[: len(slot.index)] + slot.shape
        assert all(i < n for i, n in zip(slot.index, shapes[slot.path].shape))
        filled[slot.path] += math.prod(slot.shape)
        places.add((slot.path, slot.index))
    assert filled == {path: math.prod(leaf.shape) for path, leaf in shapes.items()}
    assert len(places) == len(names.hf_slots(config))


def test_dense_and_moe_layers_are_counted_apart() -> None:
    slots = names.hf_slots(get_preset("tiny", num_hidden_layers=4, first_k_dense_replace=2))
    assert slots["model.layers.1.mlp.up_proj.weight"].path == "dense_layers.mlp.up.weight"
    assert slots["model.layers.1.mlp.up_proj.weight"].index == (1,)
    assert slots["model.layers.3.mlp.experts.5.down_proj.weight"].path == "moe_layers.moe.experts.down"
    assert slots["model.layers.3.mlp.experts.5.down_proj.weight"].index == (1, 5)
    assert slots["model.layers.4.mlp.gate.e_score_correction_bias"].path == "mtp.block.moe.router.bias"
    assert slots["model.layers.4.shared_head.norm.weight"].path == "mtp.norm.scale"


@pytest.mark.parametrize(
    "preset,layers,count",
    [("glm-4.5-air", 46, 110_468_824_832 + 0), ("glm-4.5", 92, None)],
)
def test_published_sizes(preset: str, layers: int, count: int | None) -> None:
    """Every tensor of a published checkpoint has a slot, the MTP layer's too (THUDM/slime #309 lost it)."""
    config = get_preset(preset)
    slots = names.hf_slots(config)
    assert sum(math.prod(slot.shape) for slot in slots.values()) == config.parameter_counts()["total"]
    assert f"model.layers.{layers}.eh_proj.weight" in slots
    assert f"model.layers.{layers + 1}.input_layernorm.weight" not in slots
    assert abs(config.parameter_counts()["total"] / 1e9 - (110.469 if count else 358.34)) < 0.01


def test_golden_index_has_these_names(golden) -> None:
    for folder in ("a_air/f32", "b_glm45/bf16", "g_mtp/f32"):
        path = golden / "checkpoints" / folder
        index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        config = get_preset("tiny").from_hf(json.loads((path / "config.json").read_text()))
        assert set(names.hf_slots(names.with_mtp_of(config, index))) == set(index)


def test_mtp_parts_come_from_the_weights() -> None:
    config = get_preset("tiny")
    there = names.with_mtp_of(config, ["model.layers.3.eh_proj.weight"])
    assert (there.num_nextn_predict_layers, there.mtp_own_embed, there.mtp_own_head) == (1, False, False)
    head = names.with_mtp_of(config, ["model.layers.3.shared_head.head.weight"])
    assert (head.mtp_own_embed, head.mtp_own_head) == (False, True)
    assert not names.with_mtp_of(config, ["model.layers.2.input_layernorm.weight"]).has_mtp
