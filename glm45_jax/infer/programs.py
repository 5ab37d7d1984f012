"""The device's side of an engine: what lies there, and the compiled programs of a step, called one after another.

`Programs` knows no requests. Whoever calls the same methods with the same arrays in the same order has the same on the
device, which is how several processes serve one model (`following.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from glm45_jax.config import ModelConfig
from glm45_jax.infer import steps
from glm45_jax.infer.calibrate import cache_scales
from glm45_jax.infer.sampling import SamplingParams
from glm45_jax.infer.score import Scored, score
from glm45_jax.infer.settings import without_biases
from glm45_jax.infer.steps import Chosen, Drafted, Likeliest, Read, Reading, Slots, Special
from glm45_jax.model import Params, init_pages
from glm45_jax.model.paged import QuantizedPages


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of what lies on the device.

    Attributes:
      cache_dtype: as `calibrate.checked_cache` gives it.
      vocab_size: token ids from here on are never chosen.
      sample: texts by which a quantised cache's scales are measured; else none.
    """

    slots: int
    drafts: int
    pages: int
    page_size: int
    cache_dtype: str | None
    vocab_size: int
    sample: list[list[int]]


class Outcome(NamedTuple):
    """What a step gives, on the device; whole in every process."""

    chosen: Chosen
    drafted: Drafted | None
    likeliest: Likeliest | None


@functools.partial(jax.jit, static_argnames=("config", "sizes", "most"), donate_argnames="pages")
def _read(params: Params, config: ModelConfig, pages: Any, slots: Slots, flat: Any, sizes: Any, most: int) -> Read:
    return steps.read(params, config, pages, slots, Reading.unpacked(flat, sizes), most=most)


_choose = jax.jit(steps.choose)


@functools.partial(jax.jit, static_argnames=("config", "sizes", "most"), donate_argnames="pages")
def _draft(
    params: Params, config: ModelConfig, pages: Any, done: Any, chosen: Chosen, sampling: Any, flat: Any,
    vocab_size: Any, sizes: Any, most: int,
) -> Drafted:  # fmt: skip
    hidden, tokens, rows = done
    reading = Reading.unpacked(flat, sizes)._replace(tokens=tokens, lengths=rows.lengths)
    args = hidden, chosen.slots, chosen.tokens, without_biases(sampling), reading, vocab_size
    return steps.draft(params, config, pages, *args, most=most)


_likeliest = jax.jit(steps.likeliest)


class Programs:
    """Parameters, pages, and what each slot's last step has left. A step is `read`, then `choose`."""

    def __init__(self, params: Params, config: ModelConfig, sizes: Sizes):
        self.params, self.config, self.sizes = params, config, sizes
        self._vocab_size = np.int32(sizes.vocab_size)
        self._done: Read | None = None  # for `choose`; its pages are in their place already
        self._kept: tuple[SamplingParams, SamplingParams] | None = None

    def prepare(self) -> None:
        """Makes empty pages, over the mesh in force."""
        sizes, config = self.sizes, self.config
        make = lambda scales: init_pages(config, sizes.pages, sizes.page_size, sizes.cache_dtype, scales)  # noqa: E731
        self._pages = _spread(make, self._scales(), by_heads=True)
        zeros = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731
        self._slots = _spread(lambda _: Slots(zeros(sizes.slots, 1 + sizes.drafts), zeros(sizes.slots)), None)

    def _scales(self) -> jax.Array | None:
        if not self.sizes.sample or self.sizes.cache_dtype is None:
            return None
        scales = cache_scales(self.params, self.config, self.sizes.cache_dtype, self.sizes.sample)
        return _spread(lambda x: x, scales, by_heads=True)

    def read(self, reading: Reading, most: int) -> None:
        """Reads a step's tokens; up to `most` drafts follow each row's last."""
        self._flat, self._sizes, self._most = reading.packed(), reading.sizes, most
        done = _read(self.params, self.config, self._pages, self._slots, self._flat, sizes=reading.sizes, most=most)
        self._done, self._pages = done, done.pages

    def choose(self, sampling: SamplingParams, special: Special | None, top: bool) -> Outcome:
        """What comes after the tokens that were read last.

        Args:
          top: the likeliest tokens are wanted too.
        """
        vocab, done, drafted = self._vocab_size, self._done, None
        assert done is not None, "nothing was read"
        self._done, sampling = None, self._resident(sampling)
        chosen = _choose(done.logits, self._slots, sampling, done.rows, vocab, special)
        self._slots = chosen.slots
        likely = _likeliest(done.logits, vocab) if top else None
        if done.hidden is not None:
            args = self._pages, (done.hidden, done.tokens, done.rows), chosen, sampling, self._flat, vocab
            drafted = _draft(self.params, self.config, *args, sizes=self._sizes, most=self._most)
            self._slots, self._pages = drafted.slots, drafted.pages
        return Outcome(chosen, drafted, likely)

    def _resident(self, sampling: SamplingParams) -> SamplingParams:
        """On the device, where one alone computes: mostly a step has the settings of the one before."""
        if not jax.sharding.get_mesh().empty and jax.device_count() > 1:
            return sampling
        if self._kept is None or self._kept[0] is not sampling:
            self._kept = sampling, jax.device_put(sampling)
        return self._kept[1]

    def score(self, tokens: np.ndarray) -> Scored:
        """How likely a text is: no step, and nothing of it stays."""
        return score(self.params, self.config, tokens, self._vocab_size)

    def update(self, params: Params) -> None:
        """Other weights for the steps to come, which read nothing that was written with the old ones."""
        self.params = params
        if isinstance(self._pages, QuantizedPages):
            self._pages = dataclasses.replace(self._pages, scales=self._scales())

    def wait(self) -> None:
        """Until all that was asked for is done."""
        jax.block_until_ready(self._pages)

    def close(self, error: BaseException | None) -> None:
        """Nothing comes any more; `error`: why it ended too early."""

    @staticmethod
    def compiled() -> int:
        """How many programs of steps have been compiled so far."""
        return sum(f._cache_size() for f in (_read, _choose, _draft, _likeliest))  # pyright: ignore[reportAttributeAccessIssue]


def _spread(make: Callable[[Any], Any], of: Any, by_heads: bool = False) -> Any:
    """`make(of)` over the mesh in force, where each device makes its part: some heads, third axis, or all."""
    mesh = jax.sharding.get_mesh()
    cut = by_heads and mesh.shape.get("tensor", 1) > 1
    spec = PartitionSpec(None, None, "tensor") if cut else PartitionSpec()
    return jax.jit(make, out_shardings=None if mesh.empty else NamedSharding(mesh, spec))(of)
