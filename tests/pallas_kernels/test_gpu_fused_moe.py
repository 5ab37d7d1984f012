"""The routed experts of a few tokens by Mosaic GPU kernels: in the interpreter against the reference."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_moe
from pallas_kernels.fused_moe.gpu import by_expert
from tests.pallas_kernels.hopper import needs_hopper, on_hopper


@needs_hopper
@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "offset"), [(1, None), (5, 2)])
def test_values(tokens: int, offset: int | None) -> None:
    rng = np.random.default_rng(0)
    shapes = [(tokens, 64), (4, 128, 64), (4, 128, 64), (4, 64, 128)]
    x, gate, up, down = (jnp.asarray(rng.normal(size=s) * s[-1] ** -0.5, jnp.bfloat16) for s in shapes)
    total = 4 if offset is None else 8
    indices = jnp.asarray(np.stack([rng.permutation(total)[:3] for _ in range(tokens)]), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(tokens, 3)), jnp.float32)
    options = {"transpose_rhs": True, "expert_offset": offset}
    with on_hopper():
        out = fused_moe(x, gate, up, down, indices, weights, implementation="gpu", **options)
    exact = [a.astype(jnp.float32) for a in (x, gate, up, down)]
    expected = fused_moe(*exact, indices, weights, implementation="reference", **options)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2**-7 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 8, 200])
def test_rows_by_expert_are_those_of_a_stable_sort(rows: int) -> None:
    expert = np.random.default_rng(rows).integers(0, 6, rows).astype(np.int32)  # 5: of another shard
    sizes, place, standing = by_expert(jnp.asarray(expert), 5)
    order = np.argsort(expert, stable=True)
    np.testing.assert_array_equal(sizes, np.bincount(expert, minlength=6)[:5])
    np.testing.assert_array_equal(standing, order)
    np.testing.assert_array_equal(place, np.argsort(order))
