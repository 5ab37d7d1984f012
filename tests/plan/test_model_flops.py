"""Model FLOPs by hand, and beside what the program of one layer does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import glm45_jax as glm
from glm45_jax.config import ModelConfig, get_preset
from glm45_jax.plan.count import Counts, count
from glm45_jax.plan.model_flops import active_parameters, decode_flops, layer_parameters, prefill_flops, train_flops
from pallas_kernels.analysis.traffic import described

# attention's q, k, v, o; the router; three matrices of eight experts and of the shared one
LAYERS = {
    "glm-4.5-air": 4096 * (12288 + 1024 + 1024 + 12288) + 4096 * 128 + 9 * 3 * 4096 * 1408,
    "glm-4.5": 5120 * (12288 + 1024 + 1024 + 12288) + 5120 * 160 + 9 * 3 * 5120 * 1536,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_matrices(name: str) -> None:
    assert layer_parameters(get_preset(name), moe=True) == LAYERS[name]


def test_what_a_token_of_air_meets() -> None:
    c, head = get_preset("glm-4.5-air"), 151552 * 4096
    dense = 4096 * 26624 + 3 * 4096 * 10944
    without_mtp = dense + 45 * LAYERS["glm-4.5-air"] + head
    assert active_parameters(c, mtp=False) == without_mtp
    assert active_parameters(c) == without_mtp + LAYERS["glm-4.5-air"] + 2 * 4096**2 + head
    assert active_parameters(c.replace(num_nextn_predict_layers=0)) == without_mtp
    # the paper's 12B, with heads in place of the embeddings' rows, within a tenth
    assert active_parameters(c) == pytest.approx(12e9, rel=0.15)


def test_flops_of_steps() -> None:
    c, seq, head = get_preset("glm-4.5-air"), 4096, 151552 * 4096
    pairs = 4 * 96 * 128 * seq * seq / 2  # scores and values of one layer and sequence, forward
    assert train_flops(c, 8, seq) == 6 * active_parameters(c) * 8 * seq + 3 * 47 * 8 * pairs
    active = active_parameters(c, mtp=False)
    of_last_tokens = LAYERS["glm-4.5-air"] - 4096 * 2 * 1024 + head  # and of the last layer all tokens' keys and values
    products = (active - head) * seq - (of_last_tokens - head) * (seq - 1) + head
    assert prefill_flops(c, 8, seq) == 2 * products * 8 + 8 * (45 * pairs + 4 * 96 * 128 * seq)
    assert decode_flops(c, 8, seq) == 2 * active * 8 + 46 * 8 * 4 * 96 * 128 * seq


def counted(config: ModelConfig, tokens: int) -> Counts:
    """A forward pass of one row, for a TPU."""
    params = glm.abstract_params(config)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def hidden(params, ids):
        return glm.forward(params, config, ids).hidden

    with described("v5p"):
        jaxpr = jax.make_jaxpr(hidden)(params, ids)
    return count(jaxpr, [None] * (1 + len(jax.tree.leaves(params))), "tpu")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens"), [("glm-4.5-air", 2048), ("glm-4.5", 2560)])
def test_the_program_of_one_layer_does_what_the_hand_count_says(name: str, tokens: int) -> None:
    """128 rows for each expert: nothing is padded, so that the products are exactly those by hand."""
    config = get_preset(name, num_nextn_predict_layers=0)
    one, two = (counted(config.replace(first_k_dense_replace=0, num_hidden_layers=n), tokens) for n in (1, 2))
    attention = two.kernels["flash_attention_forward"].flops - one.kernels["flash_attention_forward"].flops
    assert two.flops - one.flops - attention == 2.0 * LAYERS[name] * tokens
    causal = 4.0 * config.num_attention_heads * config.head_dim * tokens**2 / 2
    assert causal <= attention <= 2 * causal  # whole blocks


def test_dense_layers_by_hand() -> None:
    config = get_preset("tiny", num_nextn_predict_layers=0, num_hidden_layers=1, first_k_dense_replace=1)
    counts = counted(config, 64)
    assert counts.xla_flops == 2.0 * 64 * layer_parameters(config, moe=False)  # no head: nobody asks for logits
