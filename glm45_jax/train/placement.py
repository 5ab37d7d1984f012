"""Where a run's arrays lie: the mesh, the state's and the batches' shardings.

Axes: B batch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from glm45_jax.errors import UserError
from glm45_jax.model import param_shardings
from glm45_jax.parallel.local import BATCH_AXES
from glm45_jax.train.config import TrainConfig
from glm45_jax.train.step import TrainState, init_state


def run_mesh(config: TrainConfig) -> Mesh | None:
    """The mesh of a run; None where one device does it all.

    Raises:
      UserError: the mesh does not fit the devices, or does not divide the batch or the model.
    """
    mesh = config.mesh.make()
    parts = _batch_parts(mesh)
    rows = config.batch_size // config.accumulation
    if rows % parts:
        axes = " x ".join(f"{name}={mesh.shape[name]}" for name in BATCH_AXES if mesh.shape[name] > 1)
        raise UserError(
            f"batch_size / accumulation is {config.batch_size} / {config.accumulation} = {rows} sequences, which the "
            f"mesh divides over {parts} devices ({axes}); make it a multiple of {parts}, or give devices to other axes"
        )
    if mesh.size == 1:
        return None
    param_shardings(config.model, mesh)  # tells of heads, experts and widths that it does not divide
    return mesh


def _batch_parts(mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of [B, S] arrays."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_here(batch_size: int, mesh: Mesh) -> list[int]:
    """The rows of a batch that this process's devices need, in order; several processes may need the same."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size, 1)).values()
    return sorted({row for index in indices if index is not None for row in range(batch_size)[index[0]]})


def place_batch(batch: Mapping[str, np.ndarray], rows: list[int], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """[B, S] arrays over the mesh, from this process's `rows` of them."""
    at = {row: i for i, row in enumerate(rows)}
    sharding = batch_sharding(mesh)

    def place(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return local[[at[row] for row in range(batch_size)[index[0]]], *index[1:]]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return {name: place(local) for name, local in batch.items()}


def state_shardings(config: TrainConfig, mesh: Mesh | None) -> TrainState:
    """The sharding of every array of a run's state: whatever belongs to a parameter lies where that parameter lies."""
    shapes = jax.eval_shape(lambda: init_state(config))
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    params = param_shardings(config.model, mesh)
    by_path = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    like = dict(jax.tree_util.tree_flatten_with_path(shapes.params)[0])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> Sharding:
        """An optimizer keeps trees like the parameters': the end of a leaf's path is then a parameter's path."""
        ends = (path[start:] for start in range(len(path)))
        param = next((end for end in ends if end in by_path and like[end].shape == leaf.shape), None)
        return everywhere if param is None else by_path[param]

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def abstract_state(config: TrainConfig, mesh: Mesh | None) -> TrainState:
    """Shapes, dtypes and shardings of a run's state, nothing computed."""
    shapes = jax.eval_shape(lambda: init_state(config))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh),
    )


def constrained(state: TrainState, config: TrainConfig, mesh: Mesh | None) -> TrainState:
    """Inside a compiled function: the state where `state_shardings` says."""
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, state_shardings(config, mesh))
