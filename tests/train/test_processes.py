"""Several processes on one machine train together; one that ends, in whatever way, ends all, and the run goes on.

The short form of scripts/prove_processes.py, where there are four too.
"""

from __future__ import annotations

import signal
import time

import pytest
from training_runs import Run, checkpoints, losses, write_recipe

from glm45_jax.train import read_metrics

pytestmark = pytest.mark.slow
ENDS_WITHIN = 60  # seconds after one has died


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    held_out = {"sources": [{"path": str(folder / "chats.jsonl"), "packing": "best_fit"}], "epochs": 1}
    return write_recipe(folder, steps=10, save_every=4, eval_data=held_out, eval_every=5, eval_batches=2)


@pytest.fixture(scope="module")
def two(recipe):
    """An undisturbed run of two processes: its digest and losses."""
    run = Run(recipe, recipe.parent / "two", processes=2)
    return run.digest(), losses(run.out)


def wait_for_the_end(run):
    """The exit codes; how long it took after now is checked."""
    began = time.monotonic()
    codes = run.wait(ENDS_WITHIN)
    assert time.monotonic() - began < ENDS_WITHIN
    return codes


def close(a, b):
    return [step for step, _ in a] == [step for step, _ in b] and max(abs(x - y) for (_, x), (_, y) in zip(a, b)) < 1e-4


def test_two_are_one(recipe, two):
    run = Run(recipe, recipe.parent / "one")
    assert run.digest().startswith("xxh3:")
    assert close(losses(run.out), two[1])
    assert close(evaluations(run.out), evaluations(recipe.parent / "two")) and len(evaluations(run.out)) == 2
    assert (recipe.parent / "two" / "model" / "tokenizer.json").exists()


def evaluations(out):
    return [(m["step"], m["eval_cross_entropy"]) for m in read_metrics(out) if "eval_cross_entropy" in m]


def test_data_that_end_end_for_all(recipe):
    changes = ("data.epochs=1", "data.sources.0.chunk_bytes=500", "steps=1000", "seq_len=128", "eval_data=null")
    runs = [Run(recipe, recipe.parent / f"ending{n}", *changes, processes=n) for n in (1, 2)]
    assert [run.digest()[:5] for run in runs] == ["xxh3:", "xxh3:"]
    assert close(*(losses(run.out) for run in runs))
    assert all("the data end after" in run.said(0) for run in runs)


def assert_ended_without(run, victim):
    """In time, and not in silence."""
    codes = wait_for_the_end(run)
    assert all(codes) and codes[victim] == -signal.SIGKILL
    for i in range(len(codes)):
        said = run.said(i)
        assert i == victim or "lost its connection" in said or "another task died" in said or "ends, because" in said


def test_the_first_of_two_is_killed_and_one_goes_on(recipe, two):
    out = recipe.parent / "first"
    run = Run(recipe, out, processes=2)
    assert run.signal_when(lambda: run.being_saved(after=1), 0), "while the other waits for its part of a checkpoint"
    assert_ended_without(run, 0)
    assert Run(recipe, out).digest().startswith("xxh3:")
    assert close(losses(out), two[1]), "other numbers of processes, the same data in the same order"


def test_the_other_is_killed_and_its_piece_of_the_newest_checkpoint_damaged(recipe, two):
    out = recipe.parent / "second"
    run = Run(recipe, out, processes=2)
    assert run.signal_when(lambda: 8 in checkpoints(out), 1)
    assert_ended_without(run, 1)
    pieces = (out / "checkpoints" / "8" / "state" / "ocdbt.process_1" / "d").iterdir()
    piece = max(pieces, key=lambda file: file.stat().st_size)
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes(content)
    again = Run(recipe, out, processes=2)
    assert again.digest() == two[0]
    assert "8 is damaged" in again.said(0) and (out / "checkpoints" / "8.damaged").is_dir()
    assert losses(out) == two[1]


def test_a_signal_to_one_stops_all(recipe, two):
    out = recipe.parent / "signalled"
    run = Run(recipe, out, processes=2)
    assert run.signal_when(lambda: run.logged(2), 1, signal.SIGTERM)
    assert wait_for_the_end(run) == [130, 130]
    assert "stopped after step" in run.said(0)
    stopped = checkpoints(out)[-1]
    assert 2 < stopped < 10 and losses(out)[-1][0] == stopped
    assert Run(recipe, out, processes=1).digest().startswith("xxh3:")
    assert close(losses(out), two[1])


def test_one_that_fails_says_so_to_all(recipe):
    run = Run(recipe, recipe.parent / "failed", processes=2, each=[(), ["data.sources.0.path=/nowhere.txt"]])
    codes = wait_for_the_end(run)
    assert codes == [1, 2]
    assert "process 1 of 2 failed: " in run.said(1) and "/nowhere.txt" in run.said(1)
    assert "process 0 of 2 ends, because process 1 of 2 failed: " in run.said(0) and "/nowhere.txt" in run.said(0)
    assert "Traceback" not in run.said(0) + run.said(1)
