"""Muon on eight CPU devices against Muon on one. Run by test_muon.py in a process that has eight."""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from glm45_jax.config import get_preset
from glm45_jax.model import init_params, param_shardings
from glm45_jax.parallel import make_mesh
from glm45_jax.train import muon
from glm45_jax.train.muon import plan_jobs, scale_by_muon
from glm45_jax.train.optimizer import OptimizerConfig, make_optimizer
from tests.support import quick_jit

ALL = ("fsdp", "expert")
# one tree: expert stacks, attention of two kinds with transposed shapes, a router, a head, a lone projection
SHAPES = {
    "gate": (3, 10, 16, 40), "down": (3, 10, 40, 16), "q": (3, 48, 40), "dense_q": (1, 48, 40), "o": (3, 40, 48),
    "router": (3, 10, 40), "head": (168, 40), "proj": (40, 80), "square": (2, 40, 40),
}  # fmt: skip
SPECS = {
    "gate": P(None, "expert", "tensor", "fsdp"), "down": P(None, "expert", "fsdp", "tensor"),
    "q": P(None, "tensor", ALL), "dense_q": P(None, "tensor", ALL), "o": P(None, ALL, "tensor"),
    "router": P(None, None, ALL), "head": P("tensor", ALL), "proj": P(ALL, None), "square": P(None, ALL, None),
}  # fmt: skip
MESHES = {
    "expert5": {"expert": 5},
    "fsdp2-expert2-tensor2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "data2-expert2-tensor2": {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2},
}


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items())}


def specs_on(sizes):
    """`SPECS` without the axes that the mesh lacks."""
    has = lambda entry: tuple(n for n in ((entry,) if isinstance(entry, str) else entry or ()) if n in sizes) or None  # noqa: E731
    return {name: P(*map(has, spec)) for name, spec in SPECS.items()}


def devices_of(sizes):
    return jax.devices()[: int(np.prod(list(sizes.values())))]


@functools.cache
def alone(**options):
    """Two updates on one device."""
    rule, wanted = scale_by_muon(**options), []
    update, state = quick_jit(rule.update), rule.init(tree(0))
    for step in range(2):
        got, state = update(tree(step + 1), state, scale=0.5)
        wanted.append(jax.tree.map(np.asarray, got))
    return wanted


def agrees(sizes, explicit=False, **options):
    """The largest differences of two updates, for every leaf; the sharding of what comes out is that of the leaf."""
    mesh, specs = make_mesh(devices_of(sizes), **sizes), specs_on(sizes)
    if explicit:
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices_of(sizes))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    on_mesh = lambda mesh: {name: NamedSharding(mesh, spec) for name, spec in specs.items()}  # noqa: E731
    many, wanted, worst = scale_by_muon(**options, shardings=on_mesh), alone(**options), dict.fromkeys(SHAPES, 0.0)
    with jax.set_mesh(mesh):
        update, state = quick_jit(many.update), many.init(tree(0))
        state = state._replace(momentum=jax.device_put(state.momentum, shardings))
        for step, want in enumerate(wanted):
            got, state = update(jax.device_put(tree(step + 1), shardings), state, scale=0.5)
            for name in SHAPES:
                assert got[name].sharding.is_equivalent_to(shardings[name], got[name].ndim), (name, got[name].sharding)
                worst[name] = max(worst[name], float(jnp.abs(got[name] - want[name]).max()))
    return worst


def whole_optimizer():
    """`make_optimizer` on a mesh: every parameter of `tiny` by the shardings of the model itself."""
    config, sizes = get_preset("tiny"), {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    mesh = make_mesh(jax.devices(), **sizes)
    params = init_params(config, jax.random.key(0))
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    optimizer = make_optimizer(config, OptimizerConfig(learning_rate=0.01, ns_dtype="float32"), 10)
    want, _ = quick_jit(optimizer.update)(gradient, optimizer.init(params), params)
    with jax.set_mesh(mesh):
        params, gradient = jax.device_put((params, gradient), (param_shardings(config, mesh),) * 2)
        step = quick_jit(optimizer.update)
        got, _ = step(gradient, quick_jit(optimizer.init)(params), params)
        text = step.lower(gradient, jax.eval_shape(optimizer.init, params), params).as_text()
    worst = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, want)
    return {"worst": max(jax.tree.leaves(worst)), "exchanges": text.count("all_to_all")}


def in_parts(sizes):
    """The same with room for one matrix of each device at a time."""
    muon.plan_jobs = functools.partial(plan_jobs, working_bytes=1)
    try:
        return agrees(sizes, ns_dtype="float32")
    finally:
        muon.plan_jobs = plan_jobs


CHECKS = {
    "agrees": lambda: {name: agrees(sizes, ns_dtype="float32") for name, sizes in MESHES.items()},
    "whole_optimizer": whole_optimizer,
    "in_parts": lambda: in_parts(MESHES["fsdp2-expert2-tensor2"]),
    "explicit": lambda: agrees(MESHES["fsdp2-expert2-tensor2"], explicit=True, ns_dtype="float32"),
    "without_nesterov": lambda: agrees({"data": 2, "fsdp": 4}, nesterov=False, momentum_dtype="bfloat16"),
    "bfloat16": lambda: agrees({"data": 2, "fsdp": 4}, ns_dtype="bfloat16"),
}

if __name__ == "__main__":
    print(json.dumps({name: CHECKS[name]() for name in sys.argv[1:] or CHECKS}))
