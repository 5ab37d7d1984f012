"""The programs that plans compile: the very train, prefill and decode steps, with shapes and shardings for arguments.

What steers kernels in them and is no data (segments, the cache's lengths) is given beside the shapes as it would be:
rows that are one segment, caches that are full.

Axes: B batch, S sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.infer.calibrate import cache_dtype_of
from glm45_jax.infer.sampling import sampling_params
from glm45_jax.infer.steps import Reading, Slots, choose, read
from glm45_jax.model import (
    abstract_params,
    init_cache,
    init_pages,
    param_shardings,
    prefill,
    quantize_params,
    shardings_of,
)
from glm45_jax.model.decode import decode_step
from glm45_jax.parallel.local import BATCH_AXES
from glm45_jax.train.config import TrainConfig
from glm45_jax.train.step import init_state, train_step

NO_VALUE = "no value"  # a leaf, as None would not be


@dataclasses.dataclass(frozen=True)
class Program:
    """A step to compile.

    Attributes:
      fn: of `args`.
      args: shapes with their shardings.
      donate: arguments whose memory the results take over.
      steering: a tree like `args`, arrays where values steer kernels, `NO_VALUE` elsewhere.
      parts: name of a group of arguments ("parameters", "optimizer", "cache", "batch") -> its shapes.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donate: tuple[int, ...]
    steering: tuple[Any, ...]
    parts: dict[str, Any]

    def trace(self) -> Any:
        """Traced for the mesh in force."""
        return jax.jit(self.fn, donate_argnums=self.donate).trace(*self.args)


def train_program(config: TrainConfig, mesh: Mesh) -> Program:
    """`train_step`: parameters by the model's rules, optimizer state as its parameter, the batch over batch axes."""
    shape = (config.batch_size, config.seq_len)
    _check_batch(config.batch_size // config.accumulation, mesh)
    state = jax.eval_shape(lambda: init_state(config))
    shardings = state_shardings(state, param_shardings(config.model, mesh), mesh)
    state = jax.tree.map(_placed, state, shardings)
    rows = _batch_sharding(mesh)
    names = ("tokens", "segment_ids", "positions", "loss_mask")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name in names}
    known = {"segment_ids": np.ones(shape, np.int32), "loss_mask": np.ones(shape, np.int32)}
    known["positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Program(
        lambda state, batch: train_step(state, batch, config),
        (state, batch),
        (0,),
        (_nothing(state), {name: known.get(name, NO_VALUE) for name in names}),
        {"parameters": state.params, "optimizer": state.opt_state, "batch": batch},
    )


def state_shardings(state: Any, of_params: Any, mesh: Mesh) -> Any:
    """Of a train state: a leaf of the optimizer that belongs to a parameter lies as it does, all else everywhere.

    An optimizer's trees hold the parameters' paths at their leaves' ends.
    """
    flat = jax.tree_util.tree_flatten_with_path(of_params)[0]
    by_path = {tuple(map(str, path)): sharding for path, sharding in flat}
    shapes = {tuple(map(str, p)): x.shape for p, x in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = tuple(map(str, path))
        for start in range(len(names)):
            end = names[start:]
            if end in by_path and shapes[end] == leaf.shape:
                return by_path[end]
        return everywhere

    return jax.tree_util.tree_map_with_path(sharding, state)


def prefill_program(config: ModelConfig, mesh: Mesh, batch_size: int, seq_len: int) -> Program:
    """`prefill` of `batch_size` prompts of `seq_len` tokens into an empty cache of as many slots."""
    params, cache, rows = _serving(config, mesh, batch_size, seq_len)
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32, sharding=rows)

    def step(params: Any, cache: Any, tokens: Any) -> Any:
        return prefill(params, config, cache, tokens)

    args = (params, cache, tokens)
    return Program(step, args, (1,), _nothing(args), {"parameters": params, "cache": cache, "batch": tokens})


def decode_program(
    config: ModelConfig, mesh: Mesh, batch_size: int, seq_len: int, weights: str | None = None
) -> Program:
    """`decode_step` of `batch_size` rows whose caches hold `seq_len` - 1 tokens of `seq_len` slots."""
    params, cache, rows = _serving(config, mesh, batch_size, seq_len, weights)
    tokens = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows)

    def step(params: Any, cache: Any, tokens: Any) -> Any:
        return decode_step(params, config, cache, tokens)

    args = (params, cache, tokens)
    full = np.full(batch_size, seq_len - 1, np.int32)
    steering = dataclasses.replace(
        _nothing(cache), segment_ids=np.ones((batch_size, seq_len), np.int32), length=full, position=full,
        segment=np.ones(batch_size, np.int32),
    )  # fmt: skip
    parts = {"parameters": params, "cache": cache, "batch": tokens}
    return Program(step, args, (1,), (_nothing(params), steering, NO_VALUE), parts)


@dataclasses.dataclass(frozen=True)
class Storage:
    """In what decoding keeps weights and cache.

    Attributes:
      weights: a form of `quantize_params`; None: as the model computes.
      cache: "int8" or "fp8"; None: as the model computes.
      page_size: tokens of a page.
    """

    weights: str | None = None
    cache: str | None = None
    page_size: int = 64

    @property
    def cache_dtype(self) -> str | None:
        return cache_dtype_of(self.cache)


def engine_program(config: ModelConfig, mesh: Mesh, batch_size: int, seq_len: int, storage: Storage) -> Program:
    """The engine's step where all `batch_size` sequences decode, each with `seq_len` tokens, the new one included."""
    params = serving_params(config, mesh, storage.weights)
    width = -(-seq_len // storage.page_size)
    everywhere = NamedSharding(mesh, PartitionSpec())
    heads = "tensor" if mesh.shape.get("tensor", 1) > 1 else None
    by_heads = NamedSharding(mesh, PartitionSpec(None, None, heads))
    with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        pages = jax.eval_shape(lambda: empty_pages(config, batch_size * width + 1, storage))
    pages = jax.tree.map(lambda x: _placed(x, by_heads), pages)
    rows, every = np.arange(batch_size, dtype=np.int32), np.arange(batch_size + 1, dtype=np.int32)
    nothing = np.zeros(batch_size, np.int32)
    arrays: dict[str, Any] = {
        "tokens": nothing, "from_slot": rows, "following": nothing, "starts": every,
        "lengths": np.full(batch_size, seq_len, np.int32), "drafts": nothing,
        "page_table": np.arange(batch_size * width, dtype=np.int32).reshape(batch_size, width),
        "to_slot": rows, "ahead": np.zeros(batch_size, bool), "chooses": np.ones(batch_size, bool),
        "num_rows": np.int32(batch_size),
    }  # fmt: skip
    reading = Reading(**arrays)
    sampling = sampling_params(batch_size, config.vocab_size, None, {"temperature": 0.7})
    slots = Slots(nothing[:, None], nothing)
    beside = (slots, reading, sampling, np.int32(config.vocab_size))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), beside)

    def step(params: Any, pages: Any, slots: Any, reading: Any, sampling: Any, vocab_size: Any) -> Any:
        done = read(params, config, pages, slots, reading, most=0)
        return choose(done.logits, slots, sampling, done.rows, vocab_size, None), done.pages

    steering = (_nothing(params), _nothing(pages), Slots(NO_VALUE, nothing), reading, _nothing(sampling), NO_VALUE)
    parts = {"parameters": params, "cache": pages, "batch": shapes}
    return Program(step, (params, pages, *shapes), (1,), steering, parts)


def empty_pages(config: ModelConfig, count: int, storage: Storage) -> Any:
    """With scales of one where the cache is quantised: a plan reads no values."""
    dtype = jnp.dtype(storage.cache_dtype or config.dtype)
    scales = None
    if dtype.itemsize == 1:
        of_one_layer = jax.eval_shape(lambda: init_pages(config, 1, 1)).shape
        scales = jnp.ones((of_one_layer[0], 2, of_one_layer[2]))
    return init_pages(config, count, storage.page_size, dtype, scales)


def serving_params(config: ModelConfig, mesh: Mesh, form: Any = None) -> Any:
    """Shapes and shardings of the parameters, quantised by `form`."""
    params = abstract_params(config)
    if form is not None:
        params = jax.eval_shape(lambda p: quantize_params(p, config, form), params)
    return jax.tree.map(_placed, params, shardings_of(params, config, mesh))


def _serving(
    config: ModelConfig, mesh: Mesh, batch_size: int, seq_len: int, weights: str | None = None
) -> tuple[Any, Any, NamedSharding]:
    """Parameters, an empty cache [L, B, K, T, h] by rows and kv heads, and where an array [B, ...] of rows lies."""
    params = serving_params(config, mesh, weights)
    with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        cache = jax.eval_shape(lambda: init_cache(config, batch_size, seq_len))
    over_batch = dividing(batch_size, mesh)
    heads = "tensor" if mesh.shape.get("tensor", 1) > 1 else None
    of_kv = NamedSharding(mesh, PartitionSpec(None, over_batch, heads))
    rows = NamedSharding(mesh, PartitionSpec(over_batch))
    cache = jax.tree.map(lambda x: _placed(x, of_kv if len(x.shape) == 5 else rows), cache)
    return params, cache, rows


def dividing(batch_size: int, mesh: Any) -> tuple[str, ...]:
    """The batch axes that cut a batch of serving: each must divide what those before it leave."""
    axes = []
    for name in BATCH_AXES:
        size = mesh.shape.get(name, 1)
        if size > 1 and batch_size % size == 0:
            axes.append(name)
            batch_size //= size
    return tuple(axes)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(_axes_of(mesh, BATCH_AXES)))


def _axes_of(mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(a for a in axes if a in mesh.shape)


def batch_shards(mesh: Any) -> int:
    """Over how many devices' groups the rows of a batch are divided."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES if a in mesh.shape]))


def _check_batch(rows: int, mesh: Mesh) -> None:
    if rows % batch_shards(mesh):
        raise UserError(
            f"a batch of {rows} rows does not divide over mesh axes {', '.join(BATCH_AXES)} of {batch_shards(mesh)}: "
            f"give --batch-size a multiple of {batch_shards(mesh)}, or move devices to context or tensor"
        )


def _nothing(tree: Any) -> Any:
    return jax.tree.map(lambda _: NO_VALUE, tree)


def steering_values(program: Program) -> list[Any]:
    """One for each argument of the traced program, in its order."""
    return [None if x is NO_VALUE else x for x in jax.tree.leaves(program.steering)]


def bytes_per_device(tree: Any) -> float:
    """Of shapes with shardings, on each device."""

    def nbytes(x: Any) -> float:
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        dtype = x.dtype
        size = dtype.itemsize if isinstance(dtype, np.dtype) else 8  # a random key: two words
        return float(np.prod(shape, dtype=float)) * size

    return sum(map(nbytes, jax.tree.leaves(tree)))
