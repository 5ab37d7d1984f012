"""From Hugging Face's format into ours and back: right values on the way, the same bytes at the end."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from glm45_jax import convert
from glm45_jax.config import load_hf_config
from tests.convert.support import NARROW, arrays, flat, make, raw_tensors, rewrite, same, write_safetensors

# (options of the checkpoint, options of the conversion)
FORMS = {
    "bf16": ({}, {}),
    "f32": ({"dtype": "F32"}, {}),
    "f16": ({"dtype": "F16"}, {}),
    "shared_mtp": ({"mtp": "shared"}, {}),
    "no_mtp": ({"mtp": "none"}, {}),
    "one_shard": ({"max_shard_size": "5GB"}, {}),
    "fp8_channel": ({"fp8": "channel"}, {"keep_fp8": True}),
    "fp8_block": ({"fp8": "block"}, {"keep_fp8": True}),
    "fp8_bf16_scales": ({"fp8": "channel", "scale_dtype": "BF16"}, {"keep_fp8": True}),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("options,how", FORMS.values(), ids=FORMS)
def test_same_bytes(options, how, tmp_path) -> None:
    source = make(tmp_path / "hf", **options)
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 49}}, "added_tokens": [{"id": 52}]}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((source / "config.json").read_text()) | {"transformers_version": "4.54.0", "new_field": [1]}
    (source / "config.json").write_text(json.dumps(config))
    there = convert.from_hf(source, tmp_path / "own", **how)
    back = convert.to_hf(tmp_path / "own", tmp_path / "back", max_shard_size="40KB")
    assert raw_tensors(tmp_path / "back") == raw_tensors(source)
    assert there.digests == convert.verify(tmp_path / "own") and back.digests == convert.verify(tmp_path / "back")
    for directory in ("own", "back"):
        kept = json.loads((tmp_path / directory / "config.json").read_text())
        assert config | {"glm45_jax": None} == kept | {"glm45_jax": None}
        assert kept["glm45_jax"]["real_vocab_size"] == 53  # of 64 rows: the tokenizer's highest id is 52
        for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (tmp_path / directory / file).read_bytes() == (source / file).read_bytes()
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in raw_tensors(source).values())
    for name, file in index["weight_map"].items():
        assert name.encode() in (tmp_path / "back" / file).read_bytes()
    assert max(f.stat().st_size for f in (tmp_path / "back").glob("*.safetensors")) < 70_000


def test_arrays_are_the_tensors_stacked(tmp_path) -> None:
    """Against the naming of section 2.1 of the checkpoint's description, written out again here."""
    source = make(tmp_path / "hf")
    convert.from_hf(source, tmp_path / "own")
    hf = arrays(source)
    for path in (source, tmp_path / "own"):
        config, params = convert.load_checkpoint(path)
        assert config.mtp_own_embed and config.mtp_own_head
        p = {path: np.asarray(array) for path, array in flat(params).items()}
        assert same(p["embed.weight"], hf["model.embed_tokens.weight"])
        assert same(p["final_norm.scale"], hf["model.norm.weight"])
        assert same(p["head.weight"], hf["lm_head.weight"])
        for layer in (1, 2):
            name = f"model.layers.{layer}."
            moe = name + "mlp."
            for e in range(config.n_routed_experts):
                for part in ("gate", "up", "down"):
                    expert = p[f"moe_layers.moe.experts.{part}"][layer - 1, e]
                    assert same(expert, hf[f"{moe}experts.{e}.{part}_proj.weight"])
            assert same(p["moe_layers.moe.router.weight"][layer - 1], hf[moe + "gate.weight"])
            assert same(p["moe_layers.moe.router.bias"][layer - 1], hf[moe + "gate.e_score_correction_bias"])
            for part in ("gate", "up", "down"):
                shared = p[f"moe_layers.moe.shared.{part}.weight"][layer - 1]
                assert same(shared, hf[f"{moe}shared_experts.{part}_proj.weight"])
            for part in "qkvo":
                assert same(
                    p[f"moe_layers.attention.{part}.weight"][layer - 1], hf[f"{name}self_attn.{part}_proj.weight"]
                )
            for part in "qkv":
                assert same(p[f"moe_layers.attention.{part}.bias"][layer - 1], hf[f"{name}self_attn.{part}_proj.bias"])
            assert same(p["moe_layers.attention.q_norm.scale"][layer - 1], hf[name + "self_attn.q_norm.weight"])
            assert same(p["moe_layers.input_norm.scale"][layer - 1], hf[name + "input_layernorm.weight"])
            after = p["moe_layers.post_attention_norm.scale"][layer - 1]
            assert same(after, hf[name + "post_attention_layernorm.weight"])
            assert same(p["moe_layers.attention.k_norm.scale"][layer - 1], hf[name + "self_attn.k_norm.weight"])
        assert same(p["dense_layers.mlp.down.weight"][0], hf["model.layers.0.mlp.down_proj.weight"])
        assert same(p["dense_layers.attention.o.weight"][0], hf["model.layers.0.self_attn.o_proj.weight"])
        mtp = "model.layers.3."
        assert same(p["mtp.enorm.scale"], hf[mtp + "enorm.weight"])
        assert same(p["mtp.hnorm.scale"], hf[mtp + "hnorm.weight"])
        assert same(p["mtp.norm.scale"], hf[mtp + "shared_head.norm.weight"])
        assert same(p["mtp.head.weight"], hf[mtp + "shared_head.head.weight"])
        assert same(p["mtp.embed.weight"], hf[mtp + "embed_tokens.weight"])
        assert same(p["mtp.eh_proj.weight"], hf[mtp + "eh_proj.weight"])
        assert same(p["mtp.block.moe.experts.up"][5], hf[mtp + "mlp.experts.5.up_proj.weight"])


@pytest.mark.parametrize("form", ["none", "block", "channel"])
def test_fused_experts_become_single_ones(form, tmp_path) -> None:
    """[E, gate rows then up rows, H], with scales split alike."""
    # With blocks of 128 an expert of 128 rows ends where a block ends, as in the published widths.
    config = NARROW.replace(moe_intermediate_size=128, num_hidden_layers=2) if form == "block" else NARROW
    source = make(tmp_path / "hf", config, layout="fused", fp8=form, max_shard_size="1GB")
    hf = arrays(source)
    assert not any(".experts.0." in name for name in hf)
    convert.from_hf(source, tmp_path / "own", keep_fp8=True)
    convert.to_hf(tmp_path / "own", tmp_path / "back")
    back = arrays(tmp_path / "back")
    suffixes = {"none": [""], "block": ["", "_scale_inv"], "channel": ["", "_scale"]}[form]
    for layer in range(1, config.num_hidden_layers + 1):  # the last one is the MTP layer
        base = f"model.layers.{layer}.mlp.experts."
        for suffix in suffixes:
            both, down = hf[base + "gate_up_proj" + suffix], hf[base + "down_proj" + suffix]
            rows = both.shape[1] // 2
            for e in range(config.n_routed_experts):
                assert same(back[f"{base}{e}.gate_proj.weight{suffix}"], both[e, :rows])
                assert same(back[f"{base}{e}.up_proj.weight{suffix}"], both[e, rows:])
                assert same(back[f"{base}{e}.down_proj.weight{suffix}"], down[e])
    others = {name for name in hf if ".mlp.experts." not in name}
    assert all(same(back[name], hf[name]) for name in others)


@pytest.mark.parametrize("form", ["block", "channel"])
@pytest.mark.parametrize("keep", [False, True], ids=["dequantised", "kept"])
def test_fp8_values(form, keep, tmp_path) -> None:
    """bfloat16(float32(codes) * scale), from disk or on the way, whatever the target stores."""
    config = NARROW.replace(intermediate_size=200)  # blocks that don't fit
    source = make(tmp_path / "hf", config, fp8=form)
    convert.from_hf(source, tmp_path / "own", keep_fp8=keep)
    hf = arrays(source)

    def value(name: str) -> np.ndarray:
        codes = hf[name].astype(np.float32)
        if form == "channel":
            return (codes * hf[name + "_scale"]).astype(ml_dtypes.bfloat16)
        scale = np.kron(hf[name + "_scale_inv"], np.ones((128, 128), np.float32))
        return (codes * scale[: codes.shape[0], : codes.shape[1]]).astype(ml_dtypes.bfloat16)

    for path in (source, tmp_path / "own"):
        _, params = convert.load_checkpoint(path)
        p = {path: np.asarray(array) for path, array in flat(params).items()}
        assert same(p["dense_layers.mlp.up.weight"][0], value("model.layers.0.mlp.up_proj.weight"))
        assert same(p["mtp.head.weight"], value("model.layers.3.shared_head.head.weight"))
        for e in range(8):
            assert same(
                p["moe_layers.moe.experts.down"][1, e], value(f"model.layers.2.mlp.experts.{e}.down_proj.weight")
            )
        assert same(p["head.weight"], hf["lm_head.weight"])
        assert not any(name.endswith("_scale") for name in p)
    if not keep:
        convert.to_hf(tmp_path / "own", tmp_path / "back")
        back = arrays(tmp_path / "back")
        assert not any("_scale" in name for name in back)
        assert same(back["model.layers.1.self_attn.q_proj.weight"], value("model.layers.1.self_attn.q_proj.weight"))
        assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def mixed(tensors):
    """Layers, experts and biases of differing dtypes, with NaN payloads, infinities, denormals and -0."""
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].astype(ml_dtypes.bfloat16)
    odd = np.array([0x7FC1, 0xFF81, 0x7F80, 0x8000, 0x0001] + [0] * 27, np.uint16).view(ml_dtypes.bfloat16)
    tensors["model.layers.1.input_layernorm.weight"] = odd
    for name in ("model.layers.2.input_layernorm.weight", "model.layers.2.mlp.experts.3.up_proj.weight"):
        tensors[name] = tensors[name].astype(np.float32) + np.float32(1e-7)
    half = "model.layers.2.self_attn.q_proj.weight"
    tensors[half] = tensors[half].astype(np.float16)
    return tensors


def test_mixed_dtypes_come_back(tmp_path) -> None:
    source = rewrite(make(tmp_path / "hf"), mixed)
    convert.from_hf(source, tmp_path / "own")
    convert.to_hf(tmp_path / "own", tmp_path / "back")
    assert raw_tensors(tmp_path / "back") == raw_tensors(source)
    _, params = convert.load_checkpoint(tmp_path / "own")
    p, hf = flat(params), arrays(source)
    assert p["moe_layers.moe.router.bias"].dtype == np.float32  # always, whatever the file says
    assert p["moe_layers.moe.experts.up"].dtype == np.float32 and p["moe_layers.attention.q.weight"].dtype == np.float32
    assert p["moe_layers.moe.experts.gate"].dtype == ml_dtypes.bfloat16
    assert same(p["moe_layers.moe.experts.up"][1, 3], hf["model.layers.2.mlp.experts.3.up_proj.weight"])


@pytest.mark.parametrize("keep", [False, True], ids=["dequantised", "kept"])
def test_stacks_that_are_fp8_in_part(keep, tmp_path) -> None:
    """Quantisation recipes ignore single layers: codes and bfloat16 then meet in one stack."""

    def change(tensors):
        for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight"):
            tensors.pop(name + "_scale")
            tensors[name] = tensors[name].astype(np.float32).astype(ml_dtypes.bfloat16) * ml_dtypes.bfloat16(0.37)
        return tensors

    source = rewrite(make(tmp_path / "hf", fp8="channel"), change)
    convert.from_hf(source, tmp_path / "own", keep_fp8=keep)
    convert.to_hf(tmp_path / "own", tmp_path / "back")
    if keep:
        assert raw_tensors(tmp_path / "back") == raw_tensors(source)
    hf = arrays(source)
    for path in (source, tmp_path / "own", tmp_path / "back"):
        p = flat(convert.load_checkpoint(path)[1])
        assert same(p["moe_layers.attention.q.weight"][0], hf["model.layers.1.self_attn.q_proj.weight"])
        name = "model.layers.2.self_attn.q_proj.weight"
        value = (hf[name].astype(np.float32) * hf[name + "_scale"]).astype(ml_dtypes.bfloat16)
        assert same(p["moe_layers.attention.q.weight"][1], value)


def test_torch_files(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    source = make(tmp_path / "hf", fp8="channel", layout="fused")
    want = raw_tensors(source)
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
    state = {
        name: torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kinds[dtype]).reshape(shape)
        for name, (dtype, shape, data) in want.items()
    }
    convert.from_hf(source, tmp_path / "own", keep_fp8=True)
    for file in [*source.glob("*.safetensors"), *source.glob("*.index.json")]:
        file.unlink()
    old = [name for name in state if state[name].dtype == torch.float32]  # the oldest format knows no FP8
    halves = [name for name in state if name not in old], old
    for i, half in enumerate(halves, 1):
        # one file of today's format, one of the oldest, which cannot be mapped
        torch.save(
            {n: state[n] for n in half}, source / f"pytorch_model-{i}.bin", _use_new_zipfile_serialization=i == 1
        )
    weight_map = {name: f"pytorch_model-{i}.bin" for i, half in enumerate(halves, 1) for name in half}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"not": "weights"}, source / "training_args.bin")
    made = convert.from_hf(source, tmp_path / "own2", keep_fp8=True)
    assert made.digests == convert.verify(tmp_path / "own")


def test_a_torch_file_that_would_run_code_is_refused(tmp_path) -> None:
    pytest.importorskip("torch")
    import pickle

    source = make(tmp_path / "hf")
    for file in [*source.glob("*.safetensors"), *source.glob("*.index.json")]:
        file.unlink()

    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (source / "model.pt").write_bytes(pickle.dumps({"a": Runs()}))
    with pytest.raises(convert.hf_source.UserError, match=r"model\.pt: not a file of tensors"):
        convert.from_hf(source, tmp_path / "own")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "own").exists()


def test_a_single_file_is_a_source(tmp_path) -> None:
    source = rewrite(make(tmp_path / "hf"), lambda tensors: tensors)
    (source / "other.safetensors").write_bytes(b"not looked at")
    config, params = convert.load_checkpoint(source / "model.safetensors")
    assert config.has_mtp and same(params["embed"]["weight"], arrays_of(source)["model.embed_tokens.weight"])


def arrays_of(source):
    (source / "other.safetensors").unlink()
    return arrays(source)


def single(source, path):
    """The same checkpoint as one file."""
    path.mkdir()
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    write_safetensors(path / "model.safetensors", arrays(source))
    return path


def test_source_config_without_weights(tmp_path) -> None:
    """With an index alone its names are believed; with a config alone the config is."""
    source = make(tmp_path / "hf", mtp="shared")
    for file in source.glob("*.safetensors"):
        file.unlink()
    assert convert.source_config(source).num_nextn_predict_layers == 1
    (source / "model.safetensors.index.json").unlink()
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (source / "config.json").write_text(json.dumps(config))
    assert not convert.source_config(source).has_mtp


def test_golden_checkpoints(golden, tmp_path) -> None:
    for name, folder in {"a": "a_air/f32", "b": "b_glm45/bf16", "g": "g_mtp/f32"}.items():
        source = golden / "checkpoints" / folder
        convert.from_hf(source, tmp_path / name)
        convert.to_hf(tmp_path / name, tmp_path / f"{name}_back")
        assert raw_tensors(tmp_path / f"{name}_back") == raw_tensors(source)


@pytest.mark.parametrize("weights,own", [("whole", True), ("shared", False), ("none", False)])
def test_source_config_follows_the_weights(weights, own, tmp_path) -> None:
    """The published config says num_nextn_predict_layers 1 whether or not the layer was saved."""
    source = make(tmp_path / "hf", mtp=weights)
    config = json.loads((source / "config.json").read_text())
    del config["glm45_jax"]
    for said in (0, 1):
        (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": said}))
        found = convert.source_config(source)
        assert convert.source_config(single(source, tmp_path / f"single{said}")) == found
        assert (found.has_mtp, found.mtp_own_embed, found.mtp_own_head) == (weights != "none", own, own)
        convert.from_hf(source, tmp_path / f"own{said}")
        stored = load_hf_config(tmp_path / f"own{said}")
        assert (stored.has_mtp, stored.mtp_own_embed, stored.mtp_own_head) == (weights != "none", own, own)
