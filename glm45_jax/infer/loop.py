"""The compiled part of generating: `start` reads the prompts and chooses the first tokens, `advance` goes on.

Both are jitted once per shape: rows, prompt length, cache capacity. Everything else that users vary (how many tokens,
where to stop, how to sample) is an array.

Axes: B batch, S prompt slots, T cache slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glm45_jax.config import ModelConfig
from glm45_jax.infer.sampling import SamplingParams, TokenCounts, count_prompt, sample
from glm45_jax.model import KVCache, Params, decode_step, init_cache, prefill


class Controls(NamedTuple):
    """What does not change while a batch is generated."""

    sampling: SamplingParams
    lengths: Int[Array, " B"]  # tokens of the prompt
    limits: Int[Array, " B"]  # tokens of the answer at most; 0: the row only pads the batch
    stop_ids: Int[Array, " N"]  # -1 fills up
    vocab_size: Int[Array, ""]  # ids from here on are never chosen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A batch being generated."""

    cache: KVCache
    tokens: Int[Array, " B"]  # chosen last, not read yet
    step: Int[Array, ""]  # tokens chosen of each row, those after its end included
    count: Int[Array, " B"]  # tokens of the answer
    done: Bool[Array, " B"]
    answer: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    counts: TokenCounts | None  # where any sequence has a penalty


@functools.partial(jax.jit, static_argnames=("config", "capacity", "penalties"))
def start(
    params: Params,
    config: ModelConfig,
    prompts: Int[Array, "B S"],
    controls: Controls,
    *,
    capacity: int,
    penalties: bool,
) -> State:
    """Reads prompts, padded on the right, into a new cache of `capacity` slots and chooses the first tokens."""
    batch, slots = prompts.shape
    mask = jnp.arange(slots) < controls.lengths[:, None]
    cache = init_cache(config, batch, capacity)
    logits, cache = prefill(params, config, cache, prompts, attention_mask=mask.astype(jnp.int32))
    state = State(
        cache=cache,
        tokens=jnp.zeros(batch, jnp.int32),
        step=jnp.int32(0),
        count=jnp.zeros(batch, jnp.int32),
        done=controls.limits <= 0,
        answer=jnp.zeros((batch, capacity), jnp.int32),
        logprobs=jnp.zeros((batch, capacity), jnp.float32),
        counts=count_prompt(prompts, mask, config.vocab_size) if penalties else None,
    )
    return _choose(state, logits, controls)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def advance(
    params: Params,
    config: ModelConfig,
    state: State,
    controls: Controls,
    until: Int[Array, ""] | int,
    halt: Bool[Array, " B"],
) -> State:
    """Chooses tokens until there are `until` of each row or all rows have ended. Takes `state` over, cache included.

    Args:
      halt: rows that the caller has ended.
    """

    def going_on(state: State) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.done)

    def one_more(state: State) -> State:
        logits, cache = decode_step(params, config, state.cache, state.tokens)
        return _choose(dataclasses.replace(state, cache=cache), logits, controls)

    return jax.lax.while_loop(going_on, one_more, dataclasses.replace(state, done=state.done | halt))


def _choose(state: State, logits: Float[Array, "B V"], controls: Controls) -> State:
    positions = controls.lengths + state.step
    tokens, logprobs = sample(logits, controls.sampling, positions, state.counts, controls.vocab_size)
    count = state.count + ~state.done
    stopped = jnp.any(tokens[:, None] == controls.stop_ids, axis=1)
    at_step = lambda x, new: jax.lax.dynamic_update_slice(x, new[:, None], (0, state.step))  # noqa: E731
    return State(
        cache=state.cache,
        tokens=tokens,
        step=state.step + 1,
        count=count,
        done=state.done | stopped | (count >= controls.limits),
        answer=at_step(state.answer, tokens),
        logprobs=at_step(state.logprobs, logprobs),
        counts=state.counts.add(tokens) if state.counts is not None else None,
    )
