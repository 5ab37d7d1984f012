"""Which implementation of an op runs: forced by name, or chosen by the platform that the program is lowered for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.chip import chip_in_force

Implementation = str | Sequence[str] | None


def dispatch(
    implementations: Mapping[str, Callable[..., Any]],
    implementation: Implementation,
    *args: Any,
    default: str = "reference",
) -> Any:
    """Calls one of `implementations` on the arrays `args`.

    Left to choose, a program lowered for a TPU takes "tpu" and one for a CPU "cpu". One for CUDA takes `default`, and
    "gpu", made for Hopper, only where the mesh in force says that the device is one.

    Args:
      implementations: by name; "reference" must be among them, "tpu", "gpu", "cpu" serve the platform they name. One
        that cannot do what is asked raises NotImplementedError.
      implementation: None to choose by lowering platform; a name, or names of which the first that can is taken.
      default: the implementation of platforms that have none of their own.
    """
    if implementation is not None:
        names = [implementation] if isinstance(implementation, str) else list(implementation)
        return _first_that_can(implementations, names, args)
    branches = {
        platform: lambda *args, name=name: _first_that_can(implementations, (name, default), args)
        for name, platform in _platforms(implementations).items()
    }
    return jax.lax.platform_dependent(*args, **branches, default=implementations[default])


def _platforms(implementations: Mapping[str, Any]) -> dict[str, str]:
    """Which implementation serves which lowering platform of its own."""
    chip = chip_in_force()
    platforms = {"tpu": "tpu", "cpu": "cpu"} | ({"gpu": "cuda"} if chip is not None and chip.platform == "gpu" else {})
    return {name: platform for name, platform in platforms.items() if name in implementations}


def _first_that_can(
    implementations: Mapping[str, Callable[..., Any]], names: Sequence[str], args: Sequence[Any]
) -> Any:
    reasons = []
    for name in names:
        if name in implementations:
            try:
                return implementations[name](*args)
            except NotImplementedError as e:
                reasons.append(f"{name}: {e}")
    if reasons:
        raise NotImplementedError("; ".join(reasons))
    raise ValueError(f"no implementation is called {' or '.join(names)}; there are {', '.join(implementations)}")
