"""The GLM-4.5 model as pure functions over one params tree."""

from glm45_jax.model.decoder import ForwardOutput, MTPOutput, forward, mtp_forward
from glm45_jax.model.params import Params, abstract_params, init_params, param_axes

__all__ = [
    "ForwardOutput",
    "MTPOutput",
    "Params",
    "abstract_params",
    "forward",
    "init_params",
    "mtp_forward",
    "param_axes",
]
