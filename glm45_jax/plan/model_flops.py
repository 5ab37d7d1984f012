"""The FLOPs that a model needs, by hand: what model FLOPs utilisation counts, whatever a program does beyond.

A token meets every matrix of its path once: attention's, the router, its experts, the shared expert or the dense MLP,
and the output head (twice with an MTP layer: its own head is a product too). Two FLOPs for each of a matrix's values
forward, four backward. Attention scores and their values come on top, of what a causal mask leaves. Nothing is counted
for recomputation, embeddings, norms, optimizer.
"""

from __future__ import annotations

from glm45_jax.config import ModelConfig


def layer_parameters(c: ModelConfig, moe: bool) -> int:
    """Values of the matrices that a token meets in one layer."""
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = d * (q + 2 * kv) + q * d
    if not moe:
        return attention + 3 * d * c.intermediate_size
    experts = 3 * d * c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
    return attention + d * c.n_routed_experts + experts


def active_parameters(c: ModelConfig, mtp: bool = True) -> int:
    """Values of the matrices that a token of training meets: all layers, the MTP layer (unless left out), the heads."""
    layers = c.num_dense_layers * layer_parameters(c, False) + c.num_moe_layers * layer_parameters(c, True)
    head = c.vocab_size * c.hidden_size
    extra = layer_parameters(c, True) + 2 * c.hidden_size**2 + head
    return layers + head + (extra if mtp and c.has_mtp else 0)


def attention_flops(c: ModelConfig, layers: int, queries_times_keys: float) -> float:
    """Forward, of scores and of their values: 4 for each pair of a query and a key that it sees, head and dimension."""
    return 4.0 * layers * c.num_attention_heads * c.head_dim * queries_times_keys


def train_flops(c: ModelConfig, batch_size: int, seq_len: int) -> float:
    """6 x active parameters x tokens, and attention's: half of all pairs, forward and twice that backward."""
    tokens = batch_size * seq_len
    layers = c.num_hidden_layers + c.has_mtp
    return 6.0 * active_parameters(c) * tokens + 3 * attention_flops(c, layers, batch_size * seq_len**2 / 2)


def prefill_flops(c: ModelConfig, batch_size: int, seq_len: int) -> float:
    """2 x active parameters x tokens, of the head and of the last layer what the last tokens and the cache need alone.

    No MTP layer.
    """
    head = c.vocab_size * c.hidden_size
    body = active_parameters(c, mtp=False) - head
    keys_values = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    for_last_alone = layer_parameters(c, moe=c.num_moe_layers > 0) - keys_values
    products = body * seq_len - for_last_alone * (seq_len - 1) + head
    pairs = (c.num_hidden_layers - 1) * seq_len**2 / 2 + seq_len
    return 2.0 * products * batch_size + attention_flops(c, 1, batch_size * pairs)


def decode_flops(c: ModelConfig, batch_size: int, seq_len: int) -> float:
    """Of one token for each row, which sees `seq_len` keys."""
    products = 2.0 * active_parameters(c, mtp=False) * batch_size
    return products + attention_flops(c, c.num_hidden_layers, batch_size * seq_len)
