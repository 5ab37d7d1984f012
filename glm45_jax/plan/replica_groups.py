"""Which mesh axes a collective runs over, from the groups of devices that the compiled program writes.

Devices are numbered as they lie in the mesh, the last axis fastest. XLA writes groups in three forms:

  {{0,1},{2,3}}                          lists
  [2,2]<=[2,2]T(1,0)                     the numbers 0.. reshaped, transposed, and cut into rows
  mesh['a'=2,'b'=2] {'b'}                a mesh of its own, and the axes along which a group goes
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from glm45_jax.errors import UserError

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?\))?")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def parse_groups(text: str, devices: int) -> np.ndarray:
    """Groups [number, size] of device numbers; `{}` means all devices in one group.

    Raises:
      UserError: a form that is not known.
    """
    text = text.strip()
    if text.startswith("mesh"):
        return _of_mesh(text)
    if match := _IOTA.match(text):
        return _iota(match[1], match[2], match[3])
    if text.startswith("{"):
        rows = [_numbers(row) for row in re.findall(r"\{([\d,\s]+)\}", text)]
        return np.array(rows) if rows else np.arange(devices)[None]
    raise UserError(f"replica groups of a form that is not known: {text[:80]!r}")


def parse_pairs(text: str) -> np.ndarray:
    """[pairs, 2]: who sends to whom."""
    return np.array([_numbers(row) for row in re.findall(r"\{([\d,\s]+)\}", text)]).reshape(-1, 2)


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x.strip()]


def _iota(shape: str, reshape: str, transpose: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(reshape))).reshape(_numbers(reshape))
    ids = ids.transpose(_numbers(transpose)) if transpose else ids
    return ids.reshape(_numbers(shape))


def _of_mesh(text: str) -> np.ndarray:
    mesh = _MESH.match(text)
    if mesh is None:
        raise UserError(f"replica groups of a form that is not known: {text[:80]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    if mesh[2] is None:
        ids = np.arange(math.prod(sizes.values()))
    elif mesh[3] is None:
        ids = np.array(_numbers(mesh[2]))
    else:
        ids = _iota(mesh[2], mesh[3], mesh[4])
    inside = text[mesh.end() :]
    inside = inside[inside.index("{") + 1 : inside.index("}")]
    # an axis may be named in part, 'x':(pre)size: it is cut into pre, size and what remains
    chosen = {name: (int(pre or 1), int(size or sizes[name])) for name, pre, size in _AXIS.findall(inside)}
    shape, along = [], []
    for name, full in sizes.items():
        pre, size = chosen.get(name, (full, 1))
        along.append(len(shape) + 1)
        shape += [pre, size, full // (pre * size)]
    apart = [i for i in range(len(shape)) if i not in along]
    order = [*apart, *along]
    return ids.reshape(shape).transpose(order).reshape(-1, math.prod(shape[i] for i in along))


def varying_axes(groups: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes, in the mesh's order, along which the members of some group differ.

    Args:
      groups: [number, size] of device numbers; of pairs, who sends to whom.
      sizes: of the mesh, in its order.
    """
    where = coordinates(groups, sizes)
    return tuple(name for name, c in where.items() if (c != c[:, :1]).any())


def coordinates(groups: np.ndarray, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Of each member of each group, its place along each mesh axis."""
    if groups.size and groups.max() >= math.prod(sizes.values()):
        raise UserError(
            f"the program runs on more than the {math.prod(sizes.values())} devices of the mesh {sizes}: "
            "give the mesh that it was compiled for"
        )
    return dict(zip(sizes, np.unravel_index(groups, tuple(sizes.values()))))


def is_whole(groups: np.ndarray, axes: Sequence[str], sizes: dict[str, int]) -> bool:
    """Whether every group is all devices along these axes."""
    return groups.shape[1] == math.prod(sizes[a] for a in axes)
