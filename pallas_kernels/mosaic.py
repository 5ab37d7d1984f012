"""What the Pallas kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import Chip

# What a kernel may ask of its core's VMEM; the compiler needs the rest for itself.
VMEM_SHARE = 0.9


def varying_alike(*arrays: Any) -> tuple[jax.Array, ...]:
    """The arrays, each varying over every mesh axis that one of them varies over.

    Inside a checked `shard_map` a kernel takes only inputs that vary alike; outside one this does nothing.
    """
    axes = frozenset().union(*(_varying(x) for x in arrays))
    return tuple(jax.lax.pcast(x, tuple(axes - _varying(x)), to="varying") if axes - _varying(x) else x for x in arrays)


def tree_varying_alike(tree: Any) -> Any:
    """`varying_alike` of the leaves. Before a `custom_vjp` it lets JAX sum the gradients of what did not vary."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(varying_alike(*leaves))


def kernel_output(shape: Sequence[int], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """A kernel's result, varying over the mesh axes that `like`, one of its inputs, varies over."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


# `//`, `%` and `pl.cdiv` of traced numbers take their sign into account, and Mosaic lowers that by asking which TPU
# there is: without a mesh in force, exporting a program for TPUs would fail. Kernels and index maps use these, x >= 0.


def divide(x: Any, by: int) -> jax.Array:
    return jax.lax.div(jnp.int32(x), jnp.int32(by))


def divide_up(x: Any, by: int) -> jax.Array:
    return divide(x + (by - 1), by)


def remainder(x: Any, by: int) -> jax.Array:
    return jax.lax.rem(jnp.int32(x), jnp.int32(by))


def tpu_params(chip: Chip, *dimension_semantics: str, **others: Any) -> pltpu.CompilerParams:
    """Compiler parameters of a kernel that may fill the VMEM of `chip`."""
    limit = int(VMEM_SHARE * chip.on_chip_bytes)
    return pltpu.CompilerParams(dimension_semantics=dimension_semantics, vmem_limit_bytes=limit, **others)


def _varying(x: Any) -> frozenset[Any]:
    return jax.typeof(x).manual_axis_type.varying
