"""The kernels' calls by other libraries, where these are installed and have them, for `glm45 bench kernels`.

Each takes the arguments of the call in `plan.kernels`; `prepared` lays them out as the library wants them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glm45_jax.plan.kernels import gradient_of
from pallas_kernels.analysis.cases import Case

Functions = dict[str, Callable[..., Any]]
_GRADIENTS_OF = {"forward": (), "dlhs": (0,), "drhs": (1,), "backward": (0, 1, 2)}


def peers(case: Case, platform: str) -> Functions:
    """By name; what this platform's peers cannot run says so when it is timed."""
    op, what = case.name.partition(", ")[0].split("/")
    of_op = {"grouped_matmul": _grouped_matmul, "flash_attention": _flash_attention}
    if op not in of_op or what not in _GRADIENTS_OF:
        return {}
    forward, wanted = of_op[op](platform), _GRADIENTS_OF[what]
    found = {name: gradient_of(f, *wanted) if wanted else f for name, f in forward.items()}
    return found | ({"dense, one matrix": _DENSE[what]} if op == "grouped_matmul" else {})


def prepared(case: Case, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as this peer takes them: the experts' matrices [E, K, N], where ours are [E, N, K]."""
    if case.op == "grouped_matmul" and name in ("tokamax", "megablox"):
        lhs, rhs, *rest = arguments
        return lhs, jnp.swapaxes(rhs, 1, 2), *rest
    return arguments


def _grouped_matmul(platform: str) -> Functions:
    found: Functions = {}
    if importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore

        found["tokamax"] = tokamax.ragged_dot
    if platform == "tpu":
        from jax.experimental.pallas.ops.tpu.megablox import gmm

        found["megablox"] = lambda lhs, rhs, groups: gmm(lhs, rhs, groups, lhs.dtype)
    return found


def _flash_attention(platform: str) -> Functions:
    found: Functions = {}
    if platform == "gpu":
        found["cuDNN"] = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    if importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore

        found["tokamax"] = lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True)
    return found


# the same products with one matrix for all rows: what the device's own library makes of them
_DENSE: Functions = {
    "forward": lambda lhs, rhs, groups: lhs @ rhs[0].T,
    "dlhs": lambda lhs, rhs, groups, dout: dout @ rhs[0],
    "drhs": lambda lhs, rhs, groups, dout: dout.T @ lhs,
}
