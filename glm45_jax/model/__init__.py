"""The GLM-4.5 model as pure functions over one params tree."""

from glm45_jax.model.decode import KVCache, decode_step, init_cache, prefill
from glm45_jax.model.decoder import ForwardOutput, MTPOutput, forward, mtp_forward
from glm45_jax.model.paged import Ragged, init_pages, mtp_paged_step, paged_step
from glm45_jax.model.params import Params, abstract_params, init_params, param_axes, param_shardings, shardings_of
from glm45_jax.model.quantize import quantize_params
from glm45_jax.model.quantized import Quantized

__all__ = [
    "ForwardOutput",
    "KVCache",
    "MTPOutput",
    "Params",
    "Quantized",
    "Ragged",
    "abstract_params",
    "decode_step",
    "forward",
    "init_cache",
    "init_pages",
    "init_params",
    "mtp_forward",
    "mtp_paged_step",
    "paged_step",
    "param_axes",
    "param_shardings",
    "prefill",
    "quantize_params",
    "shardings_of",
]
