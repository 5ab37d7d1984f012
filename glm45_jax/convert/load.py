"""`load_checkpoint`: params from a Hugging Face directory or one of our own, read straight into their sharding."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from glm45_jax.config import ModelConfig
from glm45_jax.convert import dtypes, files, names, store
from glm45_jax.convert.hf_source import Source, open_source
from glm45_jax.convert.pieces import AnyLeaf, Index, whole
from glm45_jax.convert.quantising import QuantizedLeaf, quantised_leaves, read
from glm45_jax.errors import UserError
from glm45_jax.model import Quantized, param_shardings
from glm45_jax.model.params import scales_too

_THREADS = max(4, min(16, os.cpu_count() or 1))


def load_checkpoint(
    path: str | os.PathLike,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, Any] | None = None,
    *,
    quantize: str | None = None,
    quantize_head: bool = False,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a checkpoint: an HF directory (read directly, nothing is converted on disk) or our own.

    Args:
      path: the directory, or one weights file with its config.json beside it.
      dtype: casts every array to it (the router's selection bias stays float32) and becomes the config's `dtype` and
        `param_dtype`; None keeps the stored dtypes. FP8 matrices become bfloat16 first, but for those of `quantize`.
      mesh: arrays are made sharded over it, each process reading only the bytes of its own devices.
      rules: changes to the table of rules from logical to mesh axes, `glm45_jax.parallel.RULES`.
      quantize: for inference: "keep" leaves the matrices of an FP8 checkpoint as they lie; a form of
        `model.quantize_params` quantises while reading, a matrix at a time, and of "fp8" keeps what is FP8 already.
      quantize_head: the output heads too.

    Returns:
      (config, params).

    Raises:
      UserError: everything that is wrong with the checkpoint, or with the mesh, in one.
    """
    opened = open_checkpoint(path)
    config, leaves = opened.config, opened.dequantised()
    quantised = {}
    if quantize is not None:
        quantised = quantised_leaves(opened.leaves, leaves, opened.quantised, quantize, quantize_head)
    target = None
    if dtype is not None:
        name = _dtype_name(dtype)
        config, target = config.replace(dtype=name, param_dtype=name), dtypes.named(name)
    shardings = {} if mesh is None else names.flatten(param_shardings(config, mesh, rules))
    params: dict[str, Any] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for leaf_path, leaf in leaves.items():
            if leaf_path in quantised:
                params[leaf_path] = _load_quantised(leaf_path, quantised[leaf_path], shardings.get(leaf_path), pool)
                continue
            to = leaf.dtype if target is None or leaf_path.endswith("router.bias") else target
            params[leaf_path] = _load(leaf, to, shardings.get(leaf_path), pool)
    return config, names.unflatten(params)


def open_checkpoint(path: str | os.PathLike) -> Source | store.Store:
    """The config and every array of the params tree, checked, nothing read yet."""
    path = Path(path)
    if path.is_dir() and store.is_store(path):
        return store.open_store(path)
    partial = path.with_name(path.name + ".partial")
    if not path.exists() and partial.exists():
        raise UserError(f"{path}: its conversion was interrupted; the same command goes on with it")
    if path.is_dir() and (path / files.PARAMS).exists():
        raise UserError(f"{path}: not whole, {files.MANIFEST} is missing; convert or copy it again")
    return open_source(path)


def _dtype_name(dtype: Any) -> Any:
    try:
        name = np.dtype(dtypes.named(dtype) if isinstance(dtype, str) else dtype).name
    except TypeError:
        name = str(dtype)
    if name not in dtypes.FLOATS:
        raise UserError(f"dtype {name!r}: choose one of {', '.join(dtypes.FLOATS)}, or None for what is stored")
    return name


def _load(leaf: AnyLeaf, dtype: np.dtype, sharding: Any, pool: Executor) -> jax.Array:
    """One array on its devices."""
    if sharding is None:
        return jax.device_put(leaf.read(out=_aligned(leaf.shape, dtype), pool=pool))
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices that hold copies of a slice share one read

    def values(index: Index | None) -> np.ndarray:
        assert index is not None
        parts = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape))
        key = tuple((part.start, part.stop) for part in parts)
        if key not in read:
            shape = tuple(part.stop - part.start for part in parts)
            read[key] = leaf.read(parts, out=_aligned(shape, dtype), pool=pool)
        return read[key]

    return jax.make_array_from_callback(leaf.shape, sharding, values, dtype=dtype)


def _load_quantised(path: str, leaf: QuantizedLeaf, sharding: Any, pool: Executor) -> Quantized:
    """One matrix, or stack of them; devices that hold copies of a part share one reading."""
    if sharding is None:
        return Quantized(*map(jax.device_put, read(leaf, whole(leaf.shape), pool)))
    blocks = [-(-size // b) for size, b in zip(leaf.shape[-2:], leaf.block)]
    each: Any = leaf.shape, (*leaf.shape[:-2], *blocks[::-1])
    shapes = Quantized(*map(jax.ShapeDtypeStruct, each, (leaf.dtype, np.float32)))  # pyright: ignore[reportArgumentType]
    specs = scales_too({path: shapes}, {path: sharding.spec}, sharding.mesh)[path]
    parts: dict[tuple[tuple[int, int], ...], tuple[np.ndarray, np.ndarray]] = {}

    def part(index: Index) -> tuple[np.ndarray, np.ndarray]:
        parted = tuple(slice(*p.indices(size)[:2]) for p, size in zip(index, leaf.shape))
        key = tuple((p.start, p.stop) for p in parted)
        if key not in parts:
            parts[key] = read(leaf, parted, pool)
        return parts[key]

    where = sharding.addressable_devices_indices_map(leaf.shape)
    arrays = []
    for which, spec in enumerate((specs.values, specs.scales)):
        shape = (shapes.values, shapes.scales)[which]
        held = [jax.device_put(part(index)[which], device) for device, index in where.items()]
        placed = NamedSharding(sharding.mesh, spec)
        arrays.append(jax.make_array_from_single_device_arrays(shape.shape, placed, held))
    return Quantized(*arrays)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes: the CPU backend takes it over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)
