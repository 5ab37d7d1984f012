"""The device's side of an engine: what lies there, and the compiled programs of a step, called one after another.

`Programs` knows no requests. Whoever calls the same methods with the same arrays in the same order has the same on the
device, which is how several processes serve one model (`following.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

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


class Choice(NamedTuple):
    """What the choice of tokens is given; `top`: the likeliest ones are wanted too."""

    sampling: SamplingParams
    special: Special | None
    top: bool


class Outcome(NamedTuple):
    """What a step gives, on the device; whole in every process."""

    chosen: Chosen
    drafted: Drafted | None
    likeliest: Likeliest | None


class Call(NamedTuple):
    """Of a compiled program, which is given `fixed` by name."""

    program: Any
    args: tuple[Any, ...]
    fixed: dict[str, Any] = {}  # noqa: RUF012 nothing is put in

    def run(self) -> Any:
        return self.program(*self.args, **self.fixed)

    def lowered(self) -> jax.stages.Lowered:
        return self.program.lower(*self.args, **self.fixed)

    @property
    def signature(self) -> Any:
        """Calls with the same one take the same compiled form."""
        leaves, tree = jax.tree.flatten(self.args)
        return tree, str(self.fixed), tuple((x.shape, x.dtype) for x in leaves if not isinstance(x, ModelConfig))


T = TypeVar("T")
Calls = Generator[Call, Any, T]


def _run(calls: Calls[T]) -> T:
    """Makes the calls, each of which is given what the one before gave."""
    found = None
    while True:
        try:
            found = calls.send(found).run()
        except StopIteration as end:
            return end.value


def _run_up_to(program: Any, *several: Calls[Any]) -> Call | None:
    """Makes the calls that come before the first of a program, and returns that."""
    for calls in several:
        found = None
        with contextlib.suppress(StopIteration):
            while True:
                call = calls.send(found)
                if call.program is program:
                    return call
                found = call.run()
    return None


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


@functools.partial(jax.jit, static_argnames=("config", "sizes", "most"), donate_argnames="pages")
def _step(
    params: Params, config: ModelConfig, pages: Any, slots: Slots, flat: Any, sampling: SamplingParams, vocab_size: Any,
    sizes: Any, most: int,
) -> tuple[Chosen, Drafted | None, Any]:  # fmt: skip
    """Read, choice and drafts as one, where no mask is to come between: each call costs a host 0.15 ms and more."""
    reading = Reading.unpacked(flat, sizes)
    done = steps.read(params, config, pages, slots, reading, most=most)
    chosen = steps.choose(done.logits, slots, sampling, done.rows, vocab_size, None)
    if done.hidden is None:
        return chosen, None, done.pages
    reading = reading._replace(tokens=done.tokens, lengths=done.rows.lengths)
    args = done.hidden, chosen.slots, chosen.tokens, sampling, reading, vocab_size
    drafted = steps.draft(params, config, done.pages, *args, most=most)
    return chosen, drafted._replace(pages=None), drafted.pages  # returned twice they would be copied


class Programs:
    """Parameters, pages, and what each slot's last step has left. A step is `read`, then `choose`; or both at once."""

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
        _run(self._read(reading, most))

    def choose(self, choice: Choice) -> Outcome:
        """What comes after the tokens that were read last."""
        return _run(self._choose(choice))

    def step(self, reading: Reading, most: int, sampling: SamplingParams) -> Outcome:
        """`read` and `choose` by one program, for requests that ask for neither masks nor the likeliest tokens."""
        return _run(self._step(reading, most, sampling))

    def _step(self, reading: Reading, most: int, sampling: SamplingParams) -> Calls[Outcome]:
        args = self._pages, self._slots, reading.packed(), self._resident(sampling), self._vocab_size
        fixed = {"sizes": reading.sizes, "most": most}
        chosen, drafted, self._pages = yield Call(_step, (self.params, self.config, *args), fixed)
        self._slots = (drafted or chosen).slots
        return Outcome(chosen, drafted, None)

    def _read(self, reading: Reading, most: int) -> Calls[None]:
        self._flat, self._fixed = reading.packed(), {"sizes": reading.sizes, "most": most}
        done = yield Call(_read, (self.params, self.config, self._pages, self._slots, self._flat), self._fixed)
        self._done, self._pages = done, done.pages

    def _choose(self, choice: Choice) -> Calls[Outcome]:
        done, vocab, sampling = self._done, self._vocab_size, self._resident(choice.sampling)
        assert done is not None, "nothing was read"
        self._done = None
        chosen = yield Call(_choose, (done.logits, self._slots, sampling, done.rows, vocab, choice.special))
        self._slots = chosen.slots
        likely = (yield Call(_likeliest, (done.logits, vocab))) if choice.top else None
        drafted = None if done.hidden is None else (yield from self._draft(done, chosen, sampling))
        return Outcome(chosen, drafted, likely)

    def _draft(self, done: Read, chosen: Chosen, sampling: SamplingParams) -> Calls[Drafted]:
        sampling = dataclasses.replace(sampling, bias_ids=None, bias_values=None)  # one program for all requests
        read = done.hidden, done.tokens, done.rows
        args = self.params, self.config, self._pages, read, chosen, sampling, self._flat, self._vocab_size
        drafted = yield Call(_draft, args, self._fixed)
        self._slots, self._pages = drafted.slots, drafted.pages
        return drafted

    def compile_ahead(self, steps: Callable[[], Iterable[tuple[Reading, int, Choice | SamplingParams]]]) -> None:
        """Compiles side by side what steps will call: for one program a compiler uses little of a host.

        Each program is lowered with what those before it in its step give: they are run for that.
        """
        programs = [_read, _choose, _likeliest, *([_draft] if self.sizes.drafts else []), _step]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # each takes a compiler's memory too
            for program in programs:
                compiling = {}
                for reading, most, choice in steps():
                    call = _run_up_to(program, *self._calls(reading, most, choice))
                    if call is not None and call.signature not in compiling:
                        compiling[call.signature] = pool.submit(call.lowered().compile)
                for one in compiling.values():
                    one.result()

    def _calls(self, reading: Reading, most: int, choice: Choice | SamplingParams) -> list[Calls[Any]]:
        if isinstance(choice, SamplingParams):
            return [self._step(reading, most, choice)]
        return [self._read(reading, most), self._choose(choice)]

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
        return sum(f._cache_size() for f in (_read, _choose, _draft, _likeliest, _step))  # pyright: ignore[reportAttributeAccessIssue]


def _spread(make: Callable[[Any], Any], of: Any, by_heads: bool = False) -> Any:
    """`make(of)` over the mesh in force, where each device makes its part: some heads, third axis, or all."""
    mesh = jax.sharding.get_mesh()
    cut = by_heads and mesh.shape.get("tensor", 1) > 1
    spec = PartitionSpec(None, None, "tensor") if cut else PartitionSpec()
    return jax.jit(make, out_shardings=None if mesh.empty else NamedSharding(mesh, spec))(of)
