"""Digests of arrays, equal for equal values however they are divided over devices and processes.

Each element's bits are mixed with its place in the whole array, and the mixed words are added up modulo 2^32, in any
order: devices add their parts, nothing is gathered, and any change of one element changes the sum. Computed where the
array lies, at the speed of its memory; by numpy what one CPU device holds, since nothing has to be compiled then.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.sharding import NamedSharding, PartitionSpec

_GOLDEN = 0x9E3779B1
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def array_digests(tree: Any) -> dict[str, str]:
    """`jax.tree_util.keystr` of every array -> 16 hexadecimal digits. All processes of sharded arrays must call it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = jax.device_get([_sums(leaf) for _, leaf in leaves])
    return {jax.tree_util.keystr(path): f"{int(a):08x}{int(b):08x}" for (path, _), (a, b) in zip(leaves, sums)}


def params_digest(params: Mapping[str, Any]) -> str:
    """One number for all parameters, by xxh3 of each array's digest: equal for equal values under equal names."""
    digest = xxhash.xxh3_64()
    arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    for path, value in sorted(array_digests(params).items()):
        digest.update(f"{path} {arrays[path].dtype} {arrays[path].shape} {value}\0".encode())
    return f"xxh3:{digest.hexdigest()}"


def _sums(x: Any) -> tuple[Any, Any]:
    """Two independent sums of 32 bits."""
    if not isinstance(x, jax.Array) or (len(x.devices()) == 1 and x.devices().pop().platform == "cpu"):
        with np.errstate(over="ignore"):  # wrapping around is meant, and numpy warns of it in scalars
            first, second = (np.sum(word, dtype=np.uint32) for word in _words(np.asarray(x), np))
        return first, second
    # One program for each shape rather than one for a tree, which would take several times longer to compile.
    return _sums_on_devices(x, x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None)


@functools.partial(jax.jit, static_argnames="mesh")
def _sums_on_devices(x: jax.Array, mesh: Any) -> tuple[jax.Array, jax.Array]:
    # One reduction for both sums: XLA reads the array once, and is several times quicker to compile on CPU.
    zeros = jnp.uint32(0), jnp.uint32(0)
    sums = jax.lax.reduce(_words(x, jnp), zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim)))
    # On every device: each process reads it from its own.
    return sums if mesh is None else jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, PartitionSpec()))


def _words(x: Any, xp: Any) -> tuple[Any, Any]:
    """Two words for each element, of its bits and its place."""
    unsigned = _UNSIGNED[x.dtype.itemsize]
    bits = x.astype(np.uint8) if x.dtype == np.bool_ else x.view(unsigned)
    place = xp.zeros((1,) * x.ndim, np.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        # The first axis counts twice, since numbers of elements wrap around in arrays of more than 2^32.
        step = np.uint32((stride + (_GOLDEN if axis == 0 else 0)) % 2**32)
        along = (xp.arange(x.shape[axis], dtype=np.uint32) * step).reshape(-1, *(1,) * (x.ndim - 1 - axis))
        place = place + along
        stride *= x.shape[axis]
    first = _mixed(_mixed(place) ^ bits.astype(np.uint32))
    return first, _mixed(first + np.uint32(_GOLDEN))


def _mixed(x: Any) -> Any:
    """MurmurHash3's finalizer, a bijection of 32-bit words."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))
