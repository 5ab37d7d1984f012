"""linear_cross_entropy for Hopper: a Mosaic GPU kernel for the forward pass, dense products by chunks for the backward.

Mosaic GPU is imported when a kernel is asked for: that takes a second, and on jax 0.10 absl-py.
"""

from __future__ import annotations

import functools

from pallas_kernels.linear_cross_entropy import chunked
from pallas_kernels.linear_cross_entropy.problem import Problem

_MOST_LOGITS = 160 << 20  # of a chunk of the backward pass: 320 MiB of bfloat16

backward = functools.partial(chunked.backward, most_logits=_MOST_LOGITS)


def forward(hidden, head, targets, *, problem: Problem):
    """lse [T], the target's logit [T] and, when it is wanted, the entropy [T]."""
    from pallas_kernels.linear_cross_entropy import gpu_forward

    return gpu_forward.forward(hidden, head, targets, problem=problem)
