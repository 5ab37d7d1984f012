"""Meshes, and the one table of rules from logical axes to mesh axes."""

from glm45_jax.parallel.sharding import RULES, make_mesh, tree_shardings

__all__ = ["RULES", "make_mesh", "tree_shardings"]
