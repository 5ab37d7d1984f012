"""A whole run: tokenizer, data, steps, metrics, checkpoints, and the model at its end.

Started again with the same configuration, a run that was stopped in any way goes on from its newest checkpoint and
ends with the same parameters, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from rich.console import Console

from glm45_jax.config import ModelConfig
from glm45_jax.data import DataConfig, build_data, count_shards
from glm45_jax.errors import UserError
from glm45_jax.model import Params, abstract_params
from glm45_jax.parallel import device_in_force
from glm45_jax.text import Tokenizer
from glm45_jax.train import timeline
from glm45_jax.train.checkpoint import Checkpoints
from glm45_jax.train.config import TrainConfig, to_tree
from glm45_jax.train.digest import params_digest
from glm45_jax.train.distributed import gather, initialize, is_first
from glm45_jax.train.feed import Feed, shards_here
from glm45_jax.train.loss import Batch, loss_fn
from glm45_jax.train.placement import abstract_state, constrained, run_mesh
from glm45_jax.train.report import Profiler, Reporter
from glm45_jax.train.step import Metrics, TrainState, init_state, train_step
from glm45_jax.train.stopping import SIGNAL, TIME, Stopping, stop_signals
from glm45_jax.train.tokenizer import keep_tokenizer, prepare_tokenizer

OnMetrics = Callable[[int, Metrics], None]

# What `train_step` and `init_state` read.
_STEP_FIELDS = {
    "model", "steps", "accumulation", "batch_size", "batch_warmup", "seq_len", "optimizer", "mtp_loss_weight",
    "balance_loss_weight", "bias_update_rate", "skip_spikes", "first_step", "first_tokens", "seed",
}  # fmt: skip
_PATIENCE = 15.0  # seconds beyond the heartbeat's in which an earlier run of several processes may still be ending


def placed_state(config: TrainConfig, params: Params | None, mesh: Mesh | None) -> TrainState:
    """`init_state`, made where it is to lie."""
    return constrained(init_state(config, params), config, mesh)


def placed_step(
    state: TrainState, batch: Batch, votes: Array | None, config: TrainConfig, mesh: Mesh | None
) -> tuple[TrainState, Metrics]:
    """`train_step`, whose state stays where it lies and whose metrics every process has; `stop`: the highest vote.

    One program, since two with collectives at the same time would mix up their messages on CPUs.
    """
    state, metrics = train_step(state, batch, config)
    if votes is not None:
        metrics["stop"] = jnp.max(votes)
    if mesh is not None:
        metrics = jax.lax.with_sharding_constraint(metrics, NamedSharding(mesh, PartitionSpec()))
    return constrained(state, config, mesh), metrics


_first_state = jax.jit(placed_state, static_argnames=("config", "mesh"))
_step = jax.jit(placed_step, static_argnames=("config", "mesh"), donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run stands when `train` returns."""

    state: TrainState
    config: TrainConfig  # with the model's token ids filled in
    tokenizer: Tokenizer | None
    finished: bool  # False after a signal or an interrupt: the same call goes on
    model_dir: Path | None  # the model in the project's own format

    @property
    def params(self) -> Params:
        return self.state.params

    def digest(self) -> str:
        """xxh3 of all parameters."""
        return params_digest(self.state.params)


def train(
    config: TrainConfig,
    *,
    tokenizer: Tokenizer | None = None,
    on_metrics: OnMetrics | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Trains to `config.steps`, or goes on with what `config.output_dir` holds.

    SIGINT and SIGTERM end it after the step at hand, with a checkpoint. With several processes all call this, with the
    same configuration; a signal to one of them stops all after the same step.

    Args:
      tokenizer: in place of the one that `config.tokenizer` names.
      on_metrics: called with the step's number and its metrics (`train_step`'s) at every logged step.
      console: where progress is shown; standard error by default.

    Raises:
      UserError: the configuration, data or checkpoints are wrong, or another process trains in `output_dir`.
    """
    began = time.monotonic()
    if config.output_dir is None or config.data is None:
        raise UserError("a run needs output_dir and data; set both in the configuration")
    initialize(config.distributed)
    out, settings, mesh = Path(config.output_dir), config.data, run_mesh(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_one(out, config))
        _use_compilation_cache(config)
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        tokenizer = tokenizer or _tokenizer_of_all(config, out)
        config = _with_tokens_of(tokenizer, config)
        feed = _open_feed(config, settings, tokenizer, mesh, stack)
        checkpoints = stack.enter_context(Checkpoints(out / "checkpoints", config.keep, config.keep_every))
        if is_first():
            _write(out / "config.yaml", yaml.safe_dump(to_tree(_of_any_process(config)), sort_keys=False))
        state = _start(config, mesh, checkpoints, feed)
        folder, start = out if is_first() else None, int(state.step)
        reporter = Reporter(folder, config.steps, start, began=began, tensorboard=config.tensorboard, console=console)
        stack.enter_context(reporter)
        signalled = stack.enter_context(stop_signals())
        stack.enter_context(device_in_force(state.params))
        held_out = None if config.eval_data is None else _open_feed(config, config.eval_data, tokenizer, mesh, stack)
        run = _Run(
            config=config,
            mesh=mesh,
            feed=feed,
            held_out=held_out,
            checkpoints=checkpoints,
            reporter=reporter,
            stopping=Stopping(signalled, mesh, config.max_minutes),
            profiler=Profiler(config.profile_steps, out / "profile"),
            on_metrics=on_metrics,
        )
        stack.callback(run.profiler.close)
        state, finished = run.steps(state)
        checkpoints.wait()
        model_dir = _export(config, state.params, tokenizer, out) if finished else None
    return TrainResult(state, config, tokenizer, finished, model_dir)


def export_newest(config: TrainConfig) -> Path:
    """Writes the model of the newest checkpoint, of a run that need not be over, to `output_dir`/model."""
    out = Path(config.output_dir or "")
    initialize(config.distributed)
    if not (out / "checkpoints").is_dir():
        raise UserError(f"{out}: no checkpoints here; train first")
    mesh = config.mesh.make()
    mesh = None if mesh.size == 1 else mesh
    with _only_one(out, config):
        tokenizer = _tokenizer_of_all(config, out)
        config = _with_tokens_of(tokenizer, config)
        with Checkpoints(out / "checkpoints", config.keep, config.keep_every) as checkpoints:
            restored = checkpoints.restore(abstract_state(config, mesh), config.model)
        if restored is None:
            raise UserError(f"{out / 'checkpoints'}: no whole checkpoint here; train first")
        return _export(config, restored[0].params, tokenizer, out)


def evaluate(params: Params, config: TrainConfig, batches: Iterator[Batch]) -> float:
    """Mean next-token cross-entropy over the targets of `config.eval_batches` batches."""
    total = count = 0.0
    for _, batch in zip(range(config.eval_batches), batches):
        loss, tokens = _cross_entropy_sum(params, batch, config.model)
        total, count = total + float(loss), count + float(tokens)
    return total / max(count, 1.0)


@functools.partial(jax.jit, static_argnames="model")
def _cross_entropy_sum(params: Params, batch: Batch, model: ModelConfig) -> tuple[jax.Array, jax.Array]:
    _, metrics = loss_fn(params, model, batch)
    return metrics["cross_entropy"] * metrics["tokens"], metrics["tokens"]


def _start(config: TrainConfig, mesh: Mesh | None, checkpoints: Checkpoints, feed: Feed) -> TrainState:
    """The newest checkpoint, with the data moved to its place; else the run's first state."""
    restored = checkpoints.restore(abstract_state(config, mesh), config.model)
    if restored is not None:
        state, position = restored
        if position is not None and int(state.step) < config.steps:
            feed.set_state(position)
        return state
    if config.continue_from is not None:
        return _continued(config, abstract_state(config, mesh))
    params = None if config.init_from is None else _initial_params(config, mesh)
    state = _first_state(_compiled_fields(config), params, mesh)
    # Placed as a restored state is: both are then stepped by one and the same program.
    return jax.device_put(state, jax.devices()[0]) if mesh is None else jax.block_until_ready(state)


def _continued(config: TrainConfig, like: TrainState) -> TrainState:
    """The last state of the run in `continue_from`; how positions are rotated may differ from then on."""
    before = Checkpoints(Path(str(config.continue_from)) / "checkpoints", config.keep)
    restored = before.restore(like, config.model, may_differ=("rope_theta", "max_position_embeddings"))
    before.close()
    step = None if restored is None else int(restored[0].step)
    if restored is None or step != config.first_step:
        found = "has no checkpoints" if step is None else f"ends at step {step}"
        raise UserError(
            f"continue_from {config.continue_from}: that run {found}, this one begins at step {config.first_step}. "
            "Finish that run first (did its data or its time end early?), or set first_step and first_tokens"
        )
    return restored[0]


def _initial_params(config: TrainConfig, mesh: Mesh | None) -> Params:
    from glm45_jax.convert import load_checkpoint

    _, params = load_checkpoint(str(config.init_from), dtype=config.model.param_dtype, mesh=mesh)
    want, have = jax.tree.structure(abstract_params(config.model)), jax.tree.structure(params)
    different = want != have or any(
        a.shape != b.shape for a, b in zip(jax.tree.leaves(abstract_params(config.model)), jax.tree.leaves(params))
    )
    if different:
        raise UserError(f"init_from {config.init_from}: its parameters are not those of the model configured here")
    return params


@dataclasses.dataclass(kw_only=True)
class _Run:
    """What the steps of a run work with."""

    config: TrainConfig
    mesh: Mesh | None
    feed: Feed
    held_out: Feed | None
    checkpoints: Checkpoints
    reporter: Reporter
    stopping: Stopping
    profiler: Profiler
    on_metrics: OnMetrics | None

    def steps(self, state: TrainState) -> tuple[TrainState, bool]:
        """Returns the last state, and whether the run is over rather than stopped."""
        config, clock = self.config, self.reporter.clock
        eval_start = None if self.held_out is None else self.held_out.get_state()
        saved, metrics, step = self.checkpoints.latest, None, int(state.step)
        clock.lap(useful=False)
        while step < config.steps and not self.stopping.reason():
            if self.feed.ends:  # they are about to ask one another whether there is a batch
                self._one_ahead(metrics)
            now = timeline.at(config, step)
            batch = self.feed.take(now.batch_size)
            if batch is None:
                self.reporter.say(f"the data end after {step} of {config.steps} steps")
                break
            self._one_ahead(metrics)
            self.profiler.before(step + 1)
            compiled = metrics is not None
            fixed = _compiled_fields(now)
            state, metrics = _step(state, batch, self.stopping.vote(), config=fixed, mesh=self.mesh)
            self.stopping.count(metrics.pop("stop", None))
            clock.lap(useful=compiled)
            step += 1
            self.profiler.after(step, metrics)
            self._report(step, metrics)
            if eval_start is not None and step % config.eval_every == 0:
                self._evaluate(step, state, eval_start, metrics)
            if step % config.save_every == 0:
                self._save(state, metrics)
                saved = step
        for line in self.feed.report():
            self.reporter.say(line)
        if saved != step and step:
            self._save(state, metrics)
        return state, self._is_over(step)

    def _one_ahead(self, metrics: Metrics | None) -> None:
        """Waits until the device has one step to do and no more: a stop should act soon."""
        if metrics is None:
            return
        # Still at work when the next batch is there: the device has not waited for it.
        self.reporter.clock.lap(useful=not metrics["loss"].is_ready())
        metrics["loss"].block_until_ready()
        self.reporter.clock.lap(useful=True)

    def _report(self, step: int, metrics: Metrics) -> None:
        self.reporter.advance(step)
        self.reporter.tokens += self.feed.tokens
        if step % self.config.log_every and step != self.config.steps:
            return
        values = jax.device_get(metrics)
        self.reporter.clock.lap(useful=True)
        self.reporter.log(step, values)
        if self.on_metrics is not None:
            self.on_metrics(step, values)

    def _evaluate(self, step: int, state: TrainState, start: Any, metrics: Metrics) -> None:
        assert self.held_out is not None
        self._one_ahead(metrics)
        self.held_out.set_state(start)
        value = evaluate(state.params, self.config, self.held_out)
        self.reporter.write(step, {"eval_cross_entropy": value})
        self.reporter.clock.lap(useful=False)

    def _save(self, state: TrainState, metrics: Metrics | None) -> None:
        self._one_ahead(metrics)
        self.checkpoints.save(state, self.feed.get_state(), self.config.model)
        self.reporter.clock.lap(useful=False)

    def _is_over(self, step: int) -> bool:
        reason = self.stopping.reason()
        clock = self.reporter.clock
        if reason == TIME and step < self.config.steps:
            minutes = self.config.max_minutes
            self.reporter.say(f"{minutes:g} minutes are over after {step} of {self.config.steps} steps")
        self.reporter.say(f"goodput {clock.goodput:.1%}: that share of {clock.seconds:.0f} s went into steps")
        return reason != SIGNAL or step >= self.config.steps


@functools.lru_cache
def _compiled_fields(config: TrainConfig) -> TrainConfig:
    """`config` without what the step does not depend on: a run in another folder needs no new compilation."""
    return TrainConfig(
        **{
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name in _STEP_FIELDS
        }
    )


def _open_feed(
    config: TrainConfig, data: DataConfig, tokenizer: Tokenizer | None, mesh: Mesh | None, stack: contextlib.ExitStack
) -> Feed:
    size = timeline.piece_size(config)
    shards = None if mesh is None else shards_here(count_shards(data, size), size, mesh)
    batches = build_data(
        data, tokenizer, size, config.seq_len, config.seed, vocab_size=config.model.vocab_size, shards=shards
    )
    stack.callback(batches.close)
    return Feed(batches, mesh, shards, ends=data.epochs is not None)


def _tokenizer_of_all(config: TrainConfig, out: Path) -> Tokenizer | None:
    """The first process may have to train it; the others wait, and load what it kept."""
    tokenizer = prepare_tokenizer(config, out) if is_first() else None
    gather(None)
    return tokenizer if is_first() else prepare_tokenizer(config, out)


def _of_any_process(config: TrainConfig) -> TrainConfig:
    return config.replace(distributed=dataclasses.replace(config.distributed, process_id=None))


def _with_tokens_of(tokenizer: Tokenizer | None, config: TrainConfig) -> TrainConfig:
    """The configuration with the tokenizer's special ids in the model, where it names none itself."""
    if tokenizer is None:
        return config
    model = config.model
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is {model.vocab_size}; "
            f"set model.vocab_size={tokenizer.padded_vocab_size()}"
        )
    if not model.eos_token_id:
        model = model.replace(
            eos_token_id=tokenizer.eos_ids, pad_token_id=tokenizer.pad_id, real_vocab_size=tokenizer.vocab_size
        )
    return config.replace(model=model)


def _export(config: TrainConfig, params: Params, tokenizer: Tokenizer | None, out: Path) -> Path:
    from glm45_jax.convert import save_checkpoint

    folder = None if tokenizer is None else out / "tokenizer"
    if tokenizer is not None and is_first():
        keep_tokenizer(tokenizer, out / "tokenizer")
    save_checkpoint(params, config.model, out / "model", tokenizer_dir=folder, overwrite=True)
    return out / "model"


def _use_compilation_cache(config: TrainConfig) -> None:
    # Programs for CPU that come from the cache (jax 0.10) run collectives side by side that were compiled to follow one
    # another, and gloo tells them apart by their order alone.
    several_on_cpu = jax.process_count() > 1 and jax.default_backend() == "cpu"
    if config.compilation_cache is not None and not several_on_cpu:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache).expanduser().absolute()))


@contextlib.contextmanager
def _only_one(folder: Path, config: TrainConfig) -> Iterator[None]:
    """Refuses a second run in the same folder; the lock ends with the first process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    several = jax.process_count() > 1
    patience = config.distributed.heartbeat_timeout_seconds + _PATIENCE if several else 0.0
    with open(folder / ".lock", "a") as lock:
        if is_first():
            _lock(lock, folder, time.monotonic() + patience)
        gather(None)
        yield


def _lock(lock: IO[str], folder: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process is training in {folder}; wait for it, or take another output_dir"
                ) from None
        time.sleep(0.5)


def _write(file: Path, text: str) -> None:
    new = file.with_name(file.name + ".partial")
    new.write_text(text, "utf-8")
    os.replace(new, file)
