"""The least bytes of a step of decoding, and the speed-up that they allow speculation.

A step reads every weight that some token meets once, and every sequence's keys and values once. Of E experts T tokens
meet E (1 - (1 - k/E)^T) on average, each token k of them at random: a second token of a sequence meets others, so that
verifying a draft costs bytes where the batch is small, and hardly any where all experts are read anyway.

Axes: B sequences, T tokens, E experts, k experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from glm45_jax.config import ModelConfig
from glm45_jax.model import abstract_params, quantize_params
from glm45_jax.plan.programs import Storage
from pallas_kernels.analysis.kernel import item_bytes


def experts_met(config: ModelConfig, tokens: float) -> float:
    """Different experts of a layer that `tokens` tokens meet, on average."""
    experts = config.n_routed_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** tokens)


def weight_bytes(config: ModelConfig, tokens: float, storage: Storage, part: str = "main") -> float:
    """Of the weights that a step of `tokens` tokens reads, all devices together.

    Of the embedding the tokens' rows. Scales count; what a mesh holds twice counts once.

    Args:
      part: "main", the model without its MTP layer; "mtp", the layer alone, with the output head that it uses.
    """
    params: Any = abstract_params(config)
    if storage.weights is not None:
        form: Any = storage.weights
        params = jax.eval_shape(lambda p: quantize_params(p, config, form), params)
    embedding = item_bytes(params["embed"]["weight"].dtype) * config.hidden_size * tokens
    head = _nbytes(params.get("head", params["embed"]))
    if part == "mtp":
        layer = {name: value for name, value in params["mtp"].items() if name != "embed"}
        own = 0.0 if config.mtp_own_head else head
        return embedding + own + _met(config, layer, tokens)
    layers = {name: value for name, value in params.items() if name not in ("embed", "mtp", "head")}
    return embedding + head + _met(config, layers, tokens)


def _met(config: ModelConfig, tree: Any, tokens: float) -> float:
    share = experts_met(config, tokens) / config.n_routed_experts
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return sum(_nbytes(x) * (share if any("experts" in str(key) for key in path) else 1.0) for path, x in flat)


def _nbytes(tree: Any) -> float:
    return sum(float(math.prod(x.shape)) * item_bytes(x.dtype) for x in jax.tree.leaves(tree))


def cache_bytes(config: ModelConfig, sequences: float, seq_len: float, storage: Storage, layers: int) -> float:
    """Of the keys and values of `layers` layers that are read, and the new ones written."""
    size = 1 if storage.cache else np.dtype(jax.numpy.dtype(config.dtype)).itemsize
    return sequences * (seq_len + 1) * layers * 2 * config.num_key_value_heads * config.head_dim * size


def least_bytes(config: ModelConfig, batch_size: int, seq_len: int, storage: Storage) -> float:
    """Of a step in which every sequence decodes one token, all devices together."""
    cache = cache_bytes(config, batch_size, seq_len, storage, config.num_hidden_layers)
    return weight_bytes(config, batch_size, storage) + cache


def speculative_bytes(config: ModelConfig, batch_size: int, seq_len: int, drafts: int, storage: Storage) -> float:
    """Of a step that verifies `drafts` drafts of each sequence and drafts as many: the main model over all tokens, the
    MTP layer over them too, and then over one token of each sequence for every further draft."""
    tokens = batch_size * (1 + drafts)
    main = weight_bytes(config, tokens, storage)
    main += cache_bytes(config, batch_size, seq_len, storage, config.num_hidden_layers)
    own = cache_bytes(config, batch_size, seq_len, storage, 1)
    chain = (drafts - 1) * (weight_bytes(config, batch_size, storage, "mtp") + own)
    return main + weight_bytes(config, tokens, storage, "mtp") + own + chain


def speculation_ceiling(
    config: ModelConfig, batch_size: int, seq_len: int, drafts: int, acceptance: float, storage: Storage
) -> float:
    """Tokens per second with drafts over those without, if bytes were all that took time.

    Each draft holds with probability `acceptance` where those before it did.
    """
    tokens = sum(acceptance**i for i in range(drafts + 1))
    plain = least_bytes(config, batch_size, seq_len, storage)
    return tokens * plain / speculative_bytes(config, batch_size, seq_len, drafts, storage)
