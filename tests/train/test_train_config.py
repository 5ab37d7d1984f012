"""YAML and key=value to a `TrainConfig`: values of the right types, mistakes named with a hint."""

from pathlib import Path

import pytest
import yaml

from glm45_jax.cli import main
from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from glm45_jax.train import TrainConfig, load_train_config
from glm45_jax.train.config import to_tree, train_config_from
from glm45_jax.train.stages import is_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = {"model": {"preset": "tiny"}, "steps": 10}


def load(tmp_path, tree, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return load_train_config(file, overrides)


def test_defaults_and_preset(tmp_path):
    config = load(tmp_path, {"model": "small", "steps": 10})
    assert config == TrainConfig(model=get_preset("small", param_dtype="float32"), steps=10)
    assert config.model.dtype == "bfloat16", "only the parameters are kept in float32"
    hash(config)


def test_numbers_as_yaml_writes_them(tmp_path):
    """YAML reads 1e-4 as a string and 2.0 as a float."""
    config = load(
        tmp_path, "model: {preset: tiny, hidden_size: 96}\nsteps: 20.0\noptimizer: {learning_rate: 1e-3, eps: 1}\n"
    )
    assert (config.steps, config.model.hidden_size) == (20, 96)
    assert config.optimizer.learning_rate == pytest.approx(1e-3)
    assert isinstance(config.optimizer.eps, float) and isinstance(config.steps, int)


def test_overrides(tmp_path):
    tree = {**MINIMAL, "model": "tiny", "data": {"sources": [{"path": "a"}, {"path": ["b", "c"]}]}}
    config = load(
        tmp_path, tree, "steps=30", "model.remat=full", "optimizer.clip_norm=null", "optimizer.learning_rate=1e-2",
        "data.sources.1.path=[d, e]", "data.sources.0.weight=2", "tokenizer.path=tok", "output_dir=runs/x",
    )  # fmt: skip
    assert config.data is not None
    assert (config.steps, config.model.remat, config.optimizer.clip_norm) == (30, "full", None)
    assert config.optimizer.learning_rate == pytest.approx(0.01)
    assert [(s.path, s.weight) for s in config.data.sources] == [(("a",), 2.0), (("d", "e"), 1.0)]
    assert (config.tokenizer.path, config.output_dir) == ("tok", "runs/x")


def test_written_and_read_again(tmp_path):
    config = load(tmp_path, {**MINIMAL, "data": {"sources": [{"path": "a"}]}, "model": {"preset": "glm-4.5-air"}})
    again = train_config_from(yaml.safe_load(yaml.safe_dump(to_tree(config))))
    assert again == config


RUNS = [p for p in sorted(RECIPES.rglob("*.yaml")) if not is_recipe(p)]  # chains of stages: test_stages.py


@pytest.mark.parametrize("recipe", RUNS, ids=lambda p: p.name)
def test_recipes(recipe):
    assert load_train_config(recipe).data is not None


@pytest.mark.parametrize(
    "change, overrides, why",
    [
        ({"stepz": 1}, (), "unknown key 'stepz'; did you mean 'steps'"),
        ({"optimizer": {"learningrate": 1}}, (), "optimizer: unknown key 'learningrate'; did you mean 'learning_rate'"),
        ({"model": {"preset": "tiny", "hiden_size": 1}}, (), "model: unknown key 'hiden_size'; did you mean 'hidden_s"),
        ({"model": {"preset": "tinny"}}, (), "did you mean 'tiny'"),
        ({"model": {"hidden_size": 1}}, (), "model: 'vocab_size', 'num_hidden_layers'"),
        ({"model": {"preset": "tiny", "remat": "ful"}}, (), "remat is 'ful', expected one of .*did you mean 'full'"),
        ({"steps": "many"}, (), "steps is 'many', expected int"),
        ({"steps": 1.5}, (), "steps is 1.5, expected int"),
        ({"steps": True}, (), "steps is True, expected int"),
        ({"tensorboard": 1}, (), "tensorboard is 1, expected true or false"),
        ({"data": {"sources": []}}, (), "data.sources is empty"),
        ({"data": {"sources": [{"weight": 1}]}}, (), r"data: sources\[0\]: 'path' missing"),
        ({"data": {"sources": [{"path": "a", "weight": 0}]}}, (), "weight is 0"),
        ({"data": "text.txt"}, (), "data: expected a mapping"),
        ({"optimizer": {"warmup_steps": 10}}, (), "reaches the end of the schedule"),
        ({"optimizer": {"name": "sgd"}}, (), "'muon', 'adamw'"),
        ({"accumulation": 3}, (), "does not divide batch_size"),
        ({"seq_len": 10_000}, (), "max_position_embeddings"),
        ({"save_every": 0}, (), "save_every is 0"),
        ({}, ("steps",), "write key=value"),
        ({}, ("steps.more=1",), "steps is 10, it has no fields"),
        ({}, ("optimizer.rate=1",), "unknown key 'rate'"),
        ({"data": {"sources": [{"path": "a"}]}}, ("data.sources.1.path=b",), "no number of an item"),
        ({"model": None}, (), "'model' is missing"),
    ],
)
def test_mistakes(tmp_path, change, overrides, why):
    with pytest.raises(UserError, match=why):
        load(tmp_path, {**MINIMAL, **change}, *overrides)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_train_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not readable as YAML"):
        load(tmp_path, "a: [")
    with pytest.raises(UserError, match="expected a mapping"):
        load(tmp_path, "- 1")
    with pytest.raises(UserError, match="not readable as YAML"):
        load(tmp_path, "a: !!python/object/apply:os.system [echo]")


def test_command(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    assert main(["train", str(file), "steps=20", "--show"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["steps"] == 20 and shown["model"]["vocab_size"] == 320
    assert main(["train", str(file), "--show", "steps=30"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["steps"] == 30
    assert main(["train", str(file), "stepz=20"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main(["train", str(file)]) == 2
    assert "output_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert "glm45 train recipes/mini.yaml" in out and "--digest" in out
