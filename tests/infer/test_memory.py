"""Compiled decoding writes its cache in place: what it needs besides is small, on CPU and compiled for a TPU.

Caches are only described here, never made. Head dimension and width of experts are multiples of 128, as in every
released model: narrower weights have a compact layout on TPU, which is no kernel's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm45_jax as glm
from glm45_jax.config import ModelConfig, get_preset
from glm45_jax.infer import loop
from pallas_kernels.analysis.compile import described_mesh
from tests.infer.conftest import generate_module

ROWS, CAPACITY = 8, 1024
CONFIG = get_preset(
    "tiny", hidden_size=128, num_hidden_layers=4, vocab_size=512, num_attention_heads=4, num_key_value_heads=2,
    head_dim=128, moe_intermediate_size=128, num_nextn_predict_layers=0, max_position_embeddings=CAPACITY,
)  # fmt: skip


def programs(config: ModelConfig, place: Callable[[Any], Any]) -> dict[str, Any]:
    """`decode_step` and the loop around it, traced."""
    batch = generate_module._prepare(config, [[1]] * ROWS, CAPACITY - 1, None, None, {})  # type: ignore
    assert batch.capacity == CAPACITY
    params = glm.abstract_params(config)
    state = jax.eval_shape(
        lambda p: loop.start(p, config, batch.tokens, batch.controls, capacity=CAPACITY, penalties=False), params
    )
    step = jax.jit(glm.decode_step, static_argnums=1, donate_argnums=2)
    halt = np.zeros(ROWS, bool)
    return {
        "decode_step": step.trace(place(params), config, place(state.cache), place(state.tokens)),
        "advance": loop.advance.trace(
            place(params), config, place(state), place(batch.controls), place(np.int32(4)), place(halt)
        ),
    }


def cache_bytes(config: ModelConfig) -> int:
    size = jnp.dtype(config.dtype).itemsize
    return config.kv_cache_bytes_per_token(size) * ROWS * CAPACITY


@pytest.mark.slow
@pytest.mark.parametrize("program", ["decode_step", pytest.param("advance", marks=pytest.mark.slow)])
def test_on_cpu(program) -> None:
    memory = programs(CONFIG, lambda x: x)[program].lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * cache_bytes(CONFIG)
    assert memory.alias_size_in_bytes >= cache_bytes(CONFIG)


@pytest.fixture(scope="module")
def on_tpu() -> Callable[[Any], Any]:
    """Describes arrays as lying on one chip of a TPU v5p that is not there."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    sharding = jax.sharding.NamedSharding(described_mesh("v5p"), jax.sharding.PartitionSpec())
    return lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("program", ["decode_step", "advance"])
def test_compiled_for_tpu(program, dtype, on_tpu) -> None:
    config = CONFIG.replace(dtype=dtype, param_dtype=dtype)
    memory = programs(config, on_tpu)[program].lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * cache_bytes(config)
    assert memory.alias_size_in_bytes >= cache_bytes(config)
