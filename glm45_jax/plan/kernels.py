"""The kernels' calls in a model of the family: what `glm45 plan kernels` and `glm45 bench kernels` look at.

Each call says the least bytes that it could move (every operand that it needs read once, every result written once) and
the FLOPs that its result needs, a recomputed product included where the op stores none.

Axes: M routed rows, D model, F expert width, E experts held by the device, T tokens, k experts per token, B batch,
S sequence, H heads, K kv heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from glm45_jax.config import ModelConfig, get_preset
from pallas_kernels.analysis.cases import Case
from pallas_kernels.analysis.kernel import item_bytes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the calls.

    Attributes:
      rows: routed rows of a device in training (tokens times experts per token, over the devices).
      experts: held by the device.
      decoded: tokens of the decoding steps.
      groups: how the rows are spread over the experts, "balanced", "zipf" or "one".
      page_size: tokens of a page of the KV cache.
      tokens, sequence: of a device in training; the sequence also is what the KV cache holds of each decoded one.
    """

    rows: int = 8192
    experts: int = 16
    groups: str = "balanced"
    decoded: tuple[int, ...] = (1, 8, 64, 256)
    tokens: int = 8192
    sequence: int = 4096
    page_size: int = 64
    dtype: str = "bfloat16"


def kernel_cases(
    model: str = "glm-4.5-air", op: str | None = None, implementation: Any = None, **sizes: Any
) -> list[Case]:
    """The calls of a preset's kernels; `sizes` are fields of `Sizes`.

    Args:
      op: only this one's.
      implementation: as the ops take it.
    """
    return cases_of(get_preset(model), Sizes(**sizes), op, implementation)


def cases_of(config: ModelConfig, sizes: Sizes, op: str | None = None, implementation: Any = None) -> list[Case]:
    sizes = dataclasses.replace(sizes, experts=min(sizes.experts, config.n_routed_experts))
    make = {
        "grouped_matmul": _grouped_matmul,
        "grouped_swiglu": _grouped_swiglu,
        "fused_moe": _fused_moe,
        "flash_attention": _flash_attention,
        "paged_attention": _paged_attention,
        "linear_cross_entropy": _linear_cross_entropy,
    }
    ops = [name for name in make if op in (None, name)]
    return [case for name in ops for case in make[name](config, sizes, implementation)]


def nbytes(*trees: Any) -> float:
    """Of arrays or shapes."""
    return sum(math.prod(x.shape) * item_bytes(x.dtype) for x in jax.tree.leaves(trees))


def gradient_of(f: Callable[..., Any], *which: int) -> Callable[..., Any]:
    """(arguments..., cotangent) -> the gradients of the arguments `which`; the others are not differentiated."""

    def gradient(*args: Any) -> Any:
        args, cotangent = args[:-1], args[-1]

        def of(*chosen: Any) -> Any:
            full = list(args)
            for i, x in zip(which, chosen):
                full[i] = x
            return f(*full)

        out = jax.vjp(of, *(args[i] for i in which))[1](cotangent)
        return out[0] if len(which) == 1 else out

    return gradient


def group_sizes(rows: int, groups: int, how: str) -> np.ndarray:
    """Sizes that sum to `rows`: "balanced", as equal as can be; "zipf", the i-th as 1 / i; "one", all in one."""
    share = {"balanced": np.ones(groups), "zipf": 1 / np.arange(1, groups + 1), "one": np.eye(groups)[groups // 2]}
    if how not in share:
        raise ValueError(f"groups are {', '.join(share)}, not {how!r}")
    ends = np.cumsum(share[how]) / share[how].sum() * rows
    return np.diff(np.round(ends).astype(np.int32), prepend=np.int32(0))


def _touched(groups: np.ndarray) -> float:
    """The share of groups that have rows: the others' weights need not be read."""
    return float((groups > 0).mean())


def _shape(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _case(name: str, f: Callable[..., Any], args: tuple[Any, ...], flops: float, least: float | None = None) -> Case:
    if least is None:
        least = nbytes(args, jax.eval_shape(f, *args))
    return Case(name, f, args, least, flops)


def _grouped_matmul(c: ModelConfig, s: Sizes, implementation: Any) -> Iterator[Case]:
    """The experts' down projection, and its two gradients."""
    m, d, f, e = s.rows, c.hidden_size, c.moe_intermediate_size, s.experts
    lhs, rhs, dout = _shape(s.dtype, m, f), _shape(s.dtype, e, d, f), _shape(s.dtype, m, d)
    groups, flops = group_sizes(m, e, s.groups), 2.0 * m * d * f

    def op(lhs, rhs, groups):
        return pallas_kernels.grouped_matmul(lhs, rhs, groups, transpose_rhs=True, implementation=implementation)

    what = f"[{m}, {f}] x [{e}, {d}, {f}]"
    rows = nbytes(lhs, dout, groups)
    least = rows + nbytes(rhs) * _touched(groups)
    yield _case(f"grouped_matmul/forward, {what}", op, (lhs, rhs, groups), flops, least)
    yield _case(f"grouped_matmul/dlhs, {what}", gradient_of(op, 0), (lhs, rhs, groups, dout), flops, least)
    least = rows + nbytes(rhs)  # experts without rows get a gradient of zeros
    yield _case(f"grouped_matmul/drhs, {what}", gradient_of(op, 1), (lhs, rhs, groups, dout), flops, least)


def _grouped_swiglu(c: ModelConfig, s: Sizes, implementation: Any) -> Iterator[Case]:
    m, d, f, e = s.rows, c.hidden_size, c.moe_intermediate_size, s.experts
    lhs, weight, dout = _shape(s.dtype, m, d), _shape(s.dtype, e, f, d), _shape(s.dtype, m, f)
    groups, product = group_sizes(m, e, s.groups), 2.0 * m * d * f

    def op(lhs, gate, up, groups):
        return pallas_kernels.grouped_swiglu(lhs, gate, up, groups, transpose_rhs=True, implementation=implementation)

    what = f"[{m}, {d}] x 2 [{e}, {f}, {d}]"
    args = (lhs, weight, weight, groups)
    read = nbytes(lhs, dout, groups) + nbytes(weight, weight) * _touched(groups)  # dout, or the result
    yield _case(f"grouped_swiglu/forward, {what}", op, args, 2 * product, read)
    # both products again, and of each the gradients of its two sides
    least = read + nbytes(lhs, weight, weight)
    yield _case(f"grouped_swiglu/backward, {what}", gradient_of(op, 0, 1, 2), (*args, dout), 6 * product, least)


def _fused_moe(c: ModelConfig, s: Sizes, implementation: Any) -> Iterator[Case]:
    d, f, e = c.hidden_size, c.moe_intermediate_size, s.experts
    k = min(c.num_experts_per_tok, e)
    up, down = _shape(s.dtype, 1, e, f, d), _shape(s.dtype, 1, e, d, f)

    def op(x, gate, up, down, indices, weights):
        return pallas_kernels.fused_moe(
            x, gate, up, down, indices, weights, layer=0, transpose_rhs=True, implementation=implementation
        )

    rng = np.random.default_rng(0)
    for t in s.decoded:
        indices = np.stack([rng.permutation(e)[:k] for _ in range(t)]).astype(np.int32)
        x, touched = _shape(s.dtype, t, d), len(np.unique(indices))
        weights = _shape("float32", t, k)
        least = nbytes(x, x, indices, weights) + nbytes(up, up, down) * touched / e
        args = (x, up, up, down, indices, weights)
        yield _case(f"fused_moe/{t} tokens, {touched} of {e} experts", op, args, 6.0 * t * k * d * f, least)


def _flash_attention(c: ModelConfig, s: Sizes, implementation: Any) -> Iterator[Case]:
    b, h, kv, size = max(1, s.tokens // s.sequence), c.num_attention_heads, c.num_key_value_heads, c.head_dim
    q, k = _shape(s.dtype, b, s.sequence, h, size), _shape(s.dtype, b, s.sequence, kv, size)
    product = b * h * size * float(s.sequence) ** 2  # of causal scores: half of all, two FLOPs each

    def op(q, k, v):
        return pallas_kernels.flash_attention(q, k, v, implementation=implementation)

    what = f"{b} x {s.sequence} tokens, {h} heads, {kv} kv heads"
    yield _case(f"flash_attention/forward, {what}", op, (q, k, k), 2 * product)
    lse = 4 * b * s.sequence * h
    least = nbytes(q, k, k, q, q) + lse + nbytes(q, k, k)  # q k v, the result, its cotangent; their gradients
    yield _case(f"flash_attention/backward, {what}", gradient_of(op, 0, 1, 2), (q, k, k, q), 5 * product, least)


def _paged_attention(c: ModelConfig, s: Sizes, implementation: Any) -> Iterator[Case]:
    """A decoding step, every row at the full sequence, and a chunk of a prompt among decoding rows."""
    h, kv, size = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    per_row = -(-s.sequence // s.page_size)
    rows = max(t for t in s.decoded if t <= 64)
    chunk = min(512, s.sequence)
    for what, new in {"decode": [1] * rows, "mixed": [chunk] + [1] * (rows - 1)}.items():
        n = sum(new)
        q, k = _shape(s.dtype, n, h, size), _shape(s.dtype, n, kv, size)
        pages = _shape(s.dtype, rows * per_row, kv, s.page_size, 2 * size)
        table = np.arange(rows * per_row, dtype=np.int32).reshape(rows, per_row)
        lengths, starts = np.full(rows, s.sequence, np.int32), np.cumsum([0, *new]).astype(np.int32)

        def op(q, k, v, pages, table, lengths, starts, live):
            return pallas_kernels.paged_attention(
                q, k, v, pages, table, lengths, starts, live, implementation=implementation
            )

        seen = sum(m * s.sequence - m * (m - 1) // 2 for m in new)  # positions that all the queries see
        cached = rows * s.sequence * kv * 2 * size * item_bytes(s.dtype)
        least = nbytes(q, k, k, q, k, k) + cached  # the new keys and values are written too
        args = (q, k, k, pages, table, lengths, starts, np.int32(rows))
        yield _case(f"paged_attention/{what}, {n} tokens of {rows} rows", op, args, 4.0 * h * size * seen, least)


def _linear_cross_entropy(c: ModelConfig, s: Sizes, implementation: Any) -> Iterator[Case]:
    t, d, v = s.tokens, c.hidden_size, c.vocab_size
    hidden, head = _shape(s.dtype, t, d), _shape(s.dtype, v, d)
    targets = _shape("int32", t)

    def op(hidden, head, targets):
        return pallas_kernels.linear_cross_entropy(
            hidden, head, targets, transpose_head=True, implementation=implementation
        )

    what, product = f"[{t}, {d}] x [{v}, {d}]", 2.0 * t * d * v
    yield _case(f"linear_cross_entropy/forward, {what}", op, (hidden, head, targets), product)
    args = (hidden, head, targets, _shape("float32", t))
    yield _case(f"linear_cross_entropy/backward, {what}", gradient_of(op, 0, 1), args, 3 * product)

    def training(hidden, head, targets, weights):
        loss = lambda hidden, head: pallas_kernels.weighted_linear_cross_entropy(  # noqa: E731
            hidden, head, targets, weights, transpose_head=True, implementation=implementation
        )
        return jax.value_and_grad(loss, (0, 1))(hidden, head)

    yield _case(f"linear_cross_entropy/training, {what}", training, args, 3 * product)
