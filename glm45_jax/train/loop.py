"""A whole run: tokenizer, data, steps, metrics, checkpoints, and the model at its end.

Started again with the same configuration, a run that was stopped in any way goes on from its newest checkpoint and
ends with the same parameters, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console

from glm45_jax.config import ModelConfig
from glm45_jax.data import BatchIterator, DataConfig, build_data
from glm45_jax.errors import UserError
from glm45_jax.model import Params, abstract_params
from glm45_jax.parallel import device_in_force
from glm45_jax.text import Tokenizer
from glm45_jax.train import timeline
from glm45_jax.train.checkpoint import Checkpoints, abstract_state, params_digest
from glm45_jax.train.config import TrainConfig, to_tree
from glm45_jax.train.loss import Batch, loss_fn
from glm45_jax.train.report import Reporter
from glm45_jax.train.step import Metrics, TrainState, init_state, train_step
from glm45_jax.train.tokenizer import keep_tokenizer, prepare_tokenizer

OnMetrics = Callable[[int, Metrics], None]

# What `train_step` and `init_state` read.
_STEP_FIELDS = {
    "model", "steps", "accumulation", "batch_size", "batch_warmup", "seq_len", "optimizer", "mtp_loss_weight",
    "balance_loss_weight", "bias_update_rate", "skip_spikes", "first_step", "first_tokens", "seed",
}  # fmt: skip
_first_state = jax.jit(init_state, static_argnames="config")
_step = jax.jit(train_step, static_argnames="config", donate_argnums=0)


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

    SIGINT and SIGTERM end it after the step at hand, with a checkpoint.

    Args:
      tokenizer: in place of the one that `config.tokenizer` names.
      on_metrics: called with the step's number and its metrics (`train_step`'s) at every logged step.
      console: where progress is shown; standard error by default.

    Raises:
      UserError: the configuration, data or checkpoints are wrong, or another process trains in `output_dir`.
    """
    if config.output_dir is None or config.data is None:
        raise UserError("a run needs output_dir and data; set both in the configuration")
    out, settings = Path(config.output_dir), config.data
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out), contextlib.ExitStack() as stack:
        _use_compilation_cache(config)
        tokenizer = tokenizer or prepare_tokenizer(config, out)
        config = _with_tokens_of(tokenizer, config)
        data = _open_data(config, settings, tokenizer, timeline.piece_size(config))
        stack.callback(data.close)
        checkpoints = Checkpoints(out / "checkpoints", config.keep)
        stack.callback(checkpoints.close)
        _write(out / "config.yaml", yaml.safe_dump(to_tree(config), sort_keys=False))
        state = _start(config, checkpoints, data)
        reporter = stack.enter_context(
            Reporter(out, config.steps, int(state.step), tensorboard=config.tensorboard, console=console)
        )
        stop = stack.enter_context(_stop_signals())
        stack.enter_context(device_in_force(state.params))
        state, finished = _run(config, tokenizer, state, data, checkpoints, reporter, stop, on_metrics)
        checkpoints.wait()
        model_dir = _export(config, state.params, tokenizer, out) if finished else None
    return TrainResult(state, config, tokenizer, finished, model_dir)


def export_newest(config: TrainConfig) -> Path:
    """Writes the model of the newest checkpoint, of a run that need not be over, to `output_dir`/model."""
    out = Path(config.output_dir or "")
    if not (out / "checkpoints").is_dir():
        raise UserError(f"{out}: no checkpoints here; train first")
    with _only_one(out):
        tokenizer = prepare_tokenizer(config, out)
        config = _with_tokens_of(tokenizer, config)
        checkpoints = Checkpoints(out / "checkpoints", config.keep)
        restored = checkpoints.restore(abstract_state(functools.partial(init_state, config)), config.model)
        checkpoints.close()
        if restored is None:
            raise UserError(f"{out / 'checkpoints'}: no whole checkpoint here; train first")
        return _export(config, restored[0].params, tokenizer, out)


def evaluate(params: Params, config: TrainConfig, batches: Iterator[dict[str, np.ndarray]]) -> float:
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


def _start(config: TrainConfig, checkpoints: Checkpoints, data: BatchIterator) -> TrainState:
    """The newest checkpoint, with the data moved to its place; else the run's first state."""
    init = functools.partial(init_state, config)
    restored = checkpoints.restore(abstract_state(init), config.model)
    if restored is not None:
        state, position = restored
        if position is not None and int(state.step) < config.steps:
            data.set_state(position)
        return state
    if config.continue_from is not None:
        return _continued(config, abstract_state(init))
    params = None if config.init_from is None else _initial_params(config)
    # Placed as a restored state is: both are then stepped by one and the same program.
    return jax.device_put(_first_state(_compiled_fields(config), params), jax.devices()[0])


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


def _initial_params(config: TrainConfig) -> Params:
    from glm45_jax.convert import load_checkpoint

    _, params = load_checkpoint(str(config.init_from), dtype=config.model.param_dtype)
    want, have = jax.tree.structure(abstract_params(config.model)), jax.tree.structure(params)
    different = want != have or any(
        a.shape != b.shape for a, b in zip(jax.tree.leaves(abstract_params(config.model)), jax.tree.leaves(params))
    )
    if different:
        raise UserError(f"init_from {config.init_from}: its parameters are not those of the model configured here")
    return params


def _run(
    config: TrainConfig, tokenizer: Tokenizer | None, state: TrainState, data: BatchIterator,
    checkpoints: Checkpoints, reporter: Reporter, stop: threading.Event, on_metrics: OnMetrics | None,
) -> tuple[TrainState, bool]:  # fmt: skip
    """The steps. Returns the last state, and whether the run is over rather than stopped."""
    piece = timeline.piece_size(config)
    held_out = None if config.eval_data is None else _open_data(config, config.eval_data, tokenizer, config.batch_size)
    eval_start = None if held_out is None else held_out.get_state()
    tokens, metrics, step = 0, None, int(state.step)
    saved = checkpoints.latest
    deadline = math.inf if config.max_minutes is None else time.monotonic() + 60 * config.max_minutes
    while step < config.steps and not stop.is_set():
        if time.monotonic() > deadline:
            reporter.say(f"{config.max_minutes:g} minutes are over after {step} of {config.steps} steps")
            break
        now = timeline.at(config, step)
        batch = _next_batch(data, now.batch_size // piece)
        if batch is None:
            reporter.say(f"the data end after {step} of {config.steps} steps")
            break
        if metrics is not None:
            metrics["loss"].block_until_ready()  # one step ahead of the device, no more: a stop should act soon
        state, metrics = _step(state, batch, config=_compiled_fields(now))
        step += 1
        tokens += int(np.count_nonzero(batch["segment_ids"]))
        reporter.advance(step)
        if step % config.log_every == 0 or step == config.steps:
            values = jax.device_get(metrics)
            reporter.log(step, values, tokens)
            tokens = 0
            if on_metrics is not None:
                on_metrics(step, values)
        if held_out is not None and eval_start is not None and step % config.eval_every == 0:
            held_out.set_state(eval_start)
            reporter.write(step, {"eval_cross_entropy": evaluate(state.params, config, held_out)})
        if step % config.save_every == 0:
            checkpoints.save(state, data.get_state(), config.model)
            saved = step
    if data.skipped:
        reporter.say(f"{data.skipped} unusable records were left out")
    if saved != step and step:
        checkpoints.save(state, data.get_state(), config.model)
    return state, not stop.is_set() or step >= config.steps


def _next_batch(data: Iterator[dict[str, np.ndarray]], pieces: int) -> dict[str, np.ndarray] | None:
    """The next `pieces` of the data as one batch; None where they end before."""
    parts = [part for _, part in zip(range(pieces), data)]
    if len(parts) < pieces:
        return None
    return parts[0] if pieces == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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


def _open_data(config: TrainConfig, data: DataConfig, tokenizer: Tokenizer | None, batch_size: int) -> BatchIterator:
    return build_data(data, tokenizer, batch_size, config.seq_len, config.seed, vocab_size=config.model.vocab_size)


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
    if tokenizer is not None:
        keep_tokenizer(tokenizer, out / "tokenizer")
    save_checkpoint(params, config.model, out / "model", tokenizer_dir=folder, overwrite=True)
    return out / "model"


def _use_compilation_cache(config: TrainConfig) -> None:
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache).expanduser().absolute()))


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Refuses a second process in the same folder; the lock ends with the process, however it ends."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is training in {folder}; wait for it, or take another output_dir"
            ) from None
        yield


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(file: Path, text: str) -> None:
    new = file.with_name(file.name + ".partial")
    new.write_text(text, "utf-8")
    os.replace(new, file)
