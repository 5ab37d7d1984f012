"""Which implementation of an op runs: forced by name, or chosen by the platform that the program is lowered for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.chip import platform_in_force

Implementation = str | Sequence[str] | None


def dispatch(
    implementations: Mapping[str, Callable[..., Any]],
    implementation: Implementation,
    *args: Any,
    default: str = "reference",
) -> Any:
    """Calls one of `implementations` on the arrays `args`.

    Left to choose, a program lowered for a TPU takes "tpu", one for a CPU "native" or else "cpu". One for CUDA takes
    `default`, and "gpu", made for Hopper, only where the mesh in force says that the device is one. Where it says
    what its devices are, other platforms' implementations are not traced.

    Args:
      implementations: by name; "reference" must be among them, "tpu", "gpu", "cpu" serve the platform they name,
        "native" CPUs. One that cannot do what is asked raises NotImplementedError.
      implementation: None to choose by lowering platform; a name, or names of which the first that can is taken.
      default: the implementation of platforms that have none of their own.
    """
    if implementation is not None:
        names = [implementation] if isinstance(implementation, str) else list(implementation)
        return _first_that_can(implementations, names, args)
    branches = {
        platform: lambda *args, names=names: _first_that_can(implementations, (*names, default), args)
        for platform, names in _platforms(implementations).items()
    }
    return jax.lax.platform_dependent(*args, **branches, default=implementations[default])


def _platforms(implementations: Mapping[str, Any]) -> dict[str, list[str]]:
    """Which implementations serve a lowering platform that has any of its own, in order of preference."""
    names = {"tpu": ("tpu", ["tpu"]), "cpu": ("cpu", ["native", "cpu"]), "gpu": ("cuda", ["gpu"])}
    platform = platform_in_force()
    possible = [names[p] for p in (["tpu", "cpu"] if platform is None else [platform])]
    own = {lowered: [name for name in of if name in implementations] for lowered, of in possible}
    return {lowered: of for lowered, of in own.items() if of}


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
