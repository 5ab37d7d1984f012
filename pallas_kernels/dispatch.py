"""Which implementation of an op runs: forced by name, or chosen by the platform that the program is lowered for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Implementation = str | Sequence[str] | None


def dispatch(
    implementations: Mapping[str, Callable[..., Any]],
    implementation: Implementation,
    *args: Any,
    default: str = "reference",
) -> Any:
    """Calls one of `implementations` on the arrays `args`.

    Args:
      implementations: by name; "reference" must be among them, "tpu", "gpu", "cpu" serve the platform they name.
      implementation: None to choose by lowering platform; a name, or names of which the first that exists is taken.
      default: the implementation of platforms that have none of their own.
    """
    if implementation is not None:
        names = [implementation] if isinstance(implementation, str) else list(implementation)
        for name in names:
            if name in implementations:
                return implementations[name](*args)
        raise ValueError(f"no implementation is called {' or '.join(names)}; there are {', '.join(implementations)}")
    platforms = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}
    branches = {platforms[name]: f for name, f in implementations.items() if name in platforms}
    return jax.lax.platform_dependent(*args, **branches, default=implementations[default])
