"""linear_cross_entropy at the heads of GLM-4.5 (D 5120) and Air (D 4096), V 151,552, 8192 tokens, bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import linear_cross_entropy
from pallas_kernels.linear_cross_entropy import tpu
from pallas_kernels.linear_cross_entropy.problem import Problem

TOKENS, VOCABULARY = 8192, 151552


def cases():
    return [_forward(4096), _backward(4096)]


def matrix():
    forwards = [_forward(width, entropy) for width in (4096, 5120) for entropy in (False, True)]
    return [*forwards, _forward(4096, tokens=100), _backward(4096), _backward(5120)]


def _arrays(tokens: int, width: int):
    shape = jax.ShapeDtypeStruct
    hidden, head = (shape((rows, width), jnp.bfloat16) for rows in (tokens, VOCABULARY))
    return hidden, head, shape((tokens,), jnp.int32)


def _forward(width: int, entropy: bool = False, tokens: int = TOKENS):
    def forward(hidden, head, targets):
        return linear_cross_entropy(
            hidden, head, targets, return_entropy=entropy, transpose_head=True, implementation="tpu"
        )

    name = f"linear_cross_entropy/forward{', entropy' * entropy}, T {tokens} D {width}"
    return name, forward, _arrays(tokens, width), 2 * width * (tokens + VOCABULARY), 2 * tokens * width * VOCABULARY


def _backward(width: int, entropy: bool = False, tokens: int = TOKENS):
    """From lse on: the forward pass is compiled by its own case."""

    def backward(hidden, head, targets, lse, *coefficients):
        problem = Problem(1.0, VOCABULARY, transpose_head=True, with_entropy=entropy)
        return tpu.backward(hidden, head, targets, lse, coefficients, problem=problem)

    name = f"linear_cross_entropy/backward{', entropy' * entropy}, T {tokens} D {width}"
    numbers = (jax.ShapeDtypeStruct((tokens,), jnp.float32),) * (3 + entropy)
    least_bytes, flops = 4 * width * (tokens + VOCABULARY), 6 * tokens * width * VOCABULARY
    return name, backward, (*_arrays(tokens, width), *numbers), least_bytes, flops
