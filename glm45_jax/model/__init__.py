"""The GLM-4.5 model as pure functions over one params tree."""

from glm45_jax.model.params import abstract_params, init_params, param_axes

__all__ = ["abstract_params", "init_params", "param_axes"]
