"""Functions of whole batches, run by `jax.shard_map` over the mesh in force.

Parameters lie as `specs_of` says. Of a batch [B, S] each device has some rows (over the batch axes) and of each row
a piece (over `context` and `tensor`); rows and tokens are padded until all devices have as many. Over a context axis
the tokens of a row are reordered so that all devices have the same work in causal attention (`attention.cut_order`).

Axes: B rows, S tokens of a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.model.attention import cut_order
from glm45_jax.model.params import Params, specs_of
from glm45_jax.parallel.local import BATCH_AXES, SEQUENCE_AXES
from glm45_jax.parallel.mesh import AXES
from glm45_jax.parallel.sharding import GATHERED, as_axes, rules_of


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch [B, S] lies on a mesh."""

    mesh: AbstractMesh
    shape: tuple[int, int]
    batch_axes: tuple[str, ...]

    @property
    def sequence_axes(self) -> tuple[str, ...]:
        return _long(SEQUENCE_AXES, self.mesh)

    def spec(self, lead: int = 0) -> PartitionSpec:
        """Of an array [lead axes…, B, S, …]."""
        return PartitionSpec(*[None] * lead, self.batch_axes or None, self.sequence_axes or None)

    def arrange(self, x: jax.Array) -> jax.Array:
        """[B, S, …] as it lies on the devices; what is added is zero, which is padding to segments."""
        grow = [(0, want - have) for want, have in zip(self._padded, x.shape)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, grow) if any(map(sum, grow)) else x
        return x if self._pieces == 1 else jnp.take(x, cut_order(self._pieces, x.shape[1])[0], axis=1)

    def arrange_all(self, tree: Any) -> Any:
        return jax.tree.map(self.arrange, tree)

    def check_batch(self, accumulation: int = 1) -> None:
        """Raises UserError unless every device has as many rows in each of `accumulation` micro-batches."""
        devices = math.prod(self.mesh.shape[name] for name in self.batch_axes)
        if self.shape[0] % (devices * accumulation):
            raise UserError(
                f"a batch of {self.shape[0]} rows in {accumulation} micro-batches cannot be divided over the mesh axes "
                f"{self.batch_axes} of {devices} devices: take a multiple of {devices * accumulation}"
            )

    def restore(self, x: jax.Array, lead: int) -> jax.Array:
        """The reverse of `arrange`, of an array [lead axes…, B, S, …]."""
        if self._pieces > 1:
            x = jnp.take(x, cut_order(self._pieces, x.shape[lead + 1])[1], axis=lead + 1)
        rows, tokens = self.shape
        return x if x.shape[lead : lead + 2] == self.shape else x[(slice(None),) * lead + (slice(rows), slice(tokens))]

    @property
    def _pieces(self) -> int:
        return self.mesh.shape.get("context", 1)

    @property
    def _padded(self) -> tuple[int, int]:
        rows = math.prod(self.mesh.shape[name] for name in self.batch_axes)
        # two pieces on each device of a context axis
        tokens = math.prod(self.mesh.shape[name] for name in self.sequence_axes) * (1 + (self._pieces > 1))
        return tuple(-(-have // unit) * unit for have, unit in zip(self.shape, (rows, tokens)))  # pyright: ignore


def _long(names: tuple[str, ...], mesh: AbstractMesh) -> tuple[str, ...]:
    """Those of `names` along which the mesh has several devices."""
    return tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def mesh_in_force() -> AbstractMesh | None:
    """The mesh over which work can be spread; None without one, with one device, or inside a `shard_map` already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return None
    return mesh if any(mesh.shape.get(name, 1) > 1 for name in AXES) else None


def layout_of(shape: tuple[int, ...]) -> Layout | None:
    """How a batch of this shape lies on the mesh in force; None where there is nothing to spread over."""
    mesh = mesh_in_force()
    return None if mesh is None else Layout(mesh, (shape[0], shape[1]), _long(BATCH_AXES, mesh))


def over_mesh(run: Callable[..., Any], config: ModelConfig, params: Params, arrays: Any, leads: Any) -> Any:
    """`run(params, *arrays)`, by every device with its part where a mesh is in force.

    Args:
      arrays: a tuple of trees of arrays [B, S, …].
      leads: like the result, or a part of it: how many axes stand before B and S; None for what all devices sum up.
    """
    layout = layout_of(jax.tree.leaves(arrays)[0].shape)
    if layout is None:
        return run(params, *arrays)
    arrays = jax.tree.map(layout.arrange, arrays)
    specs = (specs_of(params, config, layout.mesh), *jax.tree.map(lambda _: layout.spec(), arrays))
    is_none = lambda x: x is None  # noqa: E731
    out_specs = jax.tree.map(lambda n: PartitionSpec() if n is None else layout.spec(n), leads, is_leaf=is_none)
    out = shard_map(run, specs, out_specs)(params, *arrays)
    leads = jax.tree.map(
        lambda n, part: jax.tree.map(lambda _: -1 if n is None else n, part), leads, out, is_leaf=is_none
    )
    return jax.tree.map(lambda x, n: x if n < 0 else layout.restore(x, n), out, leads)


def over_serving_mesh(
    run: Callable[..., Any], config: ModelConfig, params: Params, kv: Any, rows: Any, by_row: Any
) -> Any:
    """`run(params, kv, rows, by_row)` of decoding: logits and cache, by every device with its rows and heads.

    The batch is cut over as many of the batch axes as divide it, the cache [L, B, K, T, h] and the vocabulary also over
    `tensor`.

    Args:
      rows: a tree of arrays [B, S] of new tokens, cut over the sequence axes too.
      by_row: a tree of arrays [B, …].

    Raises:
      UserError: devices without rows of their own would have to gather weights, which the rules cut over them.
    """
    mesh = mesh_in_force()
    if mesh is None:
        return run(params, kv, rows, by_row)
    batch = jax.tree.leaves(by_row)[0].shape[0]
    lengths = [x.shape[1] for x in jax.tree.leaves(rows)]
    layout = Layout(mesh, (batch, lengths[0] if lengths else 1), _dividing(batch, mesh))
    _check_gathered(config, layout)
    over_batch = layout.batch_axes or None
    heads = "tensor" if mesh.shape.get("tensor", 1) > 1 else None
    like = lambda tree, spec: jax.tree.map(lambda _: spec, tree)  # noqa: E731
    kv_specs = like(kv, PartitionSpec(None, over_batch, heads))
    specs = specs_of(params, config, mesh), kv_specs, like(rows, layout.spec()), like(by_row, PartitionSpec(over_batch))
    out_specs = PartitionSpec(over_batch, heads), kv_specs
    return shard_map(run, specs, out_specs)(params, kv, jax.tree.map(layout.arrange, rows), by_row)


def _dividing(batch: int, mesh: AbstractMesh) -> tuple[str, ...]:
    """Batch axes of which each divides what those before leave of the batch."""
    axes = []
    for name in _long(BATCH_AXES, mesh):
        if batch % mesh.shape[name] == 0:
            axes.append(name)
            batch //= mesh.shape[name]
    return tuple(axes)


def _check_gathered(config: ModelConfig, layout: Layout) -> None:
    rules = rules_of(config)
    stored = {name for logical in GATHERED if logical != "vocab" for name in as_axes(rules[logical])}
    idle = sorted(stored.intersection(_long(AXES, layout.mesh)) - {*layout.batch_axes})
    if idle:
        raise UserError(
            f"decoding {layout.shape[0]} rows: weights are cut over the mesh axes {idle}, which have no rows of their "
            "own and would all gather them: take a batch that those axes divide, or parallel.SERVING_RULES"
        )


def shard_map(run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over the mesh in force, whose arguments may lie in any other way."""
    mesh = jax.sharding.get_abstract_mesh()
    spread = jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=True)
    if AxisType.Explicit not in mesh.axis_types:
        return spread

    def resharded(*args: Any) -> Any:
        put = lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec))  # noqa: E731
        return spread(*jax.tree.map(put, args, in_specs))

    return resharded
