"""`glm45 train`: trains a model from a YAML file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from glm45_jax.train import TrainConfig

_EXIT_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains a model as a YAML file says, or goes on with the run in its output_dir.

    A run that was stopped, by Ctrl-C or in any other way, goes on with the same command and ends with the same
    parameters as one that was never stopped.

    examples:
      glm45 train recipes/mini.yaml
      glm45 train recipes/mini.yaml steps=500 optimizer.learning_rate=1e-3 data.sources.0.path='texts/**/*.txt'
      glm45 train recipes/mini.yaml model.preset=nano output_dir=runs/nano --digest
      glm45 train recipes/mini.yaml --export
    """

    config: tyro.conf.Positional[str]
    """The YAML file; recipes/mini.yaml explains every field."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Fields to replace, as key=value; nested keys with dots, items of a list by number."""
    digest: bool = False
    """Print the digest (xxh3) of the final parameters: equal runs have equal digests."""
    export: bool = False
    """Train nothing: write the model of the newest checkpoint to output_dir/model."""
    show: bool = False
    """Train nothing: print the whole configuration, defaults included."""


def main(argv: list[str]) -> int:
    flags_last = sorted(argv, key=lambda argument: argument.startswith("-"))  # tyro takes no key=value behind a flag
    args = tyro.cli(Train, args=flags_last, prog="glm45 train")
    from glm45_jax.train import load_train_config
    from glm45_jax.train.config import to_tree
    from glm45_jax.train.distributed import ending_together

    config = load_train_config(args.config, args.overrides)
    if args.show:
        import yaml

        print(yaml.safe_dump(to_tree(config), sort_keys=False), end="")
        return 0
    with ending_together(config.distributed):
        return _run(args, config)


def _run(args: Train, config: TrainConfig) -> int:
    from glm45_jax.train import export_newest, train
    from glm45_jax.train.distributed import is_first

    if args.export:
        folder = export_newest(config)
        if is_first():
            print(f"the model is in {folder}")
        return 0
    console = Console(stderr=True)
    result = train(config, console=console)
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
