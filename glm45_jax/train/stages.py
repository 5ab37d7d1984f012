"""Recipes: a chain of training stages in one YAML file, each going on from the one before.

The file has the fields of `TrainConfig`, common to all stages, and `stages`, a list. A stage has a `name`, a length in
`tokens` or `steps` of its own, and any fields that are its own: `model`, `optimizer` and `tokenizer` are laid over the
common ones field by field, others take their place. It starts from the last state of the stage before, optimizer and
schedule included; with `fresh: true` from its weights alone, and the schedule begins anew.

The learning rate's cosine runs over all stages up to the next fresh one, by tokens (by steps, where the warm-up is
given so), unless `optimizer` says where it ends. Stage number n trains in `output_dir`/NN-name; a chain that was
stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from glm45_jax.errors import UserError
from glm45_jax.train import timeline
from glm45_jax.train.config import TrainConfig, check_keys, model_from, read_tree, to_tree, train_config_from
from glm45_jax.train.distributed import initialize, is_first
from glm45_jax.train.loop import OnMetrics, TrainResult, train

_DONE = "finished.json"
_LAID_OVER = ("model", "optimizer", "tokenizer")
_OWN_KEYS = ("name", "tokens", "steps", "fresh")
_SET_BY_THE_CHAIN = ("continue_from", "first_step", "first_tokens", "output_dir")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, ready to train."""

    name: str
    config: TrainConfig

    @property
    def tokens(self) -> int:
        """Its own, places in batches."""
        return timeline.tokens_at(self.config, self.config.steps) - self.config.first_tokens


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a recipe, with `key=value` overrides: `steps` of a stage is `stages.0.steps`.

    Raises:
      UserError: no such file, not a recipe, an unknown key, or a stage that cannot be.
    """
    return stages_from(read_tree(path, overrides), str(path))


def is_recipe(path: str | Path) -> bool:
    """Whether a YAML file has stages."""
    return "stages" in read_tree(path)


def find_stage(stages: Sequence[Stage], name: str | None) -> Stage:
    """The stage of this name; the last one for None."""
    for stage in reversed(stages):
        if name in (None, stage.name):
            return stage
    raise UserError(f"no stage is called {name!r}; there are {', '.join(stage.name for stage in stages)}")


def stages_from(tree: Mapping[str, Any], where: str = "recipe") -> list[Stage]:
    """The stages of plain nested values, as YAML gives them."""
    common = {key: value for key, value in tree.items() if key != "stages"}
    stages, folder = tree.get("stages"), common.pop("output_dir", None)
    if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, Mapping) for stage in stages):
        raise UserError(f"{where}: `stages` must be a list of stages, each with a name and tokens or steps")
    if not isinstance(folder, str):
        raise UserError(f"{where}: 'output_dir' is missing: the folder in which each stage gets one of its own")
    _refuse(common, ("steps", *_SET_BY_THE_CHAIN), where, "each stage has its own length and place in the chain")
    names = [str(stage.get("name", "")) for stage in stages]
    if len(set(names)) < len(names) or not all(names) or any("/" in name for name in names):
        raise UserError(f"{where}: stages need names, each its own and without a slash; they are {names}")
    common = _with_whole_model(common, stages[0], where)
    out: list[Stage] = []
    for number, stage in enumerate(stages):
        here = f"{where}: stage {names[number]!r}"
        own_folder = f"{folder.rstrip('/')}/{number:02}-{names[number]}"
        out.append(_stage(common, stage, own_folder, out[-1] if out else None, here))
    return list(_with_common_ends(out))


def _with_whole_model(common: dict[str, Any], first: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`common` with every field of the model: later stages do not start from the checkpoint that may have them."""
    init_from = first.get("init_from", common.get("init_from"))
    if common.get("model") is None and init_from is None:
        return common
    return {**common, "model": to_tree(model_from(common.get("model"), init_from, where))}


def _stage(common: Mapping[str, Any], stage: Mapping[str, Any], folder: str, before: Stage | None, where: str) -> Stage:
    known = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in _SET_BY_THE_CHAIN]
    check_keys([*known, *_OWN_KEYS], stage, where)
    own = {key: value for key, value in stage.items() if key not in _OWN_KEYS}
    tree: dict[str, Any] = {**common, **own, "output_dir": folder}
    for key in _LAID_OVER:
        if key in common and key in own and "preset" not in (own_fields := _fields(own[key])):
            tree[key] = {**_fields(common[key]), **own_fields}
    name, init_from = str(stage["name"]), tree.pop("init_from", None)  # the model is whole already
    if before is None:
        return Stage(name, _of_length(tree, stage, where).replace(init_from=init_from))
    if "init_from" in stage:
        raise UserError(f"{where}: init_from is for the first stage; later ones start from the one before")
    if "batch_warmup" not in own:
        tree.pop("batch_warmup", None)  # it grows once; later stages have the size that it grew to
    follow = before.config
    if stage.get("fresh", False):
        return Stage(name, _of_length(tree, stage, where).replace(init_from=f"{follow.output_dir}/model"))
    tree |= {"continue_from": follow.output_dir, "first_step": follow.steps}
    tree["first_tokens"] = timeline.tokens_at(follow, follow.steps)
    return Stage(name, _of_length(tree, stage, where))


def _of_length(tree: dict[str, Any], stage: Mapping[str, Any], where: str) -> TrainConfig:
    """The configuration that ends after the stage's own `steps` or `tokens`."""
    if ("tokens" in stage) == ("steps" in stage):
        raise UserError(f"{where}: give its length, either as tokens or as steps")
    first = tree.get("first_step", 0)
    length = stage.get("tokens", stage.get("steps"))
    try:
        length = int(float(length))
    except (TypeError, ValueError):
        raise UserError(f"{where}: its length is {length!r}, expected a number") from None
    if length < 1:
        raise UserError(f"{where}: its length is {length}, it must be at least 1")
    if "steps" in stage:
        return train_config_from({**tree, "steps": first + length}, where)
    # How many steps it takes depends on nothing that in turn depends on their number, but for the schedule.
    no_schedule = {"warmup_steps": 0, "warmup_tokens": None, "decay_tokens": None, "decay_steps": None}
    probe = {**tree, "steps": first + 1, "optimizer": {**_fields(tree.get("optimizer")), **no_schedule}}
    steps = timeline.steps_for(train_config_from(probe, where), length)
    return train_config_from({**tree, "steps": first + steps}, where)


def _with_common_ends(stages: list[Stage]) -> Iterator[Stage]:
    """Gives stages that follow each other one cosine, which ends with the last of them."""
    for number, stage in enumerate(stages):
        rules = stage.config.optimizer
        if rules.decay_tokens is not None or rules.decay_steps is not None:
            yield stage
            continue
        last = stage
        for later in stages[number + 1 :]:
            if later.config.continue_from is None:
                break
            last = later
        if rules.warmup_steps:
            ends: dict[str, Any] = {"decay_steps": last.config.steps}
        else:
            ends = {"decay_tokens": timeline.tokens_at(last.config, last.config.steps)}
        yield dataclasses.replace(stage, config=stage.config.replace(optimizer=dataclasses.replace(rules, **ends)))


def run_recipe(
    stages: Sequence[Stage],
    *,
    only: str | None = None,
    on_metrics: OnMetrics | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Trains stage after stage, or goes on with what the output folders hold; finished stages are not repeated.

    Args:
      only: the name of a stage: train this one alone, from where the one before it ended.
      on_metrics: as in `train`; steps are counted from the beginning of the chain.

    Returns:
      The last stage's result. It is not `finished` where the chain was stopped.
    """
    initialize(stages[0].config.distributed)
    console = (console or Console(stderr=True)) if is_first() else Console(quiet=True)
    chosen = list(stages) if only is None else [find_stage(stages, only)]
    for stage in chosen[:-1]:
        if _is_done(stage):
            console.print(f"[bold]{stage.name}[/bold] is finished", highlight=False)
        elif not (result := _train(stage, stages, on_metrics, console)).finished:
            return result
        else:
            del result  # its state would stand beside the next stage's
    return _train(chosen[-1], stages, on_metrics, console)


def _train(stage: Stage, stages: Sequence[Stage], on_metrics: OnMetrics | None, console: Console) -> TrainResult:
    config, first = stage.config, stages[0].config
    kept = Path(str(first.output_dir)) / "tokenizer"
    if config.tokenizer.path is None and stage is not stages[0] and kept.exists():
        # one tokenizer for the whole chain: the one that the first stage trained
        config = config.replace(tokenizer=dataclasses.replace(config.tokenizer, path=str(kept)))
    console.print(
        f"[bold]{stage.name}[/bold]: steps {config.first_step} to {config.steps}, {stage.tokens:,} tokens in rows of "
        f"{config.seq_len}",
        highlight=False,
    )
    result = train(config, on_metrics=on_metrics, console=console)
    if result.finished and int(result.state.step) == config.steps and is_first():
        _mark_done(stage)
    return result


def _is_done(stage: Stage) -> bool:
    file = Path(str(stage.config.output_dir)) / _DONE
    return file.exists() and json.loads(file.read_text("utf-8"))["steps"] == stage.config.steps


def _mark_done(stage: Stage) -> None:
    file = Path(str(stage.config.output_dir)) / _DONE
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"stage": stage.name, "steps": stage.config.steps}) + "\n", "utf-8")
    os.replace(partial, file)


def _fields(value: Any) -> dict[str, Any]:
    """`model: mini` is short for its preset."""
    if value is None:
        return {}
    return {"preset": value} if isinstance(value, str) else dict(value)


def _refuse(tree: Mapping[str, Any], keys: Sequence[str], where: str, why: str) -> None:
    if found := [key for key in keys if key in tree]:
        raise UserError(f"{where}: {', '.join(map(repr, found))} cannot be common to all stages: {why}")
