"""Digests of arrays, equal for equal values however they are divided over devices and processes.

Each element's bits are mixed with its place in the whole array, and the mixed words are added up modulo 2^32, in any
order: devices add their parts, nothing is gathered, and any change of one element changes the sum. Computed where the
array lies, at the speed of its memory; by numpy what lies in the host's, where nothing has to be compiled for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.sharding import NamedSharding, PartitionSpec

from glm45_jax.train.distributed import gather, is_first

_GOLDEN = 0x9E3779B1
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def array_digests(tree: Any) -> dict[str, str]:
    """`jax.tree_util.keystr` of every array -> 16 hexadecimal digits. All processes of sharded arrays must call it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    on_host = {i: _sums_here(x) for i, (_, x) in enumerate(leaves) if _is_on_host(x)}
    everywhere = list(zip(*gather(list(on_host.values())))) if on_host else []  # of each array: every process's sums
    sums = {i: np.sum(parts, axis=0, dtype=np.uint32) for i, parts in zip(on_host, everywhere)}
    # One after another: programs with collectives that overlap can starve one another of threads.
    sums |= {i: jax.device_get(_sums_on_devices(x)) for i, (_, x) in enumerate(leaves) if i not in on_host}
    digests = ("".join(f"{half:08x}" for half in np.asarray(sums[i]).tolist()) for i in range(len(leaves)))
    return {jax.tree_util.keystr(path): digest for (path, _), digest in zip(leaves, digests)}


def params_digest(params: Mapping[str, Any]) -> str:
    """One number for all parameters, by xxh3 of each array's digest: equal for equal values under equal names."""
    digest = xxhash.xxh3_64()
    arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    for path, value in sorted(array_digests(params).items()):
        digest.update(f"{path} {arrays[path].dtype} {arrays[path].shape} {value}\0".encode())
    return f"xxh3:{digest.hexdigest()}"


def _is_on_host(x: Any) -> bool:
    return not isinstance(x, jax.Array) or {device.platform for device in x.devices()} == {"cpu"}


def _sums_here(x: Any) -> list[int]:
    """Two independent sums of 32 bits over what this process holds, of copies the first alone."""
    if isinstance(x, jax.Array):
        shards = [s for s in x.addressable_shards if s.replica_id == 0]
        parts = [(np.asarray(s.data), [part.indices(n)[0] for part, n in zip(s.index, x.shape)]) for s in shards]
    else:
        parts = [(np.asarray(x), [0] * np.ndim(x))] if is_first() else []
    sums = np.zeros(2, np.uint32)
    with np.errstate(over="ignore"):  # wrapping around is meant, and numpy warns of it in scalars
        for values, starts in parts:
            sums += [np.sum(word, dtype=np.uint32) for word in _words(values, starts, x.shape, np)]
    return sums.tolist()


def _sums_on_devices(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # One program for each shape rather than one for a tree, which would take several times longer to compile.
    return _compiled_sums(x, x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None)


@functools.partial(jax.jit, static_argnames="mesh")
def _compiled_sums(x: jax.Array, mesh: Any) -> tuple[jax.Array, jax.Array]:
    words, zeros = _words(x, [0] * x.ndim, x.shape, jnp), (jnp.uint32(0), jnp.uint32(0))
    # One reduction for both sums: XLA reads the array once, and is several times quicker to compile on CPU.
    sums = jax.lax.reduce(words, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim)))
    # On every device: each process reads it from its own.
    return sums if mesh is None else jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, PartitionSpec()))


def _words(piece: Any, starts: Sequence[int], shape: Sequence[int], xp: Any) -> tuple[Any, Any]:
    """Two words for each element, of its bits and its place; `piece` begins at `starts` in the array of `shape`."""
    unsigned = _UNSIGNED[piece.dtype.itemsize]
    bits = piece.astype(np.uint8) if piece.dtype == np.bool_ else piece.view(unsigned)
    place = xp.zeros((1,) * piece.ndim, np.uint32)
    stride = 1
    for axis in reversed(range(piece.ndim)):
        # The first axis counts twice, since numbers of elements wrap around in arrays of more than 2^32.
        step = np.uint32((stride + (_GOLDEN if axis == 0 else 0)) % 2**32)
        at = np.uint32(starts[axis] % 2**32) + xp.arange(piece.shape[axis], dtype=np.uint32)
        place = place + (at * step).reshape(-1, *(1,) * (piece.ndim - 1 - axis))
        stride *= shape[axis]
    first = _mixed(_mixed(place) ^ bits.astype(np.uint32))
    return first, _mixed(first + np.uint32(_GOLDEN))


def _mixed(x: Any) -> Any:
    """MurmurHash3's finalizer, a bijection of 32-bit words."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))
