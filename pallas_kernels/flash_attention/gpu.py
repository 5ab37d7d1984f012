"""Flash attention in Pallas Mosaic GPU, for Hopper. Axes as in `api.py`, heads first.

Mosaic GPU is imported when a kernel is asked for: that takes a second, and on jax 0.10 absl-py.
"""

from __future__ import annotations

from pallas_kernels.flash_attention.problem import Problem, Segments


def forward(q, k, v, segments: Segments, q_offset, *, problem: Problem):
    """[B, H, S, D], [B, K, T, D] twice -> [B, H, S, D] and the log-sum-exp [B, H, S].

    Raises NotImplementedError for what has no kernel.
    """
    from pallas_kernels.flash_attention import gpu_forward

    return gpu_forward.forward(q, k, v, segments, q_offset, problem=problem)


def backward(q, k, v, segments: Segments, q_offset, lse, delta, dout, *, problem: Problem):
    """dq, dk, dv; delta [B, H, S] is what all gradients of a query's scores have taken off: sum(dout * out) - dlse."""
    from pallas_kernels.flash_attention import gpu_backward

    return gpu_backward.backward(q, k, v, segments, q_offset, lse, delta, dout, problem=problem)
