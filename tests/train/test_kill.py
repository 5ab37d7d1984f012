"""`glm45 train` killed at any moment, even in the middle of a save, and started again: the same parameters exactly."""

import random
import signal
import time

import pytest
from training_runs import Run, checkpoints, losses, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("kill"), batch_size=2)


def assert_ends_like(reference, recipe, out):
    assert Run(recipe, out).digest() == reference[0]
    assert losses(out) == reference[1]


def killed(run):
    """Whether SIGKILL was what ended it."""
    return run.wait() == [-signal.SIGKILL]


@pytest.fixture(scope="module")
def reference(recipe):
    """An undisturbed run's digest and losses."""
    run = Run(recipe, recipe.parent / "whole")
    digest = run.digest()
    assert digest.startswith("xxh3:")
    return digest, losses(run.out)


def test_killed_in_a_save_and_at_random(recipe, reference):
    out = recipe.parent / "killed"
    run = Run(recipe, out)
    assert run.signal_when(lambda: run.being_saved(after=1)) and killed(run)
    newest = checkpoints(out)[-1]
    assert 0 < newest < 40
    run = Run(recipe, out)
    assert run.signal_when(lambda: run.logged(newest + 5)) and killed(run)
    assert_ends_like(reference, recipe, out)
    assert (out / "model" / "tokenizer.json").exists()


def test_killed_at_any_moment(recipe, reference):
    """While it starts, early and late in its steps; scripts/prove_resume.py does it fifty times."""
    rng, kills, out = random.Random(1), 0, recipe.parent / "any"
    for first, last in ((0, 0), (5, 15), (20, 35)):
        run = Run(recipe, out)
        step = rng.randint(first, last)
        assert run.signal_when(lambda run=run, step=step: not step or run.logged(step), number=0)  # 0: no signal yet
        end = time.monotonic() + rng.uniform(0, 0.05 if step else 2)
        kills += run.signal_when(lambda end=end: time.monotonic() > end) and killed(run)
    assert kills >= 2
    assert_ends_like(reference, recipe, out)


def test_killed_in_the_whole_model(recipe):
    """The same with dense layers, MTP layer, two micro-batches and AdamW."""
    more = (
        "model.num_hidden_layers=3", "model.first_k_dense_replace=1", "model.num_nextn_predict_layers=1",
        "accumulation=2", "optimizer.name=adamw",
    )  # fmt: skip
    digest = Run(recipe, recipe.parent / "whole2", *more).digest()
    run = Run(recipe, recipe.parent / "killed2", *more)
    assert run.signal_when(lambda: run.being_saved(after=1)) and killed(run)
    assert Run(recipe, recipe.parent / "killed2", *more).digest() == digest


def test_interrupt_is_answered_by_a_checkpoint(recipe, reference):
    out = recipe.parent / "interrupted"
    run = Run(recipe, out)
    assert run.signal_when(lambda: run.logged(3), number=signal.SIGINT)
    assert run.wait() == [130] and "the same command goes on" in run.said()
    assert Run(recipe, out).digest() == reference[0]
