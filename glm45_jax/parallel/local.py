"""What a device does beside its own work inside `jax.shard_map`: collectives over mesh axes by name.

Every function takes mesh axes that the mesh in force may lack, have at size 1, or not have under a `shard_map`: over
those nothing happens, so that the model's code is one for one device and for many. JAX's types say over which axes a
value varies (`check_vma=True`); they, not flags, tell a sum of parts from a value that all devices share, and turn
each collective into its transpose in the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Int

from glm45_jax.parallel.mesh import AXES

Names = str | tuple[str, ...]

BATCH_AXES = ("data", "pipeline", "fsdp", "expert")  # cut the batch
SEQUENCE_AXES = ("context", "tensor")  # cut the sequence between the layers' products
_LANES = 128  # of a TPU's tile


def live(names: Names = AXES) -> tuple[str, ...]:
    """Those of `names` over which this code runs on several devices, by `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    names = (names,) if isinstance(names, str) else names
    if mesh.empty:
        return ()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    return tuple(name for name in names if kinds.get(name) == AxisType.Manual and mesh.shape[name] > 1)


def count(names: Names) -> int:
    """How many devices there are along `names`."""
    return math.prod(jax.lax.axis_size(name) for name in live(names))


def index(names: Names) -> Int[Array, ""]:
    """This device's number along `names`, the first of them slowest."""
    axes = live(names)
    return jax.lax.axis_index(axes) if axes else jnp.int32(0)


def varying(x: Any) -> frozenset[str]:
    """The mesh axes over which `x` differs from device to device."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def varying_over(x: Any, names: Names) -> tuple[str, ...]:
    """Those of `names` over which `x` differs."""
    return tuple(name for name in live(names) if name in varying(x))


def spread(tree: Any, names: Names) -> Any:
    """`tree`, taken to vary over all of `names`: gradients of what follows are then not summed over them."""

    def cast(x: Array) -> Array:
        missing = tuple(name for name in live(names) if name not in varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def spread_like(tree: Any, *like: Any) -> Any:
    """`tree`, taken to vary over every axis that one of `like` varies over."""
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(like)))
    return spread(tree, tuple(sorted(axes)))


def gather(x: Array, names: Names, axis: int) -> Array:
    """The devices' pieces along `names`, one behind the other on `axis`; `x` itself over names it is the same on."""
    axes = varying_over(x, names)
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def gather_stored(x: Array, names: Names, axis: int) -> Array:
    """`gather` of a weight, axis by axis, in a form that XLA for TPU takes as it is meant.

    Pieces lie one behind the other on a leading axis that no tile crosses, and are put side by side here. In any other
    form, or over more than two dimensions of the torus at once, the gradient's scattered sum becomes an all-reduce, and
    a gather of narrow pieces a sum of padded arrays: twice the bytes.
    """
    for name in reversed(varying_over(x, names)):
        rows = x.reshape(-1, _LANES) if x.size % _LANES == 0 else x.reshape(1, -1)
        pieces = jnp.moveaxis(jax.lax.all_gather(rows, name).reshape(-1, *x.shape), 0, axis)
        x = pieces.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return x


def total(x: Any, names: Names = AXES) -> Any:
    """The sum over the devices along `names` on which the leaves differ."""

    def one(x: Array) -> Array:
        axes = varying_over(x, names)
        return jax.lax.psum(x, axes) if axes else x

    return jax.tree.map(one, x)


def scatter_total(x: Array, names: Names, axis: int) -> Array:
    """The sum over the devices along `names`, of which each gets its piece of `axis`."""
    axes = varying_over(x, names)
    return jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True) if axes else x


def own_piece(x: Array, names: Names, axis: int) -> Array:
    """This device's piece of what all hold: the reverse of `gather`."""
    parts = count(names)
    if parts == 1:
        return x
    size = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(x, index(names) * size, size, axis)
