"""Kernels for mixture-of-experts models on TPU, GPU and CPU. Stands alone: imports nothing from `glm45_jax`.

Each op has one signature and several implementations; `implementation=None` lets the platform that a program is
lowered for choose, so that programs compiled for a TPU on a CPU host are the TPU's.
"""

from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.fused_moe.api import fused_moe
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_swiglu.api import grouped_swiglu
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy, weighted_linear_cross_entropy
from pallas_kernels.paged_attention.api import paged_attention

__all__ = [
    "flash_attention",
    "fused_moe",
    "grouped_matmul",
    "grouped_swiglu",
    "linear_cross_entropy",
    "paged_attention",
    "weighted_linear_cross_entropy",
]
