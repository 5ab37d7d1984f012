"""Sharding is data: logical axis names of the parameters, one table of rules to mesh axes, and checks.

A mesh may lack any of the axes that the rules speak of (`mesh.AXES`); those that it has at size 1 cut nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError

MeshAxes = str | tuple[str, ...] | None

# Logical axis of a parameter -> mesh axis or axes; None: every device holds all of it. What is cut by `GATHERED` is put
# together where a layer uses it; the rest stays cut, and the work with it. `pipeline` comes last: then what its stages
# put together for their layers is in order.
RULES: dict[str, MeshAxes] = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "expert", "context", "pipeline"),
    "norm": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "router": None,
    "experts": ("expert", "tensor"),
    "expert_embed": ("fsdp", "context", "pipeline"),
    "expert_mlp": None,
}
GATHERED = ("vocab", "embed", "expert_embed")
# For decoding, where a step has no time to gather weights: `ModelConfig.parallel.rules`.
SERVING_RULES: tuple[tuple[str, ...], ...] = (("embed",), ("expert_embed",))


def rules_of(config: ModelConfig) -> dict[str, MeshAxes]:
    """`RULES` with the changes of `config.parallel`."""
    return RULES | {logical: axes or None for logical, *rest in config.parallel.rules for axes in [tuple(rest)]}


def tree_shardings(
    shapes: Any,
    axes: Any,
    mesh: Mesh,
    rules: Mapping[str, MeshAxes] | None = None,
    units: Mapping[str, int] | None = None,
) -> Any:
    """The tree of `NamedSharding`s for a tree of arrays or shapes and the same tree of their logical axes.

    Args:
      units: how many indivisible parts a logical axis has, where that is not its size: a head is never cut.
      rules: changes to `RULES`, such as `{"kv_heads": None}`.

    Raises:
      UserError: one list of every parameter that two rules would divide over the same mesh axis, or that its mesh axes
        don't divide evenly; a rule for a logical axis that does not exist.
    """
    table = RULES | dict(rules or {})
    unknown = sorted(table.keys() - RULES.keys())
    if unknown:
        raise UserError(f"rules for unknown logical axes {unknown}; there are {sorted(RULES)}")
    problems: list[str] = []
    units = units or {}

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> NamedSharding:
        spec, used = [], {}
        for axis, size in zip(axes, leaf.shape):
            names = _mesh_axes(table.get(axis) if axis else None, mesh)
            for name in names:
                if name in used:
                    problems.append(f"{_dotted(path)}: {used[name]!r} and {axis!r} both go to mesh axis {name!r}")
                used[name] = axis
            count = units.get(axis or "", int(size or 0))
            parts = math.prod(mesh.shape[name] for name in names)
            if count % parts:
                problems.append(f"{_dotted(path)}: {axis} is {count}, not divisible by mesh axes {names} of {parts}")
            spec.append(names if len(names) > 1 else names[0] if names else None)
        return NamedSharding(mesh, PartitionSpec() if problems else PartitionSpec(*spec))

    tree = jax.tree_util.tree_map_with_path(sharding, shapes, axes)
    if problems:
        raise UserError(
            f"params cannot be sharded over mesh {dict(mesh.shape)}; choose other sizes, or pass rules such as "
            "{'kv_heads': None}:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return tree


def _mesh_axes(rule: MeshAxes, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes of a rule along which this mesh has several devices."""
    return tuple(name for name in as_axes(rule) if mesh.shape.get(name, 1) > 1)


def as_axes(rule: MeshAxes) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else tuple(rule or ())


def _dotted(path: Any) -> str:
    return ".".join(str(key.key) for key in path)
