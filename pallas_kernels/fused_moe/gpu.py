"""The routed experts of a few tokens by two Pallas Mosaic GPU kernels, for Hopper: SwiGLU, then down.

The rows of an expert are one tile, so that its weights are read once, and no other's. Sorting and the weighted
sum are XLA's. Axes as in `api.py`.
"""

from __future__ import annotations

import functools

from pallas_kernels.fused_moe import reference

forward = functools.partial(reference.forward, implementation="gpu")
