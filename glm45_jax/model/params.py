"""The parameter tree: its abstract shapes, its logical axes, its initial values, and modules made from it again.

`params` is a plain nested dict of arrays. Layers of a kind are stacked on a leading `layers` axis: `dense_layers` for
the first `first_k_dense_replace`, `moe_layers` for the rest; embedding, final norm, head and MTP layer stand beside.
Everything that needs shapes, axes or dtypes (shardings, checkpoints, optimizer groups, plans) asks here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from glm45_jax.config import ModelConfig
from glm45_jax.model import modules
from glm45_jax.parallel.sharding import MeshAxes, tree_shardings

Params = dict[str, Any]


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


def param_axes(config: ModelConfig) -> Params:
    """The same tree with each leaf's logical axes, a tuple of names or None, one per dimension."""

    def axes(kind: str, lead: tuple[str, ...]) -> Params:
        _, state = _split(config, kind)
        flat = {path: lead + tuple(variable.get_metadata("axes")) for path, variable in nnx.to_flat_state(state)}
        return nnx.traversals.unflatten_mapping(flat)

    return axes("outer", ()) | {kind: axes(kind, ("layers",)) for kind in stacked_kinds(config)}


def param_shardings(config: ModelConfig, mesh: Mesh, rules: Mapping[str, MeshAxes] | None = None) -> Params:
    """The tree of `NamedSharding`s over `mesh`, by the rules of `glm45_jax.parallel` with the changes in `rules`.

    Raises:
      UserError: one list of every parameter that cannot be divided so.
    """
    heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    return tree_shardings(abstract_params(config), param_axes(config), mesh, rules, units=heads)


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
