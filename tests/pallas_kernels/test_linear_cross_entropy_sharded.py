"""linear_cross_entropy inside a checked shard_map: tokens over one mesh axis, the vocabulary over another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy, token_statistics
from pallas_kernels.linear_cross_entropy.statistics import over_shards
from tests.pallas_kernels.support import on

T, D, V = 6, 5, 280
mesh = jax.make_mesh((2, 2), ("tokens", "vocabulary"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((T, D), (D, V)))
targets = jnp.array([0, 139, 140, 279, -1, 280])

def plain(hidden, head):
    return linear_cross_entropy(hidden, head, targets, return_entropy=True, implementation="reference")

def split(implementation):
    def shard(hidden, head, targets):
        mine = targets - V // 2 * jax.lax.axis_index("vocabulary")
        whole = over_shards(token_statistics(hidden, head, mine, with_entropy=True, implementation=implementation),
                            "vocabulary")
        known = (targets >= 0) & (targets < V)
        return jnp.where(known, whole.lse - whole.target, 0), whole.entropy
    specs = (P("tokens"), P(None, "vocabulary"), P("tokens"))
    return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P("tokens"))

def by_tokens(implementation):
    def shard(hidden, head, targets):  # the head is whole: its gradient is summed over the shards of tokens
        return linear_cross_entropy(hidden, head, targets, return_entropy=True, implementation=implementation)
    return jax.shard_map(shard, mesh=mesh, in_specs=(P("tokens"), P(), P("tokens")), out_specs=P("tokens"))

weights = jnp.asarray(rng.normal(size=(2, T)), jnp.float32)
def gradients(f):
    def total(hidden, head):
        out = f(hidden, head)
        return sum(jnp.vdot(w, x) for w, x in zip(weights, out)), out
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

want = gradients(plain)(hidden, head)
for form in (split, by_tokens):
    for implementation in (None, "reference", "tpu"):
        with on(implementation or "cpu"):
            got = gradients(lambda h, w: form(implementation)(h, w, targets))(hidden, head)
            jax.block_until_ready(got)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, atol=3e-5)
print("agree")
"""


@pytest.mark.slow
def test_inside_a_checked_shard_map() -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("agree\n"), done.stderr[-3000:]
