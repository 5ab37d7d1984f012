"""The one table of names: Hugging Face's tensor names on the left, places in our params tree on the right.

Both directions of every conversion, the checks of shapes and the MTP layer's parts come from here. `{e}` is the number
of an expert. The shapes are those of `abstract_params(config)`: a tensor called `model.layers.7.…` fills one slot of
the stacked array, `params[path][index]`. Source of the names: the published checkpoints' indexes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import jax

from glm45_jax.config import ModelConfig
from glm45_jax.model.params import abstract_params

OUTER = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "final_norm.scale",
    "lm_head.weight": "head.weight",
}
LAYER = {  # after "model.layers.{l}."
    "input_layernorm.weight": "input_norm.scale",
    "self_attn.q_proj.weight": "attention.q.weight",
    "self_attn.q_proj.bias": "attention.q.bias",
    "self_attn.k_proj.weight": "attention.k.weight",
    "self_attn.k_proj.bias": "attention.k.bias",
    "self_attn.v_proj.weight": "attention.v.weight",
    "self_attn.v_proj.bias": "attention.v.bias",
    "self_attn.o_proj.weight": "attention.o.weight",
    "self_attn.q_norm.weight": "attention.q_norm.scale",
    "self_attn.k_norm.weight": "attention.k_norm.scale",
    "post_attention_layernorm.weight": "post_attention_norm.scale",
    # a dense layer
    "mlp.gate_proj.weight": "mlp.gate.weight",
    "mlp.up_proj.weight": "mlp.up.weight",
    "mlp.down_proj.weight": "mlp.down.weight",
    # a MoE layer
    "mlp.gate.weight": "moe.router.weight",
    "mlp.gate.e_score_correction_bias": "moe.router.bias",
    "mlp.experts.{e}.gate_proj.weight": "moe.experts.gate",
    "mlp.experts.{e}.up_proj.weight": "moe.experts.up",
    "mlp.experts.{e}.down_proj.weight": "moe.experts.down",
    "mlp.shared_experts.gate_proj.weight": "moe.shared.gate.weight",
    "mlp.shared_experts.up_proj.weight": "moe.shared.up.weight",
    "mlp.shared_experts.down_proj.weight": "moe.shared.down.weight",
}
MTP = {  # after "model.layers.{num_hidden_layers}.", beside the names of a MoE layer, which fill `mtp.block`
    "enorm.weight": "enorm.scale",
    "hnorm.weight": "hnorm.scale",
    "eh_proj.weight": "eh_proj.weight",
    "shared_head.norm.weight": "norm.scale",
    "shared_head.head.weight": "head.weight",
    "embed_tokens.weight": "embed.weight",
}
# All experts of a layer in one tensor, as transformers v5 holds them in memory: [E, rows of each part, columns].
FUSED = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{e}.down_proj.weight",),
}
# What follows a matrix's name in the two FP8 forms: one scale per output channel (compressed-tensors, the official
# GLM-4.5-FP8), or one per block of 128 x 128. Both multiply the codes.
SCALE_SUFFIXES = {"channel": "_scale", "block": "_scale_inv"}
SCALE = "_scale"  # in our tree: `….weight_scale` beside `….weight`


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor: `params[path][index]`, of shape `shape`."""

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


def flatten(tree: dict) -> dict[str, object]:
    """A nested dict as {dotted path: leaf}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{rest}": leaf for rest, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: dict[str, object]) -> dict:
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def flat_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of every array of this model."""
    return flatten(abstract_params(config))  # pyright: ignore[reportReturnType]


def hf_slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of this model's checkpoint, in the order of the forward pass: Hugging Face's name -> its slot."""
    shapes = flat_shapes(config)
    slots: dict[str, Slot] = {}

    def add(names: dict[str, str], hf_prefix: str, prefix: str, index: tuple[int, ...] = ()) -> None:
        for hf_name, name in names.items():
            if prefix + name not in shapes:
                continue  # this model has no such part: a dense layer no experts, a model without qk-norm no norm
            shape = shapes[prefix + name].shape[len(index) :]
            if "{e}" not in hf_name:
                slots[hf_prefix + hf_name] = Slot(prefix + name, index, shape)
                continue
            for e in range(shape[0]):
                slots[hf_prefix + hf_name.format(e=e)] = Slot(prefix + name, (*index, e), shape[1:])

    embed, *rest = OUTER
    add({embed: OUTER[embed]}, "", "")
    for layer in range(config.num_hidden_layers):
        dense = layer < config.first_k_dense_replace
        at = layer if dense else layer - config.first_k_dense_replace
        add(LAYER, f"model.layers.{layer}.", "dense_layers." if dense else "moe_layers.", (at,))
    add({name: OUTER[name] for name in rest}, "", "")
    add(MTP, mtp_prefix(config), "mtp.")
    add(LAYER, mtp_prefix(config), "mtp.block.")
    return slots


def mtp_prefix(config: ModelConfig) -> str:
    return f"model.layers.{config.num_hidden_layers}."


def with_mtp_of(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """`config` with the MTP parts that tensors called `names` have: the whole layer, without its own embedding and head
    (GLM-4.6), or none of it. Published configs don't tell: the weights do."""
    prefix = mtp_prefix(config)
    own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return config.replace(
        num_nextn_predict_layers=int(bool(own)),
        mtp_own_embed="embed_tokens.weight" in own,
        mtp_own_head="shared_head.head.weight" in own,
    )


def fused_parts(config: ModelConfig) -> Iterator[tuple[str, list[list[str]]]]:
    """The fused tensors that may stand in for experts: (name, for each expert the names of its parts in row order)."""
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    for layer in range(config.first_k_dense_replace, last):
        prefix = f"model.layers.{layer}."
        for fused, parts in FUSED.items():
            experts = range(config.n_routed_experts)
            yield prefix + fused, [[prefix + part.format(e=e) for part in parts] for e in experts]


def lead_dims(slots: dict[str, Slot]) -> dict[str, int]:
    """For each array its leading dimensions that count tensors (layers, experts): chunks hold one of them."""
    return {slot.path: len(slot.index) for slot in slots.values()}


def difference(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """What keeps arrays of shapes `found` from being those of `expected`, in words."""
    problems = [f"missing {path} {list(shape)}" for path, shape in expected.items() if path not in found]
    problems += [f"unexpected {path}" for path in found if path not in expected]
    for path, shape in expected.items():
        if path in found and tuple(found[path]) != tuple(shape):
            problems.append(f"{path} has shape {list(found[path])}, expected {list(shape)}")
    return problems
