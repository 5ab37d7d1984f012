"""Writes a random checkpoint in Hugging Face's format, of any size and in every form that the converter reads.

    python scripts/make_checkpoint.py DIR --preset glm-4.5-air --set num_hidden_layers=2 --mtp none
    python scripts/make_checkpoint.py DIR --preset tiny --fp8 block --layout fused

Values depend on the seed and the tensor's name alone, so that a tensor in another's place is noticed. Published files
are imitated: FP8 leaves out what the official FP8 release leaves out, the router's bias is float32 near 7, where
bfloat16 would lose it.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
import xxhash
import yaml

from glm45_jax.config import ModelConfig, get_preset
from glm45_jax.convert import dtypes, names
from glm45_jax.convert.hf_format import Outgoing, plan_shards, write_checkpoint
from glm45_jax.convert.transfer import WorkDir

Layout = Literal["per-expert", "fused"]
Fp8 = Literal["none", "channel", "block"]

_NOT_QUANTISED = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "eh_proj.weight")
_BLOCK = 128
# For each format: the bits that stay random, and those that are set: magnitudes between 2^-7 and 2^-3.
_MASKS: dict[str, tuple[Any, int, int]] = {
    "F32": (np.uint32, 0x81FFFFFF, 0x3C000000),
    "BF16": (np.uint16, 0x81FF, 0x3C00),
    "F16": (np.uint16, 0x8FFF, 0x2000),
    "F8_E4M3": (np.uint8, 0xFF, 0),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """A random checkpoint."""

    path: tyro.conf.Positional[Path]
    """The directory to make."""
    preset: str = "tiny"
    """The model."""
    set: tuple[str, ...] = ()
    """Fields of the config, such as num_hidden_layers=2."""
    mtp: Literal["whole", "shared", "none"] = "whole"
    """The MTP layer: with its own embedding and head, without, or absent."""
    layout: Layout = "per-expert"
    """One tensor per expert, or fused as transformers v5 holds them."""
    fp8: Fp8 = "none"
    """One scale per output channel, or per block of 128 x 128."""
    dtype: Literal["F32", "BF16", "F16"] = "BF16"
    """Of everything that is not FP8 and not the router's bias."""
    scale_dtype: Literal["F32", "BF16"] = "F32"
    """Of the FP8 scales."""
    max_shard_size: str = "5GB"
    seed: int = 0


def random_values(name: str, dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values of small magnitude, finite, known by seed and name."""
    rng = np.random.Generator(np.random.SFC64(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode())))
    numpy_dtype = dtypes.BY_NAME[dtype]
    if name.endswith("e_score_correction_bias"):
        return (6.9 + 0.1 * rng.standard_normal(shape)).astype(numpy_dtype)
    unsigned, keep, put = _MASKS[dtype]
    bits: Any = np.frombuffer(rng.bytes(int(np.prod(shape)) * numpy_dtype.itemsize), unsigned).copy()
    np.bitwise_and(bits, unsigned(keep), out=bits)
    np.bitwise_or(bits, unsigned(put), out=bits)
    if dtype == "F8_E4M3":
        bits[(bits & 0x7F) == 0x7F] = 0x38  # no NaN
    values = bits.view(numpy_dtype).reshape(shape)
    if "norm" in name:
        return (1 + values.astype(np.float32)).astype(numpy_dtype)
    return np.abs(values) if "_scale" in name else values


def tensors(config: ModelConfig, options: Options) -> list[Outgoing]:
    """Every tensor of the checkpoint, in the order of the layers."""
    out: list[Outgoing] = []
    slots = names.hf_slots(config)
    in_fused = {}
    if options.layout == "fused":
        for fused, experts in names.fused_parts(config):
            in_fused |= dict.fromkeys(itertools.chain(*experts), (fused, experts))

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        out.append(Outgoing(name, dtype, shape, lambda: [random_values(name, dtype, shape, options.seed)]))

    for name, slot in slots.items():
        shape, key = slot.shape, name
        if name in in_fused:
            key, experts = in_fused[name]
            if name != experts[0][0]:
                continue
            shape = (len(experts), len(experts[0]) * shape[0], shape[1])
        if options.fp8 != "none" and len(slot.shape) == 2 and not name.endswith(_NOT_QUANTISED):
            add(key, "F8_E4M3", shape)
            block = (1, shape[-1]) if options.fp8 == "channel" else (_BLOCK, _BLOCK)
            rows = dtypes.scale_shape(slot.shape, block)
            parts = shape[1] // slot.shape[0] if len(shape) == 3 else 1
            scales = (shape[0], parts * rows[0], rows[1]) if len(shape) == 3 else rows
            add(key + names.SCALE_SUFFIXES[options.fp8], options.scale_dtype, scales)
        else:
            add(key, "F32" if name.endswith("e_score_correction_bias") else options.dtype, shape)
    return out


def make_checkpoint(options: Options, config: ModelConfig | None = None) -> dict[str, Any]:
    """Writes it; returns what was written."""
    if config is None:
        fields = dict(field.split("=", 1) for field in options.set)
        config = get_preset(options.preset, **{key: yaml.safe_load(value) for key, value in fields.items()})
    own = options.mtp == "whole"
    config = config.replace(num_nextn_predict_layers=int(options.mtp != "none"), mtp_own_embed=own, mtp_own_head=own)
    hf_config = config.to_hf()
    hf_config["torch_dtype"] = dtypes.BY_NAME[options.dtype].name
    if options.fp8 == "block":
        hf_config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK]}
    elif options.fp8 == "channel":
        hf_config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    facts = dataclasses.asdict(options) | {"path": None}
    work = WorkDir(options.path, f"make_checkpoint {facts} {hf_config}")
    jobs = plan_shards(tensors(config, options), work.root, options.max_shard_size)
    write_checkpoint(jobs, work, hf_config, None, overwrite=False, made_from="make_checkpoint", progress=None)
    return {"tensors": len(jobs), "bytes": sum(job.nbytes for job in jobs)}


if __name__ == "__main__":
    made = make_checkpoint(tyro.cli(Options, description=__doc__))
    print(f"{made['tensors']:,} tensors, {made['bytes'] / 1e9:.2f} GB", file=sys.stderr)
