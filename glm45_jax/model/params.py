"""The parameter tree: its abstract shapes, its logical axes, its initial values, and modules made from it again.

`params` is a plain nested dict of arrays. Layers of a kind are stacked on a leading `layers` axis: `dense_layers` for
the first `first_k_dense_replace`, `moe_layers` for the rest; embedding, final norm, head and MTP layer stand beside.
Everything that needs shapes, axes or dtypes (shardings, checkpoints, optimizer groups, plans) asks here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from glm45_jax.config import ModelConfig
from glm45_jax.model import modules
from glm45_jax.model.quantized import Quantized, is_quantized, scale_spec
from glm45_jax.parallel import local
from glm45_jax.parallel.sharding import GATHERED, MeshAxes, as_axes, rules_of, tree_shardings

Params = dict[str, Any]
WHOLE = "whole_weight"  # what `whole` gathered, to remat policies: never kept


def _make(config: ModelConfig, kind: str, rngs: nnx.Rngs) -> nnx.Module:
    if kind == "outer":
        return modules.Outer(config, rngs)
    return modules.Block(config, rngs, moe=kind == "moe_layers")


def stacked_kinds(config: ModelConfig) -> dict[str, int]:
    """The stacked parts of the tree that this model has, in the order of the forward pass: name -> layers."""
    kinds = {"dense_layers": config.num_dense_layers, "moe_layers": config.num_moe_layers}
    return {kind: count for kind, count in kinds.items() if count}


@functools.cache
def _split(config: ModelConfig, kind: str) -> tuple[Any, Any]:
    """Static graph and abstract state of one module; nothing is computed."""
    return nnx.split(nnx.eval_shape(lambda: _make(config, kind, nnx.Rngs(0))))


def merge(config: ModelConfig, kind: str, params: Params) -> Any:
    """The module of `kind` ("outer", "dense_layers", "moe_layers") over `params`, of one layer for a stacked kind."""
    graph, abstract = _split(config, kind)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def merge_outer(config: ModelConfig, params: Params) -> Any:
    """Embedding, final norm, head and MTP layer over the whole tree's `params`."""
    return merge(config, "outer", {k: v for k, v in params.items() if k not in ("dense_layers", "moe_layers")})


@functools.cache
def abstract_params(config: ModelConfig) -> Params:
    """The tree of `jax.ShapeDtypeStruct`. Computes nothing, looks for no device. Shared: don't change it in place."""

    def shapes(kind: str, lead: tuple[int, ...]) -> Params:
        _, state = _split(config, kind)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(lead + leaf.shape, leaf.dtype), nnx.to_pure_dict(state))

    return shapes("outer", ()) | {kind: shapes(kind, (count,)) for kind, count in stacked_kinds(config).items()}


@functools.cache
def param_axes(config: ModelConfig) -> Params:
    """The same tree with each leaf's logical axes, a tuple of names or None, one per dimension."""

    def axes(kind: str, lead: tuple[str, ...]) -> Params:
        _, state = _split(config, kind)
        flat = {path: lead + tuple(variable.get_metadata("axes")) for path, variable in nnx.to_flat_state(state)}
        return nnx.traversals.unflatten_mapping(flat)

    return axes("outer", ()) | {kind: axes(kind, ("layers",)) for kind in stacked_kinds(config)}


def param_shardings(
    config: ModelConfig, mesh: Mesh | AbstractMesh, rules: Mapping[str, MeshAxes] | None = None
) -> Params:
    """The tree of `NamedSharding`s over `mesh`, by the rules of `glm45_jax.parallel` with the changes in `rules`.

    Raises:
      UserError: one list of every parameter that cannot be divided so.
    """
    heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    table = rules_of(config) | dict(rules or {})
    tensor = mesh.shape.get("tensor", 1)
    if table["kv_heads"] == "tensor" and tensor > heads["kv_heads"] and tensor % heads["kv_heads"] == 0:
        table["kv_heads"] = None  # more devices than kv heads: each has all, and uses one
    return tree_shardings(abstract_params(config), param_axes(config), mesh, table, units=heads)


def param_specs(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """The `PartitionSpec`s of `param_shardings`."""
    return jax.tree.map(lambda sharding: sharding.spec, param_shardings(config, mesh))


def specs_of(params: Params, config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """`param_specs` for this very tree: scales of quantised weights lie as their weights.

    Raises:
      UserError: a quantised weight's blocks cannot be divided so.
    """
    return scales_too(params, param_specs(config, mesh), mesh)


def scales_too(params: Params, specs: Params, mesh: Mesh | AbstractMesh) -> Params:
    """`PartitionSpec`s of weights, with those of the scales where `params` have some."""
    parts = lambda axes: math.prod(mesh.shape[name] for name in as_axes(axes))  # noqa: E731

    def one(path: Any, x: Any, spec: PartitionSpec) -> Any:
        name = ".".join(str(key.key) for key in path)
        return Quantized(spec, scale_spec(name, x, spec, parts)) if is_quantized(x) else spec  # pyright: ignore

    return jax.tree_util.tree_map_with_path(one, params, specs, is_leaf=is_quantized)


def shardings_of(
    params: Params, config: ModelConfig, mesh: Mesh | AbstractMesh, rules: Mapping[str, MeshAxes] | None = None
) -> Params:
    """`param_shardings` for this very tree, with quantised weights or without."""
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(config, mesh, rules))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), scales_too(params, specs, mesh))


def whole(params: Any, config: ModelConfig, axes: Any, apart: tuple[str, ...] = ()) -> Any:
    """A layer's parameters, or those around the layers, as the layer uses them, inside a `shard_map`.

    What the rules cut only to store it is gathered. Matrices are rounded to the model's dtype before they travel; the
    router's is float32 to the end.

    Args:
      axes: logical axes of the leaves, without `layers`.
      apart: mesh axes over which they are whole already.
    """
    if not local.live():
        return params
    rules = rules_of(config)

    def one(x: Any, axes: tuple[str | None, ...]) -> Any:
        if is_quantized(x):
            *lead, out, into = axes
            scale_axes = (*lead, None, out) if x.per_channel else (*lead, into, out)
            values, scales = gathered(x.values, axes, x.values.dtype), gathered(x.scales, scale_axes, x.scales.dtype)
            return Quantized(values, scales, x.layer)
        return gathered(x, axes, x.dtype if "router" in axes else config.dtype)

    def gathered(x: jax.Array, axes: tuple[str | None, ...], dtype: Any) -> jax.Array:
        names = lambda axis: tuple(name for name in as_axes(rules[axis]) if name not in apart)  # noqa: E731
        cut = [(i, names(axis)) for i, axis in enumerate(axes) if axis in GATHERED]
        x = x.astype(dtype) if cut else x
        for i, names in cut:
            x = local.gather_stored(x, names, axis=i)
        return checkpoint_name(x, WHOLE) if cut else x

    return jax.tree.map(one, params, axes, is_leaf=is_quantized)


@functools.cache
def layer_axes(config: ModelConfig, kind: str) -> Params:
    """Logical axes of the parameters of one layer of a stacked kind."""
    drop = lambda axes: axes[1:]  # noqa: E731
    return jax.tree.map(drop, param_axes(config)[kind], is_leaf=lambda x: isinstance(x, tuple))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters. Pure: under `jit` with `out_shardings` every device makes only its part."""

    def values(kind: str, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(_make(config, kind, nnx.Rngs(key))))

    kinds = stacked_kinds(config)
    outer_key, *keys = jax.random.split(key, 1 + len(kinds))
    params = values("outer", outer_key)
    for (kind, count), stack_key in zip(kinds.items(), keys):
        params[kind] = jax.vmap(functools.partial(values, kind))(jax.random.split(stack_key, count))
    return params
