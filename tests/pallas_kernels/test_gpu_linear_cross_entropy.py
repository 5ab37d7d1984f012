"""The Mosaic GPU linear_cross_entropy: in the interpreter against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy, mosaic_gpu
from pallas_kernels.linear_cross_entropy import gpu_forward
from tests.pallas_kernels.hopper import needs_hopper, on_hopper


@needs_hopper
@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True], ids=["DV", "VD"])
def test_values_and_gradients(transpose: bool) -> None:
    """Two tiles of tokens by two of the vocabulary, the last of both not whole."""
    tokens, model, vocabulary = 140, 128, 300
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(tokens, model)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(model, 320)) * 3 * model**-0.5, jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32).at[:3].set(jnp.array([0, 299, -1]))

    def loss_of(hidden, head, implementation):
        options = {"valid_vocab": vocabulary, "return_entropy": True, "temperature": 0.8}
        head = head.T if transpose else head
        how = {"transpose_head": transpose, "implementation": implementation}
        return linear_cross_entropy(hidden, head, targets, **how, **options)

    with on_hopper():
        (loss, entropy), pull = jax.vjp(lambda *x: loss_of(*x, "gpu"), hidden, head)
        gradients = pull((jnp.ones(tokens), jnp.ones(tokens)))
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)[:, :vocabulary] / 0.8
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    right = np.where(np.arange(tokens) == 2, 0, -log_p[np.arange(tokens), targets])
    np.testing.assert_allclose(loss, right, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(entropy, -(np.exp(log_p) * log_p).sum(1), atol=1e-5, rtol=1e-5)
    exact = (hidden.astype(jnp.float32), head.astype(jnp.float32))
    _, pull = jax.vjp(lambda *x: loss_of(*x, "reference"), *exact)
    for found, expected in zip(gradients, pull((jnp.ones(tokens), jnp.ones(tokens)))):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2**-6 * np.abs(expected).max())


def test_buffers_fit_shared_memory() -> None:
    loaded = (gpu_forward.TOKENS + gpu_forward.COLUMNS) * mosaic_gpu.SWIZZLE_BYTES
    kept = gpu_forward.TOKENS * 4 * (2 + 4)  # two tiles' targets, four numbers
    assert gpu_forward.STAGES * loaded + kept <= mosaic_gpu.shared_memory_bytes()
