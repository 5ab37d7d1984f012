"""A small model, data for it, and a quickly compiled step that all runs of these tests share."""

from __future__ import annotations

import json

import numpy as np
import pytest

from glm45_jax.config import get_preset
from glm45_jax.data import DataConfig, SourceConfig
from glm45_jax.train import OptimizerConfig, TrainConfig
from glm45_jax.train.loop import placed_state, placed_step
from tests.support import quick_jit


@pytest.fixture(scope="session")
def quick_programs():
    step = quick_jit(placed_step, static_argnames=("config", "mesh"), donate_argnums=0)
    return step, quick_jit(placed_state, static_argnames=("config", "mesh"))


@pytest.fixture
def quick(quick_programs, monkeypatch):
    monkeypatch.setattr("glm45_jax.train.loop._step", quick_programs[0])
    monkeypatch.setattr("glm45_jax.train.loop._first_state", quick_programs[1])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Token documents; a model's loss on them is not that of a constant."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "tokens.jsonl"
    documents = [np.cumsum(rng.integers(1, 4, rng.integers(5, 60))) % 300 for _ in range(80)]
    path.write_text("".join(json.dumps({"tokens": d.tolist()}) + "\n" for d in documents))
    return path


@pytest.fixture
def run_config(corpus, tmp_path):
    """A run of twelve steps with the MTP layer, checkpoints every four, in a folder of this test."""
    return _run_config(corpus, tmp_path)


@pytest.fixture(scope="module")
def run_config_of_module(corpus, tmp_path_factory):
    return _run_config(corpus, tmp_path_factory.mktemp("run"))


def _run_config(corpus, folder):
    model = get_preset(
        "tiny", hidden_size=32, num_hidden_layers=1, first_k_dense_replace=0, num_attention_heads=2, n_routed_experts=4
    )
    return TrainConfig(
        model=model,
        steps=12,
        batch_size=2,
        seq_len=32,
        optimizer=OptimizerConfig(learning_rate=0.01, min_learning_rate=0.001, warmup_steps=2),
        data=DataConfig(sources=(SourceConfig(path=(str(corpus),)),)),
        output_dir=str(folder / "run"),
        log_every=1,
        save_every=4,
        keep=2,
        tensorboard=False,
    )
