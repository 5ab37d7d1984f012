"""The Mosaic GPU flash attention: in the interpreter against the definition in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention.problem import SEES_NOTHING
from tests.pallas_kernels.hopper import needs_hopper, on_hopper
from tests.pallas_kernels.test_flash_attention import Case

CASES = {
    "a tile": Case(128, 128, head_dim=64, kv_heads=2),
    "one query at the end": Case(1, 130, head_dim=64, q_offset=129),
    "groups, over a tile": Case(129, 200, heads=4, kv_heads=2, head_dim=64),
    "several tiles": Case(300, 300, heads=1, head_dim=128),
    "queries before all keys": Case(140, 40, heads=1, head_dim=64, q_offset=-50),
    "not causal": Case(70, 260, heads=1, head_dim=64, causal=False, scale=-0.3),
    "packed": Case(270, 270, heads=1, head_dim=64, segments="packed", batch=2),
    "mixed ids": Case(70, 200, heads=1, head_dim=64, segments="mixed", causal=False),
}


def _inputs(case: Case):
    rng = np.random.default_rng(0)
    q_shape = (case.batch, case.heads, case.queries, case.head_dim)
    kv_shape = (case.batch, case.kv_heads, case.keys, case.head_dim)
    q, k, v, dout = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in (q_shape, kv_shape, kv_shape, q_shape))
    ids = [rng.integers(0, 3, (case.batch, n)) for n in (case.queries, case.keys)] if case.segments else None
    if case.segments == "packed":
        ids = [np.sort(x) for x in ids]
    return q, k, v, dout, None if ids is None else tuple(jnp.asarray(x, jnp.int32) for x in ids)


def _attend(case: Case, q, k, v, segments, implementation: str):
    ids = dict(zip(("segment_ids", "kv_segment_ids"), segments or ()))
    options = {"causal": case.causal, "q_offset": case.q_offset, "scale": case.scale, "heads_first": True}
    return flash_attention(q, k, v, return_lse=True, implementation=implementation, **ids, **options)


@needs_hopper
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    case = CASES[name]
    q, k, v, dout, segments = _inputs(case)
    dlse = jnp.asarray(np.random.default_rng(1).normal(size=q.shape[:3]), jnp.float32)
    with on_hopper():
        (out, lse), pull = jax.vjp(lambda q, k, v: _attend(case, q, k, v, segments, "gpu"), q, k, v)
        gradients = pull((dout, dlse))
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    (right, right_lse), pull = jax.vjp(lambda q, k, v: _attend(case, q, k, v, segments, "reference"), *exact)
    for found, expected in zip(gradients, pull((dout.astype(jnp.float32), dlse))):
        # weights and their gradients are rounded to bfloat16, 2**-9 of each, before sums over keys or queries
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2**-6 * np.abs(expected).max())
    # weights are rounded to bfloat16 before they meet the values, and so is the result
    np.testing.assert_allclose(out.astype(jnp.float32), right, atol=2**-7, rtol=2**-7)
    np.testing.assert_allclose(lse, right_lse, atol=1e-5, rtol=1e-6)
    nothing = np.asarray(right_lse == SEES_NOTHING)
    assert nothing.any() or name != "queries before all keys"
    assert (np.asarray(lse)[nothing] == SEES_NOTHING).all() and (np.asarray(out)[nothing] == 0).all()


def test_in_a_checked_shard_map() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def with_gradients(q, k, v):
        out, pull = jax.vjp(lambda *x: flash_attention(*x, implementation="gpu"), q, k, v)
        return out, *pull(out)

    q, kv = (jax.ShapeDtypeStruct((2, 128, heads, 64), jnp.bfloat16) for heads in (4, 2))
    spread = jax.shard_map(with_gradients, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=True)
    assert [x.shape for x in jax.eval_shape(spread, q, kv, kv)] == [q.shape, q.shape, kv.shape, kv.shape]


def test_what_has_no_kernel_is_said() -> None:
    with pytest.raises(NotImplementedError, match="bfloat16"):
        flash_attention(*[jnp.zeros((1, 8, 1, 64))] * 3, implementation="gpu")
    with pytest.raises(NotImplementedError, match="64 n"):
        flash_attention(*[jnp.zeros((1, 8, 1, 32), jnp.bfloat16)] * 3, implementation="gpu")
    with pytest.raises(NotImplementedError, match="64 or 128"):
        flash_attention(*[jnp.zeros((1, 8, 1, 256), jnp.bfloat16)] * 3, implementation="gpu")
