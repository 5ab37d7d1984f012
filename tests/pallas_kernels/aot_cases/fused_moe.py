"""fused_moe as GLM-4.5 and Air decode. Axes: T tokens, D model, F expert width, E experts, k experts per token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import fused_moe
from pallas_kernels.analysis.cases import Case
from tests.pallas_kernels.aot_cases.grouped_matmul import nbytes

AIR, FULL = {"d": 4096, "f": 1408, "experts": 128}, {"d": 5120, "f": 1536, "experts": 160}


def cases() -> list[Case]:
    return [forward(64, **AIR)]


def matrix() -> list[Case]:
    plain = [forward(tokens, **sizes) for sizes in (AIR, FULL) for tokens in (1, 8, 64, 256)]
    kinds = [(jnp.int8, "channel"), (jnp.float8_e4m3fn, "block")]
    quantised = [forward(64, **AIR, weights=weights, per=per) for weights, per in kinds]
    shard = {**FULL, "experts": 20, "of": 160}
    return [*plain, *quantised, forward(64, **AIR, transpose=False), forward(256, **shard)]


def forward(
    tokens: int, d: int, f: int, experts: int, *, of: int | None = None, weights: Any = jnp.bfloat16,
    per: str = "channel", transpose: bool = True, layers: int = 2,
) -> Case:  # fmt: skip
    """The experts of a layer out of a stack, or of them the first shard of all `of` experts."""
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(of or experts)[:8] for _ in range(tokens)]).astype(np.int32)
    x = jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16)
    turned = lambda a, b: (b, a) if transpose else (a, b)  # noqa: E731
    inner = [(d, f), (d, f), (f, d)]
    matrices = [jax.ShapeDtypeStruct((layers, experts, *turned(*size)), weights) for size in inner]
    blocks = [(1, n) if per == "channel" else (k // 128, n // 128) for k, n in inner]
    scales = [jax.ShapeDtypeStruct((layers, experts, *size), jnp.float32) for size in blocks]
    scales = scales if jnp.dtype(weights).itemsize == 1 else []
    names = ("gate_scale", "up_scale", "down_scale")

    def op(x, matrices, scales, indices, share):
        return fused_moe(
            x, *matrices, indices, share, **dict(zip(names, scales)), layer=1, transpose_rhs=transpose,
            expert_offset=None if of is None else 0, implementation="tpu",
        )  # fmt: skip

    touched = np.unique(indices[indices < experts]).size / (layers * experts)
    share = jax.ShapeDtypeStruct(indices.shape, jnp.float32)
    least = touched * nbytes(matrices, scales) + 2 * nbytes(x) + nbytes(indices, share)
    what = f"T={tokens} D={d} F={f} E={experts}{f' of {of}' if of else ''}, {jnp.dtype(weights)}"
    what += (f" per {per}" if scales else "") + ("" if transpose else " KN")
    flops = 6.0 * (indices < experts).sum() * d * f
    return Case(f"fused_moe/forward, {what}", op, (x, matrices, scales, indices, share), least, flops)
