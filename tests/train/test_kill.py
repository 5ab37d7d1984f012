"""`glm45 train` killed at any moment, even in the middle of a save, and started again: the same parameters exactly."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from glm45_jax.train import read_metrics

pytestmark = pytest.mark.slow
SETTINGS = {
    "model": {
        "preset": "tiny", "hidden_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 0,
        "num_attention_heads": 2, "num_nextn_predict_layers": 0,
    },
    "steps": 40, "batch_size": 2, "seq_len": 64, "log_every": 1, "save_every": 2, "keep": 2, "tensorboard": False,
    "optimizer": {"learning_rate": "1e-2", "min_learning_rate": 1e-3, "warmup_steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    rng = random.Random(0)
    words = [rng.choice("abcdefg") * rng.randrange(1, 4) for _ in range(4000)]
    (folder / "text.txt").write_text(" ".join(words))
    chats = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w * 2}]} for w in words[:40]
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    sources = [{"path": str(folder / "text.txt"), "chunk_bytes": 1000}]
    sources += [{"path": str(folder / "chats.jsonl"), "packing": "best_fit", "weight": 0.5}]
    tree = {**SETTINGS, "data": {"sources": sources}, "compilation_cache": str(folder / "cache")}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder


def start(folder, name, *more, optimised=False):
    command = [sys.executable, "-m", "glm45_jax", "train", str(folder / "run.yaml"), f"output_dir={folder / name}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if not optimised:  # compiling is most of these tests' time
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    return subprocess.Popen(
        [*command, "--digest", *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out.strip().splitlines()[-1]


def assert_ends_like(reference, folder, name):
    assert finish(start(folder, name)) == reference[0]
    assert losses(folder, name) == reference[1]


def kill_when(process, condition):
    """SIGKILL at the first moment at which `condition` holds; False if the run was over before."""
    while process.poll() is None:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return process.returncode == -signal.SIGKILL
        time.sleep(0.0005)
    process.communicate()
    return False


def whole_checkpoints(folder, name):
    checkpoints = folder / name / "checkpoints"
    return [p for p in checkpoints.glob("*") if p.name.isdigit()] if checkpoints.is_dir() else []


def being_saved(folder, name, after):
    """A checkpoint stands there unfinished, and `after` whole ones before it."""
    unfinished = any("tmp" in p.name for p in (folder / name / "checkpoints").glob("*"))
    return unfinished and len(whole_checkpoints(folder, name)) >= after


@pytest.fixture(scope="module")
def reference(folder):
    """An undisturbed run's digest and losses."""
    digest = finish(start(folder, "whole"))
    assert digest.startswith("xxh3:")
    return digest, losses(folder, "whole")


def losses(folder, name):
    return [(m["step"], m["cross_entropy"]) for m in read_metrics(folder / name)]


def test_killed_in_a_save_and_at_random(folder, reference):
    assert kill_when(start(folder, "killed"), lambda: being_saved(folder, "killed", after=1))
    newest = max(int(p.name) for p in whole_checkpoints(folder, "killed"))
    assert 0 < newest < 40
    file = folder / "killed" / "metrics.jsonl"
    assert kill_when(start(folder, "killed"), lambda: f'"step": {newest + 5},' in file.read_text())
    assert_ends_like(reference, folder, "killed")
    assert (folder / "killed" / "model" / "tokenizer.json").exists()


def test_killed_at_many_moments(folder, reference):
    """From the first second of the process to its last, over and over; whatever ends comes to the same end."""
    began = time.monotonic()
    finish(start(folder, "timed"))
    length, rng, kills, runs = time.monotonic() - began, random.Random(1), 0, 0
    for _ in range(12):
        end = time.monotonic() + rng.uniform(0.1, 0.9) * length
        if kill_when(start(folder, f"many{runs}"), lambda end=end: time.monotonic() > end):
            kills += 1
            continue
        assert_ends_like(reference, folder, f"many{runs}")
        runs += 1
    assert kills >= 4
    assert_ends_like(reference, folder, f"many{runs}")


def test_killed_in_the_whole_model(folder):
    """The same with dense layers, MTP layer, two micro-batches and AdamW."""
    more = (
        "model.num_hidden_layers=3", "model.first_k_dense_replace=1", "model.num_nextn_predict_layers=1",
        "accumulation=2", "optimizer.name=adamw",
    )  # fmt: skip
    digest = finish(start(folder, "whole2", *more, optimised=True))
    for after in (1, 2):
        process = start(folder, "killed2", *more, optimised=True)
        assert kill_when(process, lambda n=after: being_saved(folder, "killed2", n))
    assert finish(start(folder, "killed2", *more, optimised=True)) == digest


def test_interrupt_is_answered_by_a_checkpoint(folder, reference):
    process = start(folder, "interrupted")
    file = folder / "interrupted" / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and '"step": 3,' in file.read_text()):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in err
    assert finish(start(folder, "interrupted")) == reference[0]
