"""Several processes that serve one model: the first has the engine, the others follow it.

All hold their parts of one sharded model. The first process plans; before it calls a compiled program it sends the
step's arrays to all others, which call the same. What is computed for requests is whole in every process, and the first
alone reads it.

    engine = Engine(params, config, …)        # in process 0, under a mesh over the devices of all processes
    follow(params, config)                    # in all others; returns when the engine is closed
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.infer.channel import Channel, Connections, Lost, accept, connect, listen, new_token
from glm45_jax.infer.programs import Choice, Outcome, Programs, Sizes
from glm45_jax.infer.sampling import SamplingParams, TokenCounts
from glm45_jax.infer.score import Scored
from glm45_jax.infer.steps import Reading, Special
from glm45_jax.model import Params
from glm45_jax.parallel.processes import coordinator_host, hear, say

_WHERE = "glm45_jax/engine"  # key in the coordination service
_SECONDS = 600.0  # in which all must have come: some may take longer to load


def others_of(mesh: jax.sharding.Mesh) -> list[int]:
    """The numbers of the other processes whose devices a mesh has."""
    return sorted({device.process_index for device in mesh.devices.flat} - {jax.process_index()})


class Leading(Programs):
    """Programs that the processes `others` call too. Raises `UserError` where they do not come.

    Args:
      on_loss: called from another thread when one of them is gone.
    """

    def __init__(
        self, params: Params, config: ModelConfig, sizes: Sizes, others: list[int], on_loss: Callable[[Lost], None]
    ):
        super().__init__(params, config, sizes)
        if jax.process_index():
            raise UserError("the engine belongs into process 0; the others call glm45_jax.infer.follow")
        token, host = new_token(), coordinator_host() or socket.gethostname()
        with listen(host) as listener:
            say(_WHERE, json.dumps([host, listener.getsockname()[1], token]))
            try:
                channels = accept(listener, token, others, _SECONDS)
            finally:
                say(_WHERE, None)
        self._others = Connections(channels, on_loss)
        self._others.send({"sizes": dataclasses.asdict(sizes), "config": _digest(config)})

    def read(self, reading: Reading, most: int) -> None:
        self._others.send({"do": "read", "most": most}, reading)
        super().read(reading, most)

    def choose(self, choice: Choice) -> Outcome:
        sampling, special, top = choice
        has = {"special": special is not None, "counts": special is not None and special.counts is not None}
        arrays = [*jax.tree.leaves(sampling), *jax.tree.leaves(special)]
        self._others.send({"do": "choose", "top": top, **has}, arrays)
        return super().choose(choice)

    def step(self, reading: Reading, most: int, sampling: SamplingParams) -> Outcome:
        self._others.send({"do": "step", "most": most}, [*reading, *jax.tree.leaves(sampling)])
        return super().step(reading, most, sampling)

    def compile_ahead(self, steps: Any) -> None:
        """Nothing: all processes compile the same programs in the same order, as they are called."""

    def score(self, tokens: np.ndarray) -> Scored:
        self._others.send({"do": "score"}, [tokens])
        return super().score(tokens)

    def update(self, params: Params) -> None:
        self._others.send({"do": "update"})
        super().update(params)

    def close(self, error: BaseException | None) -> None:
        if error is None:
            self._others.send({"do": "close"})
        self._others.close()


def follow(params: Params, config: ModelConfig, next_params: Callable[[], Params] | None = None) -> None:
    """Computes what the engine of process 0 has computed, until that is closed. Under the same mesh as there.

    Args:
      next_params: what `Engine.update_params` is given there, this process's part; called when it is.

    Raises:
      UserError: process 0 is gone, or serves another model.
    """
    host, port, token = json.loads(hear(_WHERE, _SECONDS))
    channel = connect(host, port, token, jax.process_index(), _SECONDS)
    try:
        hello, _ = channel.receive()
        if hello["config"] != _digest(config):
            raise UserError("process 0 serves a model of another configuration: all must have the same checkpoint")
        programs = Programs(params, config, Sizes(**hello["sizes"]))
        programs.prepare()
        while _followed(programs, channel, next_params):
            pass
    except Lost as error:
        raise UserError(f"lost process 0, which has the requests ({error}); see what it said last") from error
    finally:
        channel.close()


def _followed(programs: Programs, channel: Channel, next_params: Callable[[], Params] | None) -> bool:
    """One call; False at the end."""
    values, arrays = channel.receive()
    match values["do"]:
        case "read":
            programs.read(Reading(*arrays), values["most"])
        case "choose":
            programs.choose(Choice(*_settings(values, arrays), values["top"]))
        case "step":
            count = len(Reading._fields)
            programs.step(Reading(*arrays[:count]), values["most"], SamplingParams(*arrays[count:]))
        case "score":
            programs.score(arrays[0])
        case "update":
            if next_params is None:
                raise UserError("process 0 goes on with other weights, and follow was given no next_params")
            programs.update(next_params())
        case "close":
            programs.wait()
            return False
        case other:
            raise UserError(f"process 0 asks for {other!r}: all must run the same version")
    return True


def _settings(values: dict[str, Any], arrays: list[np.ndarray]) -> tuple[SamplingParams, Special | None]:
    count = len(dataclasses.fields(SamplingParams))
    sampling, rest = SamplingParams(*arrays[:count]), arrays[count:]
    counts = TokenCounts(*rest[:-1]) if values["counts"] else None
    return sampling, Special(counts, rest[-1]) if values["special"] else None  # pyright: ignore[reportArgumentType]


def _digest(config: ModelConfig) -> str:
    return hashlib.sha256(repr(config).encode()).hexdigest()
