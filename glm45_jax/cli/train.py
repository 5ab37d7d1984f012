"""`glm45 train`: trains a model from a YAML file, in one run or in a chain of stages."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from glm45_jax.train import Stage, TrainConfig

_EXIT_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains a model as a YAML file says, or goes on with the run in its output_dir.

    A run that was stopped, by Ctrl-C or in any other way, goes on with the same command and ends with the same
    parameters as one that was never stopped. A file with `stages` is a recipe: its stages are trained one after
    another, each from the last state of the one before.

    examples:
      glm45 train recipes/mini.yaml
      glm45 train recipes/mini.yaml steps=500 optimizer.learning_rate=1e-3 data.sources.0.path='texts/**/*.txt'
      glm45 train recipes/mini.yaml model.preset=nano output_dir=runs/nano --digest
      glm45 train recipes/mini.yaml --export
      glm45 train --recipe recipes/mini-chain.yaml stages.0.tokens=1e6
      glm45 train --recipe recipes/mini-chain.yaml --stage long
    """

    config: tyro.conf.Positional[str]
    """The YAML file; recipes/mini.yaml explains every field, recipes/mini-chain.yaml a chain of stages."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Fields to replace, as key=value; nested keys with dots, items of a list by number."""
    recipe: bool = False
    """The file must be a recipe (a file with `stages` is taken as one in any case)."""
    stage: str | None = None
    """Of a recipe: train this stage alone, from where the one before it ended."""
    digest: bool = False
    """Print the digest (xxh3) of the final parameters: equal runs have equal digests."""
    export: bool = False
    """Train nothing: write the model of the newest checkpoint to output_dir/model."""
    show: bool = False
    """Train nothing: print the whole configuration, defaults included."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Train, args=_flags_last(argv), prog="glm45 train")
    from glm45_jax.train.distributed import ending_together

    stages, config = _read(args)
    if args.show:
        _show(config if stages is None or args.stage else {stage.name: stage.config for stage in stages})
        return 0
    with ending_together(config.distributed):
        return _run(args, stages, config)


def _run(args: Train, stages: list[Stage] | None, config: TrainConfig) -> int:
    from glm45_jax.train import export_newest, run_recipe, train
    from glm45_jax.train.distributed import is_first

    if args.export:
        folder = export_newest(config)
        if is_first():
            print(f"the model is in {folder}")
        return 0
    console = Console(stderr=True)
    if stages is not None:
        start = functools.partial(run_recipe, stages, only=args.stage)
    else:
        start = functools.partial(train, config)
    result = start(console=console)
    quiet = Console(stderr=True, quiet=not is_first())
    if not result.finished:
        quiet.print(f"stopped after step {int(result.state.step)}; the same command goes on from there")
        return _EXIT_INTERRUPTED
    if result.model_dir is not None:
        quiet.print(f"the model is in {result.model_dir}")
    if args.digest:
        digest = result.digest()  # by all processes together
        if is_first():
            print(digest)
    return 0


def _read(args: Train) -> tuple[list[Stage] | None, TrainConfig]:
    """The stages of a recipe (None where the file has none), and the run that is meant: of a chain, the last."""
    from glm45_jax.train import load_recipe, load_train_config
    from glm45_jax.train.stages import find_stage, is_recipe

    if not (args.recipe or args.stage or is_recipe(args.config)):
        return None, load_train_config(args.config, args.overrides)
    stages = load_recipe(args.config, args.overrides)
    return stages, find_stage(stages, args.stage).config


def _show(configuration: TrainConfig | dict[str, TrainConfig]) -> None:
    import yaml

    from glm45_jax.train.config import to_tree

    if isinstance(configuration, dict):
        tree = {name: to_tree(config) for name, config in configuration.items()}
    else:
        tree = to_tree(configuration)
    print(yaml.safe_dump(tree, sort_keys=False), end="")


def _flags_last(argv: list[str]) -> list[str]:
    """tyro takes no key=value behind a flag."""
    argv, value = list(argv), []
    if "--stage" in argv:
        at = argv.index("--stage")
        argv, value = argv[:at] + argv[at + 2 :], argv[at : at + 2]
    return sorted(argv, key=lambda argument: argument.startswith("-")) + value
