"""Params in memory, out in either format; transformers loads what comes out."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from glm45_jax import convert
from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from tests.convert.support import NARROW, make, raw_tensors, same

CONFIG = NARROW.replace(mtp_own_embed=True, mtp_own_head=True)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    return convert.load_checkpoint(make(tmp_path_factory.mktemp("export") / "hf", dtype="F32"))[1]


def test_both_formats_load_again(params, tmp_path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    config = CONFIG.replace(eos_token_id=(5, 6), pad_token_id=5, real_vocab_size=60)
    (tmp_path / "hf").mkdir()  # an empty directory is as good as none
    convert.export_hf(params, config, tmp_path / "hf", tokenizer_dir=tokenizer)
    convert.save_checkpoint(params, config, tmp_path / "own", tokenizer_dir=tokenizer)
    for path in (tmp_path / "hf", tmp_path / "own"):
        loaded_config, loaded = convert.load_checkpoint(path)
        assert loaded_config == config
        assert all(jax.tree.leaves(jax.tree.map(same, loaded, params)))
        assert (path / "tokenizer.json").exists()
        convert.verify(path)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [5, 6]
    convert.from_hf(tmp_path / "hf", tmp_path / "own2")
    convert.to_hf(tmp_path / "own2", tmp_path / "hf2")
    assert raw_tensors(tmp_path / "hf2") == raw_tensors(tmp_path / "hf")


def test_the_config_says_the_dtype_of_the_arrays(params, tmp_path) -> None:
    halved = jax.tree.map(lambda a: np.asarray(a).astype("bfloat16"), params)
    for layers in (halved["moe_layers"], halved["mtp"]["block"]):
        layers["moe"]["router"]["bias"] = layers["moe"]["router"]["bias"].astype("float32")
    convert.export_hf(halved, CONFIG, tmp_path / "hf")
    assert convert.load_checkpoint(tmp_path / "hf")[0].param_dtype == "bfloat16"


def test_params_of_another_config_are_refused(params, tmp_path) -> None:
    wrong = params | {"extra": params["final_norm"], "embed": {"weight": params["embed"]["weight"][1:]}}
    del wrong["final_norm"]
    for write in (convert.export_hf, convert.save_checkpoint):
        with pytest.raises(UserError) as error:
            write(wrong, CONFIG, tmp_path / "out")
        said = str(error.value)
        assert "missing final_norm.scale" in said and "unexpected extra.scale" in said
        assert "embed.weight has shape [63, 32], expected [64, 32]" in said
    assert not list(tmp_path.iterdir())


def test_existing_targets(params, tmp_path) -> None:
    convert.export_hf(params, CONFIG, tmp_path / "hf")
    with pytest.raises(UserError, match="exists already"):
        convert.export_hf(params, CONFIG, tmp_path / "hf")
    convert.export_hf(params, CONFIG, tmp_path / "hf", overwrite=True, max_shard_size=50_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    with pytest.raises(UserError, match="size 'big' is not understood"):
        convert.export_hf(params, CONFIG, tmp_path / "other", max_shard_size="big")


def test_sizes() -> None:
    sizes = [convert.hf_format.parse_size(s) for s in ("5GB", "500MB", "2GiB", "10", "1.5kb", 7)]
    assert sizes == [5 * 10**9, 500 * 10**6, 2 * 2**30, 10, 1500, 7]


@pytest.mark.parity
@pytest.mark.parametrize("form", ["plain", "glm46", "tied", "fused_source"])
def test_transformers_loads_it(form, tmp_path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = get_preset("tiny", num_hidden_layers=2, tie_word_embeddings=form == "tied", pad_token_id=0)
    mtp = "shared" if form == "glm46" else "none"
    layout = "fused" if form == "fused_source" else "per-expert"
    source = make(tmp_path / "hf", config, dtype="F32", mtp=mtp, layout=layout)
    convert.from_hf(source, tmp_path / "own")
    convert.to_hf(tmp_path / "own", tmp_path / "back", max_shard_size="400KB")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "back", output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith("model.layers.2.") for key in info["unexpected_keys"])
    if layout == "fused":
        return
    reference = load(source)
    for (name, a), b in zip(model.state_dict().items(), reference.state_dict().values()):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    _, params = convert.load_checkpoint(tmp_path / "own")
    fused = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"].numpy()
    experts = params["moe_layers"]["moe"]["experts"]
    assert (fused == np.concatenate([experts["gate"][0], experts["up"][0]], axis=1)).all()
