"""The device that kernels are made for."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.infer import generate
from glm45_jax.parallel import device_in_force, make_mesh
from pallas_kernels import dispatch
from tests.support import random_params, small_config


def _in_force():
    return jax.sharding.get_abstract_mesh()


def test_the_device_of_the_arrays_is_in_force_inside() -> None:
    assert _in_force().empty
    with device_in_force({"a": jnp.zeros(2), "b": np.zeros(2)}):
        assert _in_force().size == 1
        with device_in_force(jnp.zeros(2)):
            assert _in_force().size == 1
    assert _in_force().empty


def test_a_mesh_in_force_stays() -> None:
    mesh = make_mesh(jax.devices()[:1], tensor=1)
    with jax.set_mesh(mesh), device_in_force(jnp.zeros(2)):
        assert _in_force() == mesh.abstract_mesh


def test_several_devices_are_left_to_the_caller() -> None:
    with device_in_force(np.zeros(2)):  # and arrays that no device holds
        assert _in_force().empty


@pytest.mark.slow
def test_generation_makes_its_programs_for_the_device() -> None:
    config, seen = small_config(vocab_size=40), []
    with mock.patch.object(dispatch, "platform_in_force", lambda: seen.append(_in_force().size)):
        generate(random_params(config), config, [[1, 2, 3]], max_new_tokens=2)
    assert seen and set(seen) == {1}


def test_only_implementations_of_the_device_in_force_are_traced() -> None:
    """A program for a TPU has to have the TPU's; one for a device that is known need not be traced for others."""
    traced: list[str] = []

    def implementation(name: str):
        return lambda x: (traced.append(name), x)[1]

    def seen(*names: str) -> set[str]:
        traced.clear()
        jax.jit(lambda x: dispatch.dispatch({name: implementation(name) for name in names}, None, x))(jnp.zeros(2))
        return set(traced)

    every = ("reference", "tpu", "gpu", "native", "cpu")
    assert seen(*every) == {"native", "reference", "tpu"}
    with device_in_force(jnp.zeros(2)):
        assert seen(*every) == {"native", "reference"}
        assert seen("reference", "tpu") == {"reference"}
    for platform in ("tpu", "gpu"):
        with mock.patch.object(dispatch, "platform_in_force", lambda platform=platform: platform):
            assert seen(*every) == {platform, "reference"}
