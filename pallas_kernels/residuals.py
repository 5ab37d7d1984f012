"""What an op's backward pass needs beside the arguments, by a name that policies of `jax.checkpoint` can keep."""

from __future__ import annotations

from typing import Any

from jax.ad_checkpoint import checkpoint_name

RESIDUAL = "kept"


def keep(x: Any) -> Any:
    """x, kept by the policy `jax.checkpoint_policies.save_only_these_names(RESIDUAL)`."""
    return checkpoint_name(x, RESIDUAL)
