"""A chain of stages trains as one run would, whatever interrupts it, and says what is wrong with a recipe."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from glm45_jax.cli import main
from glm45_jax.data import build_data
from glm45_jax.errors import UserError
from glm45_jax.parallel import device_in_force
from glm45_jax.train import load_recipe, params_digest, read_metrics, run_recipe, timeline
from glm45_jax.train.config import to_tree
from glm45_jax.train.loop import _compiled_fields
from glm45_jax.train.stages import is_recipe, stages_from

RECIPES = Path(__file__).parents[2] / "recipes"
CHAINS = [p for p in sorted(RECIPES.rglob("*.yaml")) if is_recipe(p)]


class Crash(Exception):
    pass


@pytest.fixture
def tree(run_config, corpus, tmp_path):
    """Four steps in short rows with growing batches, three in other data, three in longer rows rotated more slowly."""
    model = {**to_tree(run_config.model), "num_nextn_predict_layers": 0}
    data = {"sources": [{"path": str(corpus)}]}
    return {
        "output_dir": str(tmp_path / "chain"), "model": model, "batch_size": 4, "accumulation": 2, "data": data,
        "optimizer": {"learning_rate": 0.01, "min_learning_rate": 0.001, "warmup_tokens": 64},
        "log_every": 1, "save_every": 2, "keep": 2, "tensorboard": False,
        "stages": [
            {"name": "start", "tokens": 192, "seq_len": 16, "batch_warmup": {"start": 2, "tokens": 64, "sizes": 1}},
            {"name": "more", "steps": 3, "seq_len": 16, "data": {**data, "shuffle": False}, "mtp_loss_weight": 0.1},
            {"name": "long", "steps": 3, "seq_len": 32, "batch_size": 2, "accumulation": 1,
             "model": {"rope_theta": 1e6}},
        ],
    }  # fmt: skip


def test_places_in_the_chain(tree):
    start, more, long = (stage.config for stage in stages_from(tree))
    # two steps of 2 x 16 tokens, two of 4 x 16
    assert (start.first_step, start.steps, more.first_step, more.steps, long.steps) == (0, 4, 4, 7, 10)
    assert (more.first_tokens, long.first_tokens) == (192, 192 + 3 * 64)
    assert [c.optimizer.decay_tokens for c in (start, more, long)] == [192 + 192 + 3 * 64] * 3
    assert (start.continue_from, more.continue_from, long.continue_from) == (None, start.output_dir, more.output_dir)
    assert (start.model.rope_theta, long.model.rope_theta) == (1e4, 1e6)
    assert more.batch_warmup is None and more.mtp_loss_weight == 0.1 and long.mtp_loss_weight == 0.3
    assert str(start.output_dir).endswith("chain/00-start") and str(long.output_dir).endswith("chain/02-long")
    rates = [float(timeline.learning_rate(c)(s)) for c in (start, more, long) for s in (c.first_step, c.steps)]
    np.testing.assert_allclose(rates[1::2][:2], rates[2::2], rtol=1e-6, err_msg="no jump from stage to stage")
    np.testing.assert_allclose(rates[-1], 0.001, rtol=1e-5)


def test_a_fresh_stage_begins_a_schedule_of_its_own(tree):
    tree["stages"][2] |= {"fresh": True}
    start, more, long = (stage.config for stage in stages_from(tree))
    assert (long.first_step, long.steps, long.first_tokens, long.continue_from) == (0, 3, 0, None)
    assert long.init_from == f"{more.output_dir}/model"
    assert [c.optimizer.decay_tokens for c in (start, more, long)] == [384, 384, 192]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_chain_is_its_steps_one_after_another(tree, quick_programs):
    """Against the stages done by hand: one state, all the way; parameters, momentum and schedule go on."""
    stages = stages_from(tree)
    result = run_recipe(stages)
    assert result.finished and int(result.state.step) == 10

    step, first = quick_programs
    state = jax.device_put(first(_compiled_fields(stages[0].config), None, None), jax.devices()[0])
    for stage in stages:
        config = stage.config
        data = build_data(config.data, None, timeline.piece_size(config), config.seq_len, config.seed, vocab_size=320)
        for number in range(config.first_step, config.steps):
            now = timeline.at(config, number)
            with device_in_force(state.params):
                state, _ = step(state, data.next_batch(now.batch_size), None, config=_compiled_fields(now), mesh=None)
        data.close()
    assert params_digest(state.params) == result.digest()
    counts = [x for x in jax.tree.leaves(result.state.opt_state) if x.dtype == np.int32]
    assert counts and all(int(count) == 10 for count in counts)
    rows = [m for stage in stages for m in read_metrics(str(stage.config.output_dir))]
    assert [m["step"] for m in rows] == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_chain_that_is_interrupted_ends_the_same(tree, tmp_path):
    digest = run_recipe(stages_from(tree)).digest()
    stages = stages_from({**tree, "output_dir": str(tmp_path / "interrupted")})
    seen = []

    def crash(step, _, at):
        seen.append(step)
        if step == at:
            raise Crash

    for at in (3, 6, 9):  # in every stage
        with pytest.raises(Crash):
            run_recipe(stages, on_metrics=functools.partial(crash, at=at))
    result = run_recipe(stages, on_metrics=functools.partial(crash, at=None))
    assert result.digest() == digest
    assert seen == [1, 2, 3, 3, 4, 5, 6, 5, 6, 7, 8, 9, 9, 10], "from the newest checkpoint of the stage at hand"
    assert run_recipe(stages, on_metrics=functools.partial(crash, at=11)).digest() == digest
    assert len(seen) == 14, "a finished chain is only told"


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_one_stage_alone(tree):
    stages = stages_from(tree)
    with pytest.raises(UserError, match="that run has no checkpoints"):
        run_recipe(stages, only="more")
    run_recipe(stages, only="start")
    assert int(run_recipe(stages, only="more").state.step) == 7
    assert not Path(str(stages[2].config.output_dir)).exists()
    with pytest.raises(UserError, match=r"no stage is called 'mor'; there are start, more, long"):
        run_recipe(stages, only="mor")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_stage_that_ended_early_is_not_passed_over(tree):
    start, more, _ = stages_from(tree)
    run_recipe([start])
    with pytest.raises(
        UserError, match=r"ends at step 4, this one begins at step 5.*did its data or its time end early"
    ):
        run_recipe([dataclasses.replace(more, config=more.config.replace(first_step=5))])


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_other_models_are_still_refused(tree):
    tree["stages"][1]["model"] = {"routed_scaling_factor": 1.0}
    with pytest.raises(UserError, match="routed_scaling_factor"):
        run_recipe(stages_from(tree))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_first_stages_tokenizer_is_everyones(tree, tmp_path):
    texts = [tmp_path / name for name in ("a.txt", "b.txt")]
    texts[0].write_text("the cat sat on the mat, the dog on the log. 123\n" * 40)
    texts[1].write_text("zzz yyy xxx\n" * 100)
    tree["data"] = {"sources": [{"path": str(texts[0])}]}
    tree["stages"] = tree["stages"][:2]
    tree["stages"][1]["data"] = {"sources": [{"path": str(texts[1])}]}
    stages = stages_from(tree)
    result = run_recipe(stages)
    assert result.tokenizer is not None
    assert len(result.tokenizer.encode(" cat")) == 1 and len(result.tokenizer.encode(" yyy")) > 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("stages",), [], "must be a list of stages"),
        (("stages", 0, "tokns"), 5, "stage 'start'.*unknown key 'tokns'; did you mean 'tokens'"),
        (("stages", 1, "tokens"), 5, "stage 'more'.*either as tokens or as steps"),
        (("stages", 1, "name"), "start", "names"),
        (("stages", 1, "steps"), "many", "expected a number"),
        (("stages", 1, "continue_from"), "x", "unknown key 'continue_from'"),
        (("stages", 1, "init_from"), "x", "init_from is for the first stage"),
        (("stages", 2, "seq_len"), 10_000, "stage 'long'.*max_position_embeddings"),
        (("steps",), 5, "cannot be common"),
        (("output_dir",), None, "output_dir"),
        (("optimiser",), {}, "unknown key 'optimiser'; did you mean 'optimizer'"),
    ],
)
def test_recipes_that_cannot_be(tree, path, value, message):
    *parents, last = path
    node = tree
    for key in parents:
        node = node[key]
    node[last] = value
    with pytest.raises(UserError, match=message):
        stages_from(tree)


@pytest.mark.parametrize("recipe", CHAINS, ids=lambda p: str(p.relative_to(RECIPES)))
def test_every_recipe_is_valid(recipe):
    stages = load_recipe(recipe)
    assert len(stages) >= 2 and stages[0].config.first_step == 0
    for before, stage in itertools.pairwise(stages):
        assert stage.config.continue_from == before.config.output_dir or stage.config.init_from


@pytest.mark.parametrize("name", ["glm-4.5", "glm-4.5-air"])
def test_the_papers_recipe(name):
    """arXiv 2508.06471, section 2: lengths, rows, batches, RoPE base, rates and weights."""
    stages = load_recipe(RECIPES / name / "pretrain.yaml")
    configs = [stage.config for stage in stages]
    lengths = [15e12, 7e12, 5e11, 5e11, 1e11]
    np.testing.assert_allclose([stage.tokens for stage in stages], lengths, rtol=1e-3)
    assert [c.seq_len for c in configs] == [4096, 4096, 32768, 32768, 131072]
    assert [c.model.rope_theta for c in configs] == [1e4, 1e4, 1e6, 1e6, 1e6]
    assert [c.data.sources[0].packing for c in configs] == ["concat"] * 2 + ["best_fit"] * 3
    size = lambda c, step: timeline.batch_size_at(c, step) * c.seq_len  # noqa: E731
    assert [size(c, c.steps - 1) for c in configs] == [2**26] * 5
    first = configs[0]
    assert size(first, 0) == 2**24
    grown = next(s for s in timeline.stretches(first) if s.batch_size == first.batch_size)
    assert grown.first_token == pytest.approx(5e11, rel=1e-3)
    micro = {timeline.at(c, s).batch_size // timeline.at(c, s).accumulation for c in configs[:2] for s in (0, 10**6)}
    assert micro == {1024}

    weights = lambda c, step: (timeline.at(c, step).bias_update_rate, timeline.at(c, step).mtp_loss_weight)  # noqa: E731
    assert weights(first, first.steps - 1) == (1e-3, 0.3)
    assert [weights(c, c.first_step) for c in configs[1:]] == [(0.0, 0.1)] * 4
    rate = lambda c, step: float(timeline.learning_rate(c)(step))  # noqa: E731
    assert rate(first, 0) == 0 and max(rate(first, s) for s in range(0, 10_000, 100)) == pytest.approx(2.5e-4, rel=1e-3)
    assert rate(configs[-1], configs[-1].steps) == pytest.approx(2.5e-5, rel=1e-4)
    assert rate(configs[1], configs[1].first_step) == pytest.approx(rate(first, first.steps), rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_command(tree, tmp_path, capsys):
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert main(["train", "--recipe", str(file), "stages.2.steps=1", "--show"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["long"]["steps"] == 8
    assert main(["train", str(file), "--stage", "more", "log_every=2", "--show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["first_step"] == 4
    assert main(["train", str(file), "--stage", "none"]) == 2
    assert main(["train", str(file), "log_every=2", "--digest"]) == 0
    digest = capsys.readouterr().out.strip()
    assert digest == run_recipe(load_recipe(file)).digest() and digest.startswith("xxh3:")
