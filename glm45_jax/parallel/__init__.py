"""Meshes, the one table of rules from logical axes to mesh axes, and what devices exchange."""

from glm45_jax.parallel.device import device_in_force
from glm45_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from glm45_jax.parallel.sharding import RULES, SERVING_RULES, tree_shardings

__all__ = ["AXES", "RULES", "SERVING_RULES", "MeshConfig", "device_in_force", "make_mesh", "tree_shardings"]
