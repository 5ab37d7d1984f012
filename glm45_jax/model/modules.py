"""The parameters of the model, each declared once: shape, dtype, logical axes and initialiser.

The modules hold parameters and nothing else; the forward pass is functions over them (`attention.py`, `moe.py`,
`decoder.py`). Matrices keep the checkpoint's [out, in], so that conversion copies bytes and CPU decoding reads rows.
Initialisers follow the published model: normal with std `initializer_range` for matrices, ones for norms, zeros for
biases and for the router's selection bias.

Axes: V vocabulary, D model, H query heads, K kv heads, h head dim, I dense width, F expert width, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from glm45_jax.config import ModelConfig

Axes = tuple[str | None, ...]


def _param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, init: jax.nn.initializers.Initializer, dtype: str
) -> nnx.Param:
    # `axes` is our own metadata key: flax resolves its own sharding names as mesh axes at once, and fails without one.
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes)


class Linear(nnx.Module):
    """A matrix [out, in] and, where the checkpoint has one, its bias [out]."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs, n_out: int, n_in: int, axes: Axes, bias: bool = False):
        normal = jax.nn.initializers.normal(c.initializer_range)
        self.weight = _param(rngs, (n_out, n_in), axes, normal, c.param_dtype)
        if bias:
            self.bias = _param(rngs, (n_out,), axes[:1], jax.nn.initializers.zeros, c.param_dtype)


class Norm(nnx.Module):
    """The scale of an RMSNorm over `dim` values."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs, dim: int, axis: str | None = "norm"):
        self.scale = _param(rngs, (dim,), (axis,), jax.nn.initializers.ones, c.param_dtype)


class Attention(nnx.Module):
    """Grouped-query attention: biases on q, k, v only; one norm over the head dim for all q heads, one for all k."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q = Linear(c, rngs, q, d, ("heads", "embed"), bias=c.attention_bias)
        self.k = Linear(c, rngs, kv, d, ("kv_heads", "embed"), bias=c.attention_bias)
        self.v = Linear(c, rngs, kv, d, ("kv_heads", "embed"), bias=c.attention_bias)
        self.o = Linear(c, rngs, d, q, ("embed", "heads"))
        if c.use_qk_norm:
            self.q_norm = Norm(c, rngs, c.head_dim, axis=None)
            self.k_norm = Norm(c, rngs, c.head_dim, axis=None)


class MLP(nnx.Module):
    """SwiGLU of width `width`: the dense layers' MLP, and the shared expert."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs, width: int):
        d = c.hidden_size
        self.gate = Linear(c, rngs, width, d, ("mlp", "embed"))
        self.up = Linear(c, rngs, width, d, ("mlp", "embed"))
        self.down = Linear(c, rngs, d, width, ("embed", "mlp"))


class Router(nnx.Module):
    """Scores every expert; `bias` is e_score_correction_bias: it selects, never weighs, and is float32 always."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        shape, normal = (c.n_routed_experts, c.hidden_size), jax.nn.initializers.normal(c.initializer_range)
        self.weight = _param(rngs, shape, ("router", "embed"), normal, c.param_dtype)
        self.bias = _param(rngs, shape[:1], ("router",), jax.nn.initializers.zeros, "float32")


class Experts(nnx.Module):
    """All routed experts of a layer: gate, up [E, F, D] and down [E, D, F]."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        e, f, d = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
        normal = jax.nn.initializers.normal(c.initializer_range)
        self.gate = _param(rngs, (e, f, d), ("experts", "expert_mlp", "expert_embed"), normal, c.param_dtype)
        self.up = _param(rngs, (e, f, d), ("experts", "expert_mlp", "expert_embed"), normal, c.param_dtype)
        self.down = _param(rngs, (e, d, f), ("experts", "expert_embed", "expert_mlp"), normal, c.param_dtype)


class MoE(nnx.Module):
    """Router, routed experts, and the shared expert (several published as one of n_shared_experts times the width)."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.router = Router(c, rngs)
        self.experts = Experts(c, rngs)
        if c.n_shared_experts:
            self.shared = MLP(c, rngs, c.moe_intermediate_size * c.n_shared_experts)


class Block(nnx.Module):
    """One decoder layer: attention, then a dense MLP (`moe` False) or experts."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs, *, moe: bool):
        self.input_norm = Norm(c, rngs, c.hidden_size)
        self.attention = Attention(c, rngs)
        self.post_attention_norm = Norm(c, rngs, c.hidden_size)
        if moe:
            self.moe = MoE(c, rngs)
        else:
            self.mlp = MLP(c, rngs, c.intermediate_size)


class Embedding(nnx.Module):
    """The rows of the vocabulary [V, D]: the embedding, and the output head."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(c.initializer_range)
        self.weight = _param(rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"), normal, c.param_dtype)


class MTP(nnx.Module):
    """The multi-token-prediction layer: joins the next token's embedding with the hidden state, then one MoE block."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.enorm = Norm(c, rngs, c.hidden_size)
        self.hnorm = Norm(c, rngs, c.hidden_size)
        self.eh_proj = Linear(c, rngs, c.hidden_size, 2 * c.hidden_size, ("embed", None))
        self.block = Block(c, rngs, moe=True)
        self.norm = Norm(c, rngs, c.hidden_size)
        if c.mtp_own_embed:
            self.embed = Embedding(c, rngs)
        if c.mtp_own_head:
            self.head = Embedding(c, rngs)


class Outer(nnx.Module):
    """What stands around the stacked layers: embedding, final norm, head, MTP layer."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.embed = Embedding(c, rngs)
        self.final_norm = Norm(c, rngs, c.hidden_size)
        if not c.tie_word_embeddings:
            self.head = Embedding(c, rngs)
        if c.has_mtp:
            self.mtp = MTP(c, rngs)
