"""Every implementation of fused_moe against float64."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_moe
from tests.support import quick_jit

IMPLEMENTATIONS = ("reference", "cpu")
D, F, E, L = 12, 7, 9, 3


def _weights():
    rng = np.random.default_rng(0)
    return rng.normal(size=(L, E, D, F)), rng.normal(size=(L, E, D, F)), rng.normal(size=(L, E, F, D))


def _expected(x, gate, up, down, indices, weights):
    out = np.zeros_like(x)
    for t, (chosen, share) in enumerate(zip(indices, weights)):
        for e, w in zip(chosen, share):
            g = x[t] @ gate[e]
            out[t] += w * ((g / (1 + np.exp(-g)) * (x[t] @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transpose", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("spread", ["random", "all on the same", "few experts"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_against_float64(tokens: int, spread: str, transpose: bool, implementation: str) -> None:
    rng = np.random.default_rng(tokens)
    pool = {"random": range(E), "all on the same": [2, 5], "few experts": [0, 3, 8]}[spread]
    indices = np.stack([rng.permutation(pool)[:2] for _ in range(tokens)]).astype(np.int32)
    weights, x = rng.random((tokens, 2)), rng.normal(size=(tokens, D))
    stacks = _weights()
    expected = _expected(x, *(s[1] for s in stacks), indices, weights)
    given = [jnp.asarray(np.swapaxes(s, 2, 3) if transpose else s, jnp.float32) for s in stacks]
    call = quick_jit(functools.partial(fused_moe, transpose_rhs=transpose, implementation=implementation))
    args = (jnp.asarray(x, jnp.float32), *given, jnp.asarray(indices), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(call(*args, layer=jnp.int32(1)), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 6])
def test_reads_only_the_chosen_experts(tokens: int) -> None:
    """The weights of experts nobody chose are NaN: reading them would show."""
    gate, up, down = (jnp.asarray(w[0], jnp.float32) for w in _weights())
    chosen = jnp.array([[1, 4]] * tokens)
    unused = jnp.ones(E, bool).at[chosen[0]].set(False)[:, None, None]
    poisoned = [jnp.where(unused, jnp.nan, w) for w in (gate, up, down)]
    out = fused_moe(jnp.ones((tokens, D)), *poisoned, chosen, jnp.ones((tokens, 2)), implementation="cpu")
    assert jnp.isfinite(out).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    gate, up, down = (jnp.asarray(w[0], jnp.float32) for w in _weights())
    with pytest.raises(ValueError, match="don't fit"):
        fused_moe(jnp.ones((1, D)), gate, up, gate, jnp.zeros((1, 2), int), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="tokens"):
        fused_moe(jnp.ones((2, D)), gate, up, down, jnp.zeros((1, 2), int), jnp.ones((1, 2)))
