"""What changes in the course of a run: batch size, learning rate, and settings that change with the tokens seen.

All of it follows from the configuration and the number of the step: a run that goes on needs nothing else. A run may
be a part of a chain of stages: steps and tokens are counted from where the chain's schedule begins. Tokens are places
in batches, padding included, so that their number is known beforehand.

A step's settings are plain numbers, static under jit: `at` gives them, and each new set of them is compiled anew. So
the batch grows in a few sizes, in whole micro-batches of one size.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from typing import NamedTuple

import optax

from glm45_jax.train.config import TrainConfig
from glm45_jax.train.optimizer import make_schedule


class Stretch(NamedTuple):
    """Steps of one batch size."""

    first_step: int
    first_token: int
    batch_size: int


def full_batch_size(config: TrainConfig) -> int:
    """That of the end of the warm-up."""
    return (config.batch_warmup and config.batch_warmup.to) or config.batch_size


@functools.lru_cache
def stretches(config: TrainConfig) -> tuple[Stretch, ...]:
    """Those of the run, the last one open-ended."""
    step, token, out = config.first_step, config.first_tokens, []
    if warmup := config.batch_warmup:
        for size in warmup.batch_sizes(full_batch_size(config), config.batch_size // config.accumulation):
            out.append(Stretch(step, token, size))
            steps = max(1, round(warmup.tokens / warmup.sizes / (size * config.seq_len)))
            step, token = step + steps, token + steps * size * config.seq_len
    return (*out, Stretch(step, token, full_batch_size(config)))


def batch_size_at(config: TrainConfig, step: int) -> int:
    """Sequences of the batch that step number `step`, from 0 on, trains on."""
    return _stretch(config, step).batch_size


def tokens_at(config: TrainConfig, step: int) -> int:
    """Tokens of all steps before number `step`, those of the chain's earlier stages included."""
    first_step, first_token, size = _stretch(config, step)
    return first_token + (step - first_step) * size * config.seq_len


def steps_for(config: TrainConfig, tokens: int) -> int:
    """How many steps the run takes for so many tokens, or a little more."""
    goal = config.first_tokens + tokens
    *_, (first_step, first_token, size) = (s for s in stretches(config) if s.first_token < goal)
    return first_step - config.first_step + math.ceil((goal - first_token) / (size * config.seq_len))


def piece_size(config: TrainConfig) -> int:
    """The largest number of sequences of which every batch of the run is a multiple."""
    return math.gcd(*(stretch.batch_size for stretch in stretches(config)))


def at(config: TrainConfig, step: int) -> TrainConfig:
    """`config` with the batch size, micro-batches and weights of step number `step`."""
    tokens = tokens_at(config, step)
    return _with(config, batch_size_at(config, step), sum(change.tokens <= tokens for change in config.changes))


@functools.lru_cache
def _with(config: TrainConfig, batch_size: int, changes: int) -> TrainConfig:
    settings = {key: value for change in config.changes[:changes] for key, value in change.settings().items()}
    micro = config.batch_size // config.accumulation
    warmup = config.batch_warmup and dataclasses.replace(config.batch_warmup, to=full_batch_size(config))
    settings |= {"accumulation": batch_size // micro, "batch_warmup": warmup, "changes": ()}
    return config.replace(batch_size=batch_size, **settings)


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The learning rate by the number of updates made."""
    return make_schedule(config.optimizer, config.steps, milestones(config))


def milestones(config: TrainConfig) -> tuple[tuple[int, int], ...]:
    """(step, tokens before it) wherever the tokens of a step change, and at the end."""
    inside = [(s.first_step, s.first_token) for s in stretches(config) if s.first_step < config.steps]
    return (*inside, (config.steps, tokens_at(config, config.steps)))


def _stretch(config: TrainConfig, step: int) -> Stretch:
    found = stretches(config)
    return found[max(0, bisect.bisect_right(found, step, key=lambda stretch: stretch.first_step) - 1)]
