"""Bad input: one error that lists everything found, exit code 2, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest

from glm45_jax import convert
from glm45_jax.cli import main
from glm45_jax.convert import store, transfer
from glm45_jax.errors import UserError
from tests.convert.support import arrays, make, rewrite

Q = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "hf")


@pytest.fixture
def source(made, tmp_path):
    return shutil.copytree(made, tmp_path / "hf")


def refused(source, capsys) -> str:
    """What the command says, after checking that it failed as it must and that loading says the same."""
    before = sorted(source.parent.iterdir())
    assert main(["convert", "from-hf", str(source), str(source.parent / "own"), "--json"]) == 2
    said = capsys.readouterr().err
    assert sorted(source.parent.iterdir()) == before
    with pytest.raises(UserError) as error:
        convert.load_checkpoint(source)
    assert str(error.value) in said
    return said


def index(source):
    path = source / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def shard_of(source, name: str):
    return source / index(source)[1]["weight_map"][name]


def drop(*names):
    return lambda tensors: {name: a for name, a in tensors.items() if name not in names}


def test_everything_is_listed(source, capsys) -> None:
    def change(tensors):
        tensors = drop(Q, EXPERT)(tensors)
        tensors["model.layers.1.extra.weight"] = np.ones(3, np.float32)
        tensors["model.norm.weight"] = np.ones(33, np.float32)
        return tensors

    said = refused(rewrite(source, change), capsys)
    assert "4 problems" in said
    assert f"missing tensor {Q}, [64, 32]" in said and f"missing tensor {EXPERT}" in said
    assert "unexpected tensor model.layers.1.extra.weight in model.safetensors" in said
    assert "model.norm.weight: shape [33], expected [32]" in said


def test_transposed(source, capsys) -> None:
    down = "model.layers.0.mlp.down_proj.weight"
    said = refused(rewrite(source, lambda t: t | {down: t[down].T}), capsys)
    assert f"{down}: shape [48, 32], expected [32, 48]" in said


def test_layers_beyond_the_config(source, capsys) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    assert "unexpected tensor model.layers.3.mlp" in refused(source, capsys)


def test_wrong_dtype(source, capsys) -> None:
    said = refused(rewrite(source, lambda t: t | {Q: np.ones((64, 32), np.int8)}), capsys)
    assert f"{Q}: dtype I8, expected one of F32, BF16, F16" in said


@pytest.mark.parametrize("form,suffix", [("channel", "_scale"), ("block", "_scale_inv")])
def test_fp8_without_its_scale(form, suffix, tmp_path, capsys) -> None:
    """vllm #32101: the head's scale dropped without a word, and drafts were no longer accepted."""
    head = "model.layers.3.shared_head.head.weight" + suffix
    source = rewrite(make(tmp_path / "hf", fp8=form), drop(head))
    assert f"missing tensor {head}, " in refused(source, capsys)
    wrong = rewrite(source, lambda t: t | {head: np.ones((2, 2), np.float32)})
    assert f"{head}: shape [2, 2], expected " in refused(wrong, capsys)


def test_duplicate(source, capsys) -> None:
    shard = shard_of(source, Q)
    path, content = index(source)
    content["weight_map"]["model.copy.weight"] = "copy.safetensors"
    path.write_text(json.dumps(content))
    shutil.copy(shard, source / "copy.safetensors")
    said = refused(source, capsys)
    assert f"duplicate tensor {Q}: in " in said
    assert "model.copy.weight lies in copy.safetensors, it does not" in said


def test_index_that_names_what_is_absent(source, capsys) -> None:
    gone = shard_of(source, Q)
    gone.unlink()
    path, content = index(source)
    content["weight_map"] |= {"up": "../up.safetensors", "abs": "/etc/passwd", "no": 3}
    path.write_text(json.dumps(content))
    said = refused(source, capsys)
    assert f"names {gone.name}, which is not there" in said
    assert said.count("a file of the same directory is expected") == 3
    assert "missing tensor" not in said  # told by the file's name already


def test_index_is_not_json(source, capsys) -> None:
    (source / "model.safetensors.index.json").write_text("{")
    assert "index.json: not JSON" in refused(source, capsys)
    (source / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in refused(source, capsys)


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_truncated(cut, source, capsys) -> None:
    shard = shard_of(source, Q)
    shard.write_bytes(shard.read_bytes()[:cut])
    assert f"{shard.name}: truncated" in refused(source, capsys)


def test_corrupt_header(source, capsys) -> None:
    shard = shard_of(source, Q)
    content = bytearray(shard.read_bytes())
    content[20] = 0xFF
    shard.write_bytes(bytes(content))
    assert f"{shard.name}: corrupt header" in refused(source, capsys)


def test_other_architectures_and_broken_weights_at_once(source, capsys) -> None:
    shard = shard_of(source, Q)
    shard.write_bytes(b"")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    said = refused(source, capsys)
    assert "another architecture (model_type 'llama'" in said and f"{shard.name}: truncated" in said


def test_nothing_there(tmp_path, capsys) -> None:
    assert main(["convert", "from-hf", str(tmp_path / "zai-org" / "GLM-4.5-Air"), str(tmp_path / "own")]) == 2
    assert "no such directory" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert "config.json: cannot be read" in refused(tmp_path / "empty", capsys)


def test_no_weights(source, capsys) -> None:
    for file in [*source.glob("*.safetensors"), *source.glob("*.index.json")]:
        file.unlink()
    assert "no weights" in refused(source, capsys)


def test_the_target_exists(source, tmp_path) -> None:
    (tmp_path / "own").mkdir()  # empty: fine
    convert.from_hf(source, tmp_path / "own")
    other = make(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="exists already"):
        convert.from_hf(other, tmp_path / "own")
    convert.from_hf(other, tmp_path / "own", overwrite=True)
    assert (
        convert.load_checkpoint(tmp_path / "own")[1]["embed"]["weight"] == arrays(other)["model.embed_tokens.weight"]
    ).all()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").touch()
    with pytest.raises(UserError, match="holds no checkpoint"):
        convert.from_hf(other, tmp_path / "home", overwrite=True)
    assert not list(tmp_path.glob("*.partial"))


def test_a_target_that_cannot_be(source, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        convert.from_hf(source, tmp_path / "file" / "own")
    with pytest.raises(UserError, match="a file stands there"):
        convert.from_hf(source, tmp_path / "file")


def test_a_disk_too_small_is_told_at_once(source, tmp_path, monkeypatch, capsys) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["convert", "from-hf", str(source), str(tmp_path / "own"), "--json"]) == 2
    assert "the disk is too full" in capsys.readouterr().err
    assert not list(tmp_path.glob("own*"))


@pytest.mark.parametrize("how", ["os", "tensorstore"])
def test_a_disk_that_fills_up(how, source, tmp_path, monkeypatch, capsys) -> None:
    """Part of the way through, in the words of the operating system and in those of tensorstore."""
    whole, left = store.ChunkJob.copy, [20]

    def copy(self, values=None):
        left[0] -= 1
        if left[0] < 0 and how == "os":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if left[0] < 0:
            raise ValueError("RESOURCE_EXHAUSTED: … No space left on device [os_error_code='28']")
        return whole(self, values)

    monkeypatch.setattr(store.ChunkJob, "copy", copy)
    assert main(["convert", "from-hf", str(source), str(tmp_path / "own"), "--json"]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not list(tmp_path.glob("own*"))


def test_a_really_full_disk(source, tmp_path, monkeypatch) -> None:
    """With a limit on the size of files, as the nearest to a full disk that any user may set."""
    import resource

    monkeypatch.setattr(transfer, "_check_space", lambda work, nbytes: None)
    convert.from_hf(source, tmp_path / "own")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            convert.from_hf(source, tmp_path / "two")
        with pytest.raises(UserError, match="the disk is full"):
            convert.to_hf(tmp_path / "own", tmp_path / "back")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "own"]


def test_a_source_that_shrinks_under_way(source, tmp_path, monkeypatch) -> None:
    opened = convert.own_format.open_source

    def shrinking(path):
        checkpoint = opened(path)
        os.truncate(shard_of(source, Q), 2000)
        return checkpoint

    monkeypatch.setattr(convert.own_format, "open_source", shrinking)
    with pytest.raises(UserError, match="the file ends at byte"):
        convert.from_hf(source, tmp_path / "own")
    assert not list(tmp_path.glob("own*"))


def test_damage_is_found(source, tmp_path, capsys) -> None:
    convert.from_hf(source, tmp_path / "own")
    chunk = tmp_path / "own" / "params" / "moe_layers.moe.experts.up" / "c.1.3.0.0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(bytes(content))
    assert main(["convert", "verify", str(tmp_path / "own")]) == 2
    assert "damaged: moe_layers.moe.experts.up" in capsys.readouterr().err
    chunk.unlink()
    for read in (convert.load_checkpoint, lambda path: convert.to_hf(path, tmp_path / "back")):
        with pytest.raises(UserError, match=r"c\.1\.3\.0\.0: cannot be read"):
            read(tmp_path / "own")
    assert not (tmp_path / "back").exists()


def test_half_a_target_is_not_taken_for_a_whole_one(source, tmp_path) -> None:
    convert.from_hf(source, tmp_path / "own")
    for missing in ("params/_METADATA", "glm45_checkpoint.json"):
        broken = shutil.copytree(tmp_path / "own", tmp_path / "broken")
        (broken / missing).unlink()
        with pytest.raises(UserError, match="not whole"):
            convert.load_checkpoint(broken)
        with pytest.raises(UserError):
            convert.to_hf(broken, tmp_path / "back")
        shutil.rmtree(broken)
    with pytest.raises(UserError, match="a checkpoint of our own already"):
        convert.from_hf(tmp_path / "own", tmp_path / "again")
    with pytest.raises(UserError, match="no checkpoint of glm45_jax"):
        convert.to_hf(source, tmp_path / "back")


def test_config_and_arrays_must_agree(source, tmp_path) -> None:
    convert.from_hf(source, tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 49}))
    with pytest.raises(UserError, match=r"dense_layers\.mlp\.gate\.weight has shape \[1, 48, 32\], expected"):
        convert.load_checkpoint(tmp_path / "own")
