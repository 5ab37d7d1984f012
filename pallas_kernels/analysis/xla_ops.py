"""A rough count of the bytes that XLA's own operations move around the kernels.

A chain of operations that XLA is sure to fuse (elementwise ones, broadcasts, reductions) counts what goes into it and
what comes out; every other operation its operands and results. What XLA does beyond that isn't known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pallas_kernels.analysis.interpreter import sub_jaxprs
from pallas_kernels.analysis.kernel import dot_flops, item_bytes
from pallas_kernels.analysis.values import ELEMENTWISE, IDENTITY

GPU_KERNEL = "mpmd_map"  # a kernel of Mosaic GPU's
KERNELS = frozenset({"pallas_call", GPU_KERNEL})
LARGE = 1 << 16  # bytes from which a value counts: smaller ones stay on the chip
_FREE = {
    "reshape", "squeeze", "expand_dims", "bitcast_convert_type", "split", "platform_index", "axis_index", "name",
    "pvary", "pcast", "stop_gradient", "optimization_barrier", "layout_constraint",
}  # fmt: skip
_FUSED = {
    *ELEMENTWISE, *IDENTITY, *_FREE, "select_n", "convert_element_type", "broadcast_in_dim", "iota", "integer_pow",
    "pow", "exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "erf", "sin", "cos", "sqrt", "rsqrt", "cbrt",
    "square", "is_finite", "round", "nextafter", "reduce_precision", "add_any", "pad", "slice", "rev",
    "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or",
}  # fmt: skip
# operations that touch only the part of their first operand that they take out or put in: twice these bytes
_PARTIAL = {"dynamic_slice": "result", "gather": "result", "dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2}


def value_bytes(v: Any) -> float:
    """Of a value large enough to count, else 0."""
    aval = v.aval
    if hasattr(v, "val") or not hasattr(aval, "shape") or hasattr(aval, "inner_aval"):
        return 0
    try:
        nbytes = math.prod(aval.shape) * item_bytes(aval.dtype)
    except (TypeError, ValueError):  # random keys and the like
        return 0
    return nbytes if nbytes >= LARGE else 0


def is_fused(eqn: Any) -> bool:
    inner = sub_jaxprs(eqn)
    own = {"scan", "while", "shard_map", *KERNELS}
    if len(inner) == 1 and eqn.primitive.name not in own and not eqn.effects:
        return all(map(is_fused, inner[0].eqns))
    return eqn.primitive.name in _FUSED


def _is_free(eqn: Any) -> bool:
    """Moves nothing, as does a call of nothing."""
    inner = sub_jaxprs(eqn)
    return all(map(_is_free, inner[0].eqns)) if len(inner) == 1 and is_fused(eqn) else eqn.primitive.name in _FREE


def own_traffic(eqns: Sequence[Any], results: Sequence[Any]) -> tuple[float, float]:
    """Bytes and matrix-product FLOPs of a jaxpr's own equations, not of those inside other jaxprs."""
    nbytes = flops = 0.0
    for eqn in eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            flops += dot_flops(eqn)
        if name in _PARTIAL:
            part = _PARTIAL[name]
            nbytes += 2 * value_bytes(eqn.outvars[0] if part == "result" else eqn.invars[part])
        elif name not in KERNELS and not sub_jaxprs(eqn) and not is_fused(eqn):
            nbytes += sum(map(value_bytes, {*_variables(eqn.invars), *eqn.outvars}))
    return nbytes + _chains(eqns, results), flops


def _variables(atoms: Any) -> list[Any]:
    return [v for v in atoms if not hasattr(v, "val")]


def _chains(eqns: Sequence[Any], results: Sequence[Any]) -> float:
    """Bytes into and out of each chain of fused equations."""
    chain: dict[Any, int] = {}  # variable -> the chain that makes it
    members: dict[int, set[Any]] = {}
    inputs: dict[int, set[Any]] = {}
    fused = [eqn for eqn in eqns if is_fused(eqn)]
    for i, eqn in enumerate(fused):
        touching = {chain[v] for v in _variables(eqn.invars) if v in chain and value_bytes(v)}
        members[i] = set(eqn.outvars).union(*(members.pop(c) for c in touching))
        inputs[i] = {v for v in _variables(eqn.invars) if v not in chain}.union(*(inputs.pop(c) for c in touching))
        chain |= dict.fromkeys(members[i], i)
    outside = {v for eqn in eqns if not is_fused(eqn) for v in _variables(eqn.invars)}
    outside |= set(_variables(results))
    total = 0.0
    for i, made in members.items():
        if all(_is_free(eqn) for eqn in fused if set(eqn.outvars) <= made):
            continue
        total += sum(map(value_bytes, inputs[i])) + sum(value_bytes(v) for v in made if v in outside)
    return total
