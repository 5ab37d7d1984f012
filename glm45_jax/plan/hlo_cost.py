"""FLOPs and main-memory bytes of XLA's own operations in a compiled program; kernels are counted elsewhere.

FLOPs are those of matrix products (`dot`, and on a TPU `convolution`), as `xla::HloCostAnalysis` counts them, times how
often each runs. What XLA does on several devices over again is in them.

Bytes: each operation that is scheduled reads its operands once and writes its results once, with these exceptions.

  fast memory     what the TPU's compiler placed in VMEM or SMEM (`S(n)` in its layout) costs nothing
  parts           of an operand that is only sliced or gathered from, inside a fusion too, the parts count; there also
                  behind a conversion or a change of layout
  in place        of a `dynamic-update-slice` what is put in counts, not the array that it is put into
  free            tuples, bitcasts, the ends of asynchronous operations; calls, whose insides count
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from glm45_jax.plan.hlo import Computation, Instruction, Program, array_bytes

KERNELS = ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "replica-id", "async-update", "async-done", "async-start", "domain",
    "add-dependency",
}  # fmt: skip
_NO_TRAFFIC = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding"}
_SLICING = ("dynamic-slice", "slice", "gather")
_SAME_PLACE = ("bitcast", "copy", "convert")  # of each value one; fused, no more of them are made than are used
_SAME = ("bitcast", "reshape", "copy", "convert", "transpose")
_ARRAY = re.compile(r"[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?")
_FAST = re.compile(r"S\([1-9]\d*\)")


def matrix_flops(program: Program) -> float:
    """Of one device."""
    total = 0.0
    for computation, it, times in program.executed():
        if it.opcode == "dot":
            total += times * _dot_flops(computation, it)
        elif it.opcode == "convolution":
            total += times * _convolution_flops(computation, it)
    return total


def memory_bytes(program: Program) -> float:
    """Of one device."""
    scheduled = program.executed(fusions=False)
    return sum(times * _bytes(program, computation, it) for computation, it, times in scheduled)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def dims_of(text: str) -> list[int]:
    """Of an array's type."""
    found = re.search(r"\[([\d,<=]*)\]", text)
    return [int(d.lstrip("<=")) for d in found[1].split(",") if d] if found else []


def _types(computation: Computation, it: Instruction) -> list[str]:
    return [computation.instructions[o].type for o in it.operands if o in computation.instructions]


def _dot_flops(computation: Computation, it: Instruction) -> float:
    lhs = dims_of(_types(computation, it)[0])
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", it.attributes)
    contracted = [lhs[int(d)] for d in found[1].split(",") if d] if found else []
    return 2.0 * math.prod(dims_of(it.type)) * math.prod(contracted)


def _convolution_flops(computation: Computation, it: Instruction) -> float:
    """Of every pair of an output's place and a kernel's that meets a value of the input."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.attributes)
    if labels is None:
        return 0.0
    lhs, rhs = (dims_of(t) for t in _types(computation, it)[:2])
    sizes = [dict(zip(names, dims)) for names, dims in zip(labels.groups(), (lhs, rhs, dims_of(it.type)))]
    window = re.search(r"window=\{([^}]*)\}", it.attributes)
    said = dict(x.split("=") for x in window[1].split()) if window else {}
    spatial = sorted(c for c in labels[1] if c.isdigit())

    def along(name: str, default: str) -> list[str]:
        return said[name].split("x") if name in said else [default] * len(spatial)

    pairs = 1
    told = (along(n, d) for n, d in (("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")))
    for d, stride, pad, apart, step in zip(spatial, *told):
        at = np.arange(sizes[2][d])[:, None] * int(stride) - int(pad.split("_")[0])
        at = at + np.arange(sizes[1][d])[None] * int(step)
        inside = (at >= 0) & (at <= (sizes[0][d] - 1) * int(apart)) & (at % int(apart) == 0)
        pairs *= int(inside.sum())
    return 2.0 * pairs * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]


# --- bytes -----------------------------------------------------------------------------------------------------------


def _far(text: str) -> float:
    """Bytes of those arrays of a type that lie in main memory."""
    return sum(array_bytes(a) for a in _ARRAY.findall(text) if not _FAST.search(a))


def _bytes(program: Program, computation: Computation, it: Instruction) -> float:
    if it.opcode in _FREE or it.opcode.endswith("-done") or _target(it) in (*_NO_TRAFFIC, *KERNELS):
        return 0
    if it.opcode == "custom-call" and any(name in program.computations for name in it.called):
        return 0  # work given to a TPU's SparseCore: what stands inside is counted
    if it.opcode == "fusion":
        return _fusion_bytes(program, computation, it)
    operands = _types(computation, it)
    if it.opcode == "ragged-all-to-all":  # the rows that there are, in one of the two buffers and the other
        return 2 * min(map(_far, operands[:2]))
    if it.opcode.endswith("-start"):
        return _start_bytes(it, operands)
    if it.opcode in _SLICING:
        # the parts that are taken, once out of main memory and once into it
        return (array_bytes(it.type) if _far(operands[0]) else 0) + _far(it.type)
    if it.opcode == "dynamic-update-slice":
        return _far(operands[1]) + (array_bytes(operands[1]) if _far(it.type) else 0)
    return sum(map(_far, operands)) + _far(it.type)


def _target(it: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', it.attributes) if it.opcode == "custom-call" else None
    return found[1] if found else ""


def _start_bytes(it: Instruction, operands: list[str]) -> float:
    """Of a copy or slice that is under way beside others: its target stands first; a collective's operand does."""
    arrays = _ARRAY.findall(it.type)
    if it.opcode == "copy-start":
        return (array_bytes(arrays[0]) if _far(operands[0]) else 0) + _far(arrays[0])
    result = arrays[len(operands)] if len(arrays) > len(operands) else arrays[-1]
    if "slice" in it.opcode:
        return (array_bytes(result) if _far(operands[0]) else 0) + _far(result)
    return sum(map(_far, operands)) + _far(result)


def _fusion_bytes(program: Program, computation: Computation, it: Instruction) -> float:
    inside = program.computations[it.called[0]]
    parameters = {int(p.argument): p for p in inside.instructions.values() if p.opcode == "parameter"}
    total = 0.0
    for i, name in enumerate(it.operands):
        operand = computation.instructions.get(name)
        if operand is not None and i in parameters and (whole := _far(operand.type)):
            total += min(whole, _read(program, inside, parameters[i]))
    return total + sum(_written(inside, r) for r in _results(inside, inside.root) if _far(r.type))


def _read(program: Program, inside: Computation, value: Instruction) -> float:
    """Bytes of a fusion's operand that its users need."""
    whole = array_bytes(value.type)
    total = whole if value.root else 0.0
    for user in inside.users.get(value.name, ()):
        if user.opcode in _SLICING and user.operands[0] == value.name:
            total += array_bytes(user.type)
        elif user.opcode in _SAME_PLACE:
            total += _read(program, inside, user) * whole / max(1.0, array_bytes(user.type))
        elif user.opcode == "fusion":
            total += _read_by_fusion(program, inside, user, value)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:
            return whole
    return min(total, whole)


def _read_by_fusion(program: Program, inside: Computation, user: Instruction, value: Instruction) -> float:
    nested, place = program.computations[user.called[0]], str(user.operands.index(value.name))
    argument = next(p for p in nested.instructions.values() if p.opcode == "parameter" and p.argument == place)
    it = nested.root
    while it.opcode in _SAME_PLACE:
        it = nested.instructions[it.operands[0]]
    # one that hands its operand on is as its own users are
    if it is argument:
        return _read(program, inside, user) * array_bytes(value.type) / max(1.0, array_bytes(user.type))
    return _read(program, nested, argument)


def _results(inside: Computation, root: Instruction) -> Iterable[Instruction]:
    if root.opcode == "tuple":
        for name in root.operands:
            yield inside.instructions[name]
    else:
        yield root


def _written(inside: Computation, result: Instruction) -> float:
    """Bytes of a fusion's result that are new."""
    it = result
    while it.opcode in _SAME and it.operands and it.operands[0] in inside.instructions:
        it = inside.instructions[it.operands[0]]
    if it.opcode == "dynamic-update-slice":
        return array_bytes(inside.instructions[it.operands[1]].type)
    return array_bytes(result.type)
