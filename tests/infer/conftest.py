"""The tests of this folder run small models, whose time is all compilation: their programs are compiled quickly."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

import glm45_jax.infer.generate  # noqa: F401
from glm45_jax.infer import loop, programs
from tests.support import quick_jit

generate_module = sys.modules["glm45_jax.infer.generate"]  # its name in the package is the function's


@pytest.fixture(scope="package", autouse=True)
def quick_programs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        start = quick_jit(loop.start.__wrapped__, static_argnames=("config", "capacity", "penalties"))
        advance = quick_jit(loop.advance.__wrapped__, static_argnames="config", donate_argnames="state")
        patch.setattr(generate_module, "start", start)
        patch.setattr(generate_module, "advance", advance)
        for name in ("_read", "_draft", "_step"):
            function = getattr(programs, name).__wrapped__
            jitted = quick_jit(function, static_argnames=("config", "sizes", "most"), donate_argnames="pages")
            patch.setattr(programs, name, jitted)
        patch.setattr(programs, "_choose", quick_jit(programs._choose.__wrapped__))
        yield
