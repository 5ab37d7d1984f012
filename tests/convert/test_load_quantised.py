"""Checkpoints loaded with quantised weights: FP8 as it lies, and quantised while reading."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax import convert
from glm45_jax.config import get_preset
from glm45_jax.convert import names
from glm45_jax.errors import UserError
from glm45_jax.model import quantize_params
from glm45_jax.model.quantized import is_quantized
from glm45_jax.parallel import SERVING_RULES, make_mesh
from tests.convert.support import arrays, make, rewrite, same

WIDE = get_preset("tiny", hidden_size=160, vocab_size=64, num_attention_heads=4, intermediate_size=136)


def by_path(params):
    return names.flatten(params)


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["channel", "block"])
@pytest.mark.parametrize("own", [False, True], ids=["hf", "own"])
def test_kept_fp8_is_exactly_what_is_dequantised(form, own, tmp_path) -> None:
    source = make(tmp_path / "hf", WIDE, fp8=form)
    if own:
        convert.from_hf(source, tmp_path / "own", keep_fp8=True)
        source = tmp_path / "own"
    config, kept = glm.load_checkpoint(source, quantize="keep")
    expected_config, expected = glm.load_checkpoint(source)
    assert config == expected_config
    found, expected = by_path(kept), by_path(expected)
    quantised = {path for path, leaf in found.items() if is_quantized(leaf)}
    # the MTP layer's own head is FP8 in the published checkpoints, its joint projection and the main head are not
    assert {"moe_layers.moe.experts.down", "dense_layers.attention.k.weight", "mtp.head.weight"} <= quantised
    assert not {"head.weight", "embed.weight", "moe_layers.moe.router.weight"} & quantised
    for path, leaf in found.items():
        if path in quantised:
            assert leaf.values.dtype == jnp.float8_e4m3fn and leaf.per_channel == (form == "channel")
            leaf = leaf.dequantized(jnp.bfloat16)
        assert same(leaf, expected[path]), path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "fp8", "int8-block", "fp8-block"])
def test_quantised_while_read_is_quantised_in_memory(form, tmp_path) -> None:
    source = make(tmp_path / "hf", WIDE)
    config, found = glm.load_checkpoint(source, quantize=form, quantize_head=True)
    with jax.disable_jit():  # compiling a program for each shape takes longer
        expected = quantize_params(glm.load_checkpoint(source)[1], config, form, head=True)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        if a.dtype in (jnp.int8, jnp.float8_e4m3fn):  # a value between two codes may fall to either
            apart = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)) > 0
            assert a.shape == b.shape and apart.mean() < 1e-3
        else:
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)


def test_fp8_of_an_fp8_checkpoint_is_not_rounded_again(tmp_path) -> None:
    source = make(tmp_path / "hf", WIDE, fp8="block")
    kept, found = (by_path(glm.load_checkpoint(source, quantize=form)[1]) for form in ("keep", "fp8"))
    assert jax.tree.structure(kept) == jax.tree.structure(found)
    assert all(jax.tree.leaves(jax.tree.map(same, kept, found)))


def test_nothing_is_widened_whole(tmp_path, monkeypatch) -> None:
    """Of a stack of experts one matrix is in floating point at a time, for each thread."""
    from glm45_jax.convert.pieces import Leaf

    source, sizes = make(tmp_path / "hf", WIDE), []
    read = Leaf.read
    monkeypatch.setattr(Leaf, "read", lambda self, *a, **k: sizes.append((r := read(self, *a, **k)).size) or r)
    _, params = glm.load_checkpoint(source, quantize="int8")
    matrices = [leaf.shape[-2] * leaf.shape[-1] for leaf in by_path(params).values() if is_quantized(leaf)]
    floats = [leaf.size for leaf in by_path(params).values() if not is_quantized(leaf)]
    assert max(sizes) <= max(*matrices, *floats)
    assert sum(sizes) == sum(leaf.shape and np.prod(leaf.shape) for leaf in by_path(params).values())


@pytest.mark.parametrize("form", ["keep", "int8"])
def test_over_a_mesh_each_device_has_its_own_part(form, tmp_path) -> None:
    config = WIDE.replace(intermediate_size=136)
    source = make(tmp_path / "hf", config, fp8="channel")
    mesh = make_mesh(jax.devices()[:1], tensor=1)
    rules = {logical: axes or None for logical, *axes in SERVING_RULES}
    _, expected = glm.load_checkpoint(source, quantize=form)
    _, found = glm.load_checkpoint(source, quantize=form, mesh=mesh, rules=rules)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(same, found, expected)))


def test_refused(tmp_path) -> None:
    plain = make(tmp_path / "hf", WIDE)
    with pytest.raises(UserError, match="no matrices of this checkpoint are FP8"):
        glm.load_checkpoint(plain, quantize="keep")
    with pytest.raises(UserError, match="choose one of int8"):
        glm.load_checkpoint(plain, quantize="int3")
    config, params = glm.load_checkpoint(plain, quantize="int8")
    with pytest.raises(UserError, match="quantised"):
        convert.save_checkpoint(params, config, tmp_path / "out")


def test_experts_fp8_in_part_are_dequantised_together(tmp_path) -> None:
    def change(tensors):
        out = {}
        for name, x in tensors.items():
            if "up_proj" in name and ".experts." in name and "layers.1." in name:
                if name.endswith("_scale"):
                    continue
                x = x.astype(np.float32)
            out[name] = x
        return out

    source = rewrite(make(tmp_path / "hf", WIDE, fp8="channel"), change)
    assert arrays(source)
    found = by_path(glm.load_checkpoint(source, quantize="keep")[1])
    assert not any(is_quantized(found[f"moe_layers.moe.experts.{part}"]) for part in ("gate", "up", "down"))
    assert is_quantized(found["moe_layers.attention.q.weight"])
