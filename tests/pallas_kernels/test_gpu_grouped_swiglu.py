"""The Mosaic GPU SwiGLU: in the interpreter against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_swiglu
from tests.pallas_kernels.hopper import needs_hopper, on_hopper

# rows of all groups, first group of this shard, groups of this shard, rows past the last group, K, F, [E, F, K]
CASES = {
    "tile edges": ([127, 0, 129], 0, 3, 0, 64, 192, True),
    "a shard between others": ([3, 70, 9], 1, 2, 5, 128, 64, False),
}


def _expected(lhs, gate, up, dout, rows):
    """The result and the gradients of lhs, gate and up, in float64."""
    out, dlhs = np.zeros(dout.shape), np.zeros(lhs.shape)
    dgate, dup = np.zeros(gate.shape), np.zeros(up.shape)
    for group, mine in enumerate(rows):
        x, d, g, u = lhs[mine], dout[mine], lhs[mine] @ gate[group], lhs[mine] @ up[group]
        sigmoid = 1 / (1 + np.exp(-g))
        out[mine] = g * sigmoid * u
        dg, du = d * u * sigmoid * (1 + g * (1 - sigmoid)), d * g * sigmoid
        dlhs[mine] = dg @ gate[group].T + du @ up[group].T
        dgate[group], dup[group] = x.T @ dg, x.T @ du
    return out, dlhs, dgate, dup


@needs_hopper
@pytest.mark.slow
@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, keep_products: bool) -> None:
    sizes, offset, groups, past, k, f, transpose = CASES[case]
    rng, num_rows, ends = np.random.default_rng(0), sum(sizes) + past, np.cumsum(sizes)
    rows = [slice(ends[offset + g] - sizes[offset + g], ends[offset + g]) for g in range(groups)]
    shapes = [(num_rows, k), (groups, k, f), (groups, k, f), (num_rows, f)]
    lhs, gate, up, dout = (jnp.asarray(rng.normal(size=s) * s[-2] ** -0.5, jnp.bfloat16) for s in shapes)
    turn = (lambda x: jnp.swapaxes(x, 1, 2)) if transpose else (lambda x: x)

    def product(lhs, gate, up):
        options = {"group_offset": offset, "transpose_rhs": transpose, "keep_products": keep_products}
        return grouped_swiglu(lhs, gate, up, jnp.asarray(sizes, jnp.int32), implementation="gpu", **options)

    with on_hopper():
        out, pull = jax.vjp(product, lhs, turn(gate), turn(up))
        dlhs, dgate, dup = pull(dout)
    expected = _expected(*(np.asarray(x, np.float64) for x in (lhs, gate, up, dout)), rows)
    for found, right in zip((out, dlhs, turn(dgate), turn(dup)), expected):
        # the products' gradients are bfloat16 before they are multiplied: 2**-9 of each
        np.testing.assert_allclose(found.astype(jnp.float32), right, rtol=2**-8, atol=2**-7 * np.abs(right).max())
