"""Params in memory as leaves to be written: brought to the host one layer of one array at a time, sharded or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from glm45_jax.config import ModelConfig
from glm45_jax.convert import dtypes, names
from glm45_jax.convert.pieces import Index
from glm45_jax.errors import UserError
from glm45_jax.model.quantized import refuse_quantized


class _Host:
    """The one layer of one array that is on the host now."""

    key: tuple[int, int | None] | None = None
    values: np.ndarray


@dataclasses.dataclass
class MemoryLeaf:
    """An array of the params tree; `host` is shared by all leaves of the tree, so that they hold one layer together."""

    array: Any
    stacked: bool
    host: _Host

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def read(self, index: Index) -> np.ndarray:
        if not self.stacked:
            return np.ascontiguousarray(self._on_host(None)[index])
        layers = [self._on_host(i)[index[1:]] for i in range(index[0].start, index[0].stop)]
        return layers[0][None] if len(layers) == 1 else np.stack(layers)

    def _on_host(self, layer: int | None) -> np.ndarray:
        if self.host.key != (id(self), layer):
            self.host.key = None
            self.host.values = to_host(self.array, layer)
            self.host.key = (id(self), layer)
        return self.host.values


def to_host(array: Any, layer: int | None) -> np.ndarray:
    """`array`, or its layer `layer`, in host memory. Every process must call this for an array that spans processes."""
    if not isinstance(array, jax.Array):
        return np.asarray(array) if layer is None else np.asarray(array[layer])
    if array.is_fully_addressable and {d.platform for d in array.devices()} == {"cpu"} and len(array.devices()) == 1:
        view = np.asarray(array)  # no copy
        return view if layer is None else view[layer]
    part = array if layer is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    if part.is_fully_addressable:
        return np.asarray(part)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


def memory_leaves(params: dict[str, Any], config: ModelConfig) -> dict[str, MemoryLeaf]:
    """{path: leaf} of a params tree, checked against the config.

    Raises:
      UserError: an array is missing, unexpected, or of another shape or dtype than this model has.
    """
    refuse_quantized(params, "writing a checkpoint")
    flat: dict[str, Any] = names.flatten(params)
    expected = {path: leaf.shape for path, leaf in names.flat_shapes(config).items()}
    problems = names.difference({path: tuple(array.shape) for path, array in flat.items()}, expected)
    for path, array in flat.items():
        if np.dtype(array.dtype) not in (dtypes.F32, dtypes.BF16, dtypes.F16):
            problems.append(f"{path} is {array.dtype}, float32, bfloat16 or float16 is expected")
    if problems:
        raise UserError("params don't belong to this config: " + "; ".join(problems))
    stacked = ("dense_layers.", "moe_layers.")
    host = _Host()
    return {path: MemoryLeaf(flat[path], path.startswith(stacked), host) for path in expected}


def takes_part_only(jobs: Sequence[Any]) -> bool:
    """In every process but the first: takes part in gathering what `jobs` read, and says so. The first writes."""
    if jax.process_index() == 0:
        return False
    for job in jobs:
        job.read()
    return True
