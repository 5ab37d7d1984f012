"""Times functions on the device at hand, by turns, and measures what the device can do at most."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chip import chip_of_kind


@dataclasses.dataclass(frozen=True)
class Peak:
    """What the device can do at most, per second; `measured` where no data sheet says it."""

    device: str
    flops: float
    bytes: float
    measured: bool


def random_arrays(arguments: Any, seed: int = 0) -> Any:
    """Arrays for a tree of shapes: small normal numbers, integers in 0 to 99. What is concrete stays as it is."""
    leaves, tree = jax.tree.flatten(arguments)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [_random_array(key, x) for key, x in zip(keys, leaves)])


def _random_array(key: jax.Array, x: Any) -> jax.Array:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.random.randint(key, x.shape, 0, 100, x.dtype)
    return jax.jit(lambda key: (jax.random.normal(key, x.shape) * 0.1).astype(x.dtype))(key)


def time_by_turns(
    functions: Mapping[str, Callable[..., Any]],
    arguments: Any,
    seconds: float = 0.5,
    own_arguments: Mapping[str, Any] | None = None,
) -> dict[str, list[float] | str]:
    """Seconds of each call, the functions taking turns so that what else the machine does falls on all of them alike.

    An accelerator gets so many calls at once that the time to start one does not count, and each is given their mean.

    Args:
      seconds: about as long as each function is called for, three times at least.
      own_arguments: of the functions that take others.

    Returns: by name; why it cannot run, where it cannot.
    """
    ready: dict[str, Callable[..., Any]] = {}
    at_once: dict[str, int] = {}
    given = {name: (own_arguments or {}).get(name, arguments) for name in functions}
    times: dict[str, list[float] | str] = {}
    for name, f in functions.items():
        try:
            ready[name] = jax.jit(f)
            jax.block_until_ready(ready[name](*given[name]))
            at_once[name] = _calls_at_once(_seconds(ready[name], given[name]))
            times[name] = []
        except Exception as e:  # a kernel that this device cannot run is a result too
            ready.pop(name)
            times[name] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    spent = dict.fromkeys(ready, 0.0)
    turn = 0
    while ready and (turn < 3 or any(s < seconds for s in spent.values())):
        for name, f in ready.items():
            if turn < 3 or spent[name] < seconds:
                taken = _seconds(f, given[name], at_once[name])
                times[name].append(taken / at_once[name])  # pyright: ignore
                spent[name] += taken
        turn += 1
    return times


def _seconds(f: Callable[..., Any], arguments: Any, calls: int = 1) -> float:
    """Of so many calls that are all started before the first is waited for."""
    start = time.perf_counter()
    for _ in range(calls - 1):
        f(*arguments)
    jax.block_until_ready(f(*arguments))
    return time.perf_counter() - start


def _calls_at_once(seconds: float) -> int:
    """An accelerator takes them in turn; a CPU would run them side by side."""
    return 1 if jax.default_backend() == "cpu" else max(1, min(100, round(0.01 / seconds)))


def device_peak(dtype: Any) -> Peak:
    """Of the first device: a known chip's from its data sheet, else measured on a dense product and a vector's."""
    device = jax.devices()[0]
    chip = chip_of_kind(device.device_kind)
    if chip is not None:
        return Peak(chip.name, chip.bf16_flops_per_s, chip.memory_bytes_per_s, measured=False)
    n = 2048
    a, b = random_arrays((jax.ShapeDtypeStruct((n, n), dtype),) * 2)
    product = _best(lambda a, b: a @ b, a, b)
    wide = jax.ShapeDtypeStruct((16384, 4096), jnp.float32), jax.ShapeDtypeStruct((4096,), jnp.float32)
    matrix, vector = random_arrays(wide)
    read = _best(lambda m, v: m @ v, matrix, vector)
    return Peak(device.device_kind, 2.0 * n**3 / product, matrix.nbytes / read, measured=True)


def _best(f: Callable[..., Any], *arguments: Any) -> float:
    times = time_by_turns({"f": f}, arguments)["f"]
    assert not isinstance(times, str), times
    return min(times)
