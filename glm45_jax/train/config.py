"""What a training run is: `TrainConfig`, read from YAML and overridden by `key=value` arguments.

A YAML file has the fields of `TrainConfig`; `model` is a preset with fields replaced, such as
`{preset: mini, vocab_size: 8192}`. Unknown keys are errors with a hint, values are checked against the fields' types.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from glm45_jax.config import ModelConfig, get_preset
from glm45_jax.data import DataConfig
from glm45_jax.errors import UserError
from glm45_jax.parallel import MeshConfig
from glm45_jax.train.distributed import DistributedConfig
from glm45_jax.train.optimizer import OptimizerConfig, make_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer of a run: a checkpoint's, or one trained on the run's own text."""

    path: str | None = None  # a checkpoint's directory or a tokenizer.json; None: trained on the sources' text
    split_digits: bool = True  # of a trained one: every digit is a token
    sample_bytes: int = 20_000_000  # of a trained one: at most so much of each source is read
    chat_template: str | None = None  # a name or jinja text in place of the tokenizer's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchWarmup:
    """The batch grows in even steps from `start` sequences to `batch_size`."""

    start: int  # sequences
    tokens: int  # over so many
    sizes: int = 4  # in so many sizes, the last of which comes before batch_size; each is compiled once
    to: int | None = None  # sequences at the end; null: batch_size

    def __post_init__(self) -> None:
        if self.start < 1 or self.tokens < 1 or self.sizes < 1:
            raise UserError("start, tokens and sizes of a batch warm-up must be at least 1")

    def batch_sizes(self, end: int, micro_batch: int) -> tuple[int, ...]:
        """Whole micro-batches, all before `end`."""
        exact = [self.start + (end - self.start) * n / self.sizes for n in range(self.sizes)]
        return tuple(max(1, round(size / micro_batch)) * micro_batch for size in exact)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """Settings that hold once so many tokens have been seen, those of a chain's earlier stages included."""

    tokens: int
    mtp_loss_weight: float | None = None  # null: as before
    balance_loss_weight: float | None = None
    bias_update_rate: float | None = None

    def settings(self) -> dict[str, float]:
        """What changes."""
        given = dataclasses.asdict(self)
        return {key: value for key, value in given.items() if key != "tokens" and value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """When a gradient counts as a spike and its step is left out."""

    factor: float = 5.0  # norm above so many times its running mean
    warmup: int = 100  # steps before any is judged
    patience: int = 10  # so many are left out in a row at most

    def __post_init__(self) -> None:
        if self.factor <= 1 or self.warmup < 1 or self.patience < 1:
            raise UserError("skip_spikes: factor must be above 1, warmup and patience at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Frozen and hashable: `train_step` takes it as a static argument."""

    model: ModelConfig
    steps: int  # where the run ends; counted from the beginning of the chain, for a stage of one
    batch_size: int = 8  # sequences per step, all micro-batches together
    batch_warmup: BatchWarmup | None = None
    seq_len: int = 512
    accumulation: int = 1  # micro-batches per step; must divide batch_size. Their size stays as the batch grows
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mtp_loss_weight: float = 0.3  # 0.1 in the last part of the paper's pre-training
    balance_loss_weight: float = 1e-4  # sequence-level balance loss
    bias_update_rate: float = 1e-3  # loss-free balance; 0 leaves the selection bias alone
    changes: tuple[Change, ...] = ()  # of these three weights, in the order of their tokens
    skip_spikes: SpikeConfig | None = None  # null: only gradients that are not finite are left out
    max_minutes: float | None = None  # the run is over here at the latest; None: no limit
    seed: int = 0

    data: DataConfig | None = None
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    init_from: str | None = None  # start from the weights of this checkpoint
    continue_from: str | None = None  # start from the last state of the run in this output_dir, optimizer and all
    first_step: int = 0  # at which that run ended; the schedules go on from there
    first_tokens: int = 0  # that it had seen

    output_dir: str | None = (
        None  # checkpoints, metrics, tokenizer and the final model; an interrupted run goes on here
    )
    log_every: int = 10  # steps
    save_every: int = 200  # steps; the last one is saved in any case
    keep: int = 3  # checkpoints, the newest
    keep_every: int | None = None  # steps: checkpoints of its multiples are kept for good; a multiple of save_every
    eval_data: DataConfig | None = None
    eval_every: int = 200  # steps
    eval_batches: int = 8
    tensorboard: bool = True  # where tensorboardX is installed
    compilation_cache: str | None = None  # folder where compiled programs are kept, for quick restarts
    profile_steps: tuple[int, ...] | None = None  # [first, last]: a trace of these steps, in output_dir/profile

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # how devices share the work; not what is learnt
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UserError(f"max_minutes is {self.max_minutes}, it must be positive, or null for no limit")
        if self.batch_size % self.accumulation:
            raise UserError(f"accumulation ({self.accumulation}) does not divide batch_size ({self.batch_size})")
        if not 0 <= self.first_step < self.steps or self.first_tokens < 0:
            raise UserError(f"the run begins at step {self.first_step}, it must lie in 0..{self.steps - 1}")
        if self.init_from is not None and self.continue_from is not None:
            raise UserError("init_from and continue_from both say where to start; give one of them")
        self._check_schedules()
        if not 2 <= self.seq_len <= self.model.max_position_embeddings:
            limit = self.model.max_position_embeddings
            raise UserError(f"seq_len is {self.seq_len}, it must lie in 2..{limit} (max_position_embeddings)")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.save_every):
            raise UserError(f"keep_every is {self.keep_every}, it must be a multiple of save_every ({self.save_every})")
        if self.profile_steps is not None:
            first, last = self.profile_steps if len(self.profile_steps) == 2 else (0, 0)
            if not 1 <= first <= last:
                raise UserError(f"profile_steps is {list(self.profile_steps)}, expected [first, last] from 1 on")
        for name in ("mtp_loss_weight", "balance_loss_weight", "bias_update_rate"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is negative")

    def _check_schedules(self) -> None:
        if self.batch_warmup is not None:
            end, micro = self.batch_warmup.to or self.batch_size, self.batch_size // self.accumulation
            if self.batch_warmup.start > end:
                raise UserError(f"batch_warmup.start ({self.batch_warmup.start}) is above batch_size ({end})")
            if end % micro or self.batch_warmup.start % micro:
                raise UserError(
                    f"batch_warmup goes from {self.batch_warmup.start} to {end} sequences, which are no whole "
                    f"micro-batches of {micro}; set accumulation so that batch_size / accumulation divides both"
                )
        if list(self.changes) != sorted(self.changes, key=lambda change: change.tokens):
            raise UserError("changes must stand in the order of their tokens")
        if any(value < 0 for change in self.changes for value in change.settings().values()):
            raise UserError("a weight in changes is negative")
        size = (self.batch_warmup and self.batch_warmup.to) or self.batch_size
        end = self.first_tokens + (self.steps - self.first_step) * size * self.seq_len
        make_schedule(self.optimizer, self.steps, [(self.steps, end)])  # tells of a warm-up longer than the run

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and puts `key=value` overrides over it, nested keys with dots: `optimizer.learning_rate=1e-3`.

    Raises:
      UserError: no such file, not YAML, an unknown key, or a value that its field cannot take.
    """
    return train_config_from(read_tree(path, overrides), str(path))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain nested values of a YAML file, with `key=value` overrides put over them."""
    try:
        tree = yaml.safe_load(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run is described by a YAML file such as recipes/mini.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of fields to values, found {type(tree).__name__}")
    for override in overrides:
        _put(tree, override)
    return tree


def train_config_from(tree: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """A `TrainConfig` from plain nested values, as YAML gives them."""
    tree = dict(tree)
    _check_keys(TrainConfig, tree, where)
    model = tree.pop("model", None)
    tree["model"] = model_from(model, tree.get("init_from"), where)
    return build(TrainConfig, tree, where)


def to_tree(config: Any) -> Any:
    """Plain nested values of a configuration, for YAML; `train_config_from` reads them back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_tree(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return [to_tree(value) for value in config] if isinstance(config, tuple) else config


def model_from(model: Any, init_from: str | None, where: str) -> ModelConfig:
    """A preset, a checkpoint's config, or all fields, with fields replaced; parameters are float32 unless said."""
    if isinstance(model, str):
        model = {"preset": model}
    if not isinstance(model, Mapping):
        if init_from is None:
            raise UserError(f"{where}: 'model' is missing, for example `model: {{preset: mini}}`")
        model = {}
    fields = {key: value for key, value in model.items() if key != "preset"}
    _check_keys(ModelConfig, fields, f"{where}: model", ("preset",))
    if "preset" in model:
        base = dataclasses.asdict(get_preset(str(model["preset"])))
    elif init_from is not None:
        from glm45_jax.convert.load import open_checkpoint  # reads no weights

        base = dataclasses.asdict(open_checkpoint(init_from).config)
    else:
        base = {}
    # Steps of a bfloat16 weight are mostly smaller than half its last bit, and would be lost.
    return build(ModelConfig, {**base, "param_dtype": "float32", **fields}, f"{where}: model")


def build(cls: Any, tree: Any, where: str) -> Any:
    """An instance of the dataclass `cls` from a mapping, with nested ones built and values checked."""
    if isinstance(tree, cls):
        return tree
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: expected a mapping of fields to values, found {tree!r}")
    _check_keys(cls, tree, where)
    hints = typing.get_type_hints(cls)
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in tree.items()}
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise UserError(f"{where}: {', '.join(map(repr, missing))} missing")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, where it is one; YAML's `1e-4`, which it reads as a string, is a number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        choices = ", ".join(map(repr, arguments))
        raise UserError(f"{where} is {value!r}, expected one of {choices}{_hint(value, arguments)}")
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # steps: 1e4 written with a point
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where} is {value!r}, expected {'true or false' if hint is bool else hint.__name__}")


def _check_keys(cls: Any, tree: Mapping[str, Any], where: str, extra: Sequence[str] = ()) -> None:
    check_keys([field.name for field in dataclasses.fields(cls)] + list(extra), tree, where)


def check_keys(known: Sequence[str], tree: Mapping[str, Any], where: str) -> None:
    """Refuses keys that are not known, with what may have been meant."""
    for key in tree:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{_hint(key, known)}. Known: {', '.join(known)}")


def _hint(word: Any, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _put(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is no override: write key=value, as in optimizer.learning_rate=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not readable as YAML: {error}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for i, name in enumerate(parents):
        node = _step(node, name, ".".join(parents[: i + 1]), override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _step(node: Any, name: str, path: str, override: str) -> Any:
    """One level down, made if it is absent; the items of a list go by number."""
    if isinstance(node, list):
        return node[_index(node, name, override)]
    if isinstance(node.get(name), str) and path == "model":
        node[name] = {"preset": node[name]}  # `model: mini` in the file
    if node.get(name) is None:
        node[name] = {}
    if not isinstance(node[name], (dict, list)):
        raise UserError(f"{override!r}: {path} is {node[name]!r}, it has no fields")
    return node[name]


def _index(items: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise UserError(f"{override!r}: {name!r} is no number of an item in 0..{len(items) - 1}")
    return int(name)
