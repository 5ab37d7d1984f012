"""What is known while a program is walked without running it, and the primitives that can be evaluated in NumPy.

A value is UNKNOWN, a NumPy array, or `Lanes`: one value for each step of a kernel's grid, so that the scalar part of
a kernel is evaluated for all of its steps at once.

Axes: n lanes (grid steps), then the value's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Any = _Unknown()


@dataclasses.dataclass(frozen=True)
class Lanes:
    """A value that differs between lanes, [n, ...]."""

    array: np.ndarray


def raw(value: Any) -> np.ndarray:
    return value.array if isinstance(value, Lanes) else value


_KNOWN = (np.ndarray, np.generic, Lanes)


def known(*values: Any) -> bool:
    return all(isinstance(v, _KNOWN) for v in values)


def _divide(a: Any, b: Any) -> Any:
    """As XLA divides: integers towards zero. By zero it must not stop: the lane may be one that is not taken."""
    if not np.issubdtype(np.result_type(a), np.integer):
        return np.divide(a, b)
    b = np.where(b == 0, np.ones_like(b), b)
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(np.result_type(a))


def _remainder(a: Any, b: Any) -> Any:
    return np.fmod(a, np.where(b == 0, np.ones_like(b), b))


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


# primitive -> function of the operands alone, elementwise
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "rem": _remainder,
    "max": np.maximum, "min": np.minimum, "neg": np.negative, "abs": np.abs, "sign": np.sign,
    "floor": np.floor, "ceil": np.ceil, "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "shift_left": np.left_shift, "shift_right_arithmetic": np.right_shift,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}  # fmt: skip
# primitives that hand their operand on
IDENTITY = {
    "copy", "copy_p", "stop_gradient", "optimization_barrier", "multiple_of", "pvary", "pcast", "add_dependency",
}  # fmt: skip


def _select(which: Any, *cases: Any) -> Any:
    if which.dtype == np.bool_:
        return np.where(which, cases[1], cases[0])
    return np.choose(which, cases, mode="clip")


def _shaped(x: np.ndarray, lanes: bool, shape: Sequence[int]) -> np.ndarray:
    return x.reshape((x.shape[0], *shape) if lanes else tuple(shape))


def _broadcast(x: np.ndarray, lanes: bool, shape: Sequence[int], dimensions: Sequence[int]) -> np.ndarray:
    lead = x.shape[:1] if lanes else ()
    own = x.shape[len(lead) :]
    placed = [1] * len(shape)
    for size, d in zip(own, dimensions):
        placed[d] = size
    return np.broadcast_to(x.reshape((*lead, *placed)), (*lead, *shape))


_REDUCTIONS = {
    "reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min, "reduce_or": np.any, "reduce_and": np.all,
}  # fmt: skip


def evaluate(name: str, params: dict[str, Any], args: Sequence[Any], shape: Sequence[int]) -> Any:
    """One result of the primitive `name` on known operands; None where it isn't among those done here.

    Args:
      shape: that of the result, without lanes.
    """
    if name in IDENTITY:
        return args[0]
    lanes = any(isinstance(a, Lanes) for a in args)
    if name in ELEMENTWISE and not lanes:
        return np.asarray(ELEMENTWISE[name](*args))
    arrays = [raw(a) for a in args]
    if name in ELEMENTWISE or name == "select_n":
        if lanes and shape:  # a scalar of a lane stands before the lane's own axes
            arrays = [_lane_scalar(a, len(shape)) if isinstance(v, Lanes) else a for v, a in zip(args, arrays)]
        out = _select(*arrays) if name == "select_n" else ELEMENTWISE[name](*arrays)
    elif name == "convert_element_type":
        out = arrays[0].astype(params["new_dtype"])
    elif name in ("reshape", "squeeze", "expand_dims"):
        out = _shaped(arrays[0], lanes, shape)
    elif name == "broadcast_in_dim":
        out = _broadcast(arrays[0], lanes, shape, params["broadcast_dimensions"])
    elif name in _REDUCTIONS:
        axes = tuple(a + lanes for a in params["axes"])
        out = _REDUCTIONS[name](arrays[0], axis=axes).astype(arrays[0].dtype)
    elif name == "integer_pow":
        out = arrays[0] ** params["y"]
    else:
        out = None if lanes else _rearranged(name, params, arrays, shape)
        if out is None:
            return None
    return Lanes(np.asarray(out)) if lanes else np.asarray(out)


def _rearranged(name: str, params: dict[str, Any], arrays: Sequence[np.ndarray], shape: Sequence[int]) -> Any:
    if name == "iota":
        d = params["dimension"]
        return _broadcast(np.arange(shape[d], dtype=params["dtype"]), False, shape, (d,))
    if name == "concatenate":
        return np.concatenate(arrays, axis=params["dimension"])
    if name == "slice":
        steps = params["strides"] or (1,) * len(shape)
        return arrays[0][tuple(map(slice, params["start_indices"], params["limit_indices"], steps))]
    if name == "transpose":
        return np.transpose(arrays[0], params["permutation"])
    return None


def _lane_scalar(x: np.ndarray, rank: int) -> np.ndarray:
    return x.reshape(x.shape[0], *(1,) * rank) if x.ndim == 1 else x
