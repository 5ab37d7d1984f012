"""`glm45 info`: what a model weighs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from glm45_jax.config import PRESETS, ModelConfig, get_preset, load_hf_config
from glm45_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Info:
    """Prints totals, active parameters, cache bytes per token and layers of a model.

    examples:
      glm45 info glm-4.5-air
      glm45 info ./GLM-4.5-Air --json
    """

    model: tyro.conf.Positional[str]
    """A preset's name, a checkpoint directory, or a config.json."""
    json: Annotated[bool, tyro.conf.arg(aliases=["-j"])] = False
    """Print JSON, for machines."""


def resolve_config(model: str) -> ModelConfig:
    """A preset's name, or a path to a checkpoint (its own or Hugging Face's) or config.json."""
    if model in PRESETS:
        return get_preset(model)
    path = Path(model)
    if not path.exists():
        raise UserError(f"{model!r} is neither a path nor a preset; presets: {', '.join(PRESETS)}")
    if path.is_dir():
        from glm45_jax.convert import source_config

        return source_config(path)  # the weights say whether the MTP layer is there, and how much of it
    return load_hf_config(path)


def describe(config: ModelConfig) -> dict[str, object]:
    counts = config.parameter_counts()
    return {
        "parameters": counts,
        "layers": {
            "dense": config.num_dense_layers,
            "moe": config.num_moe_layers,
            "mtp": config.num_nextn_predict_layers,
        },
        "experts": {
            "routed": config.n_routed_experts,
            "per_token": config.num_experts_per_tok,
            "shared": config.n_shared_experts,
        },
        "kv_cache_bytes_per_token": config.kv_cache_bytes_per_token(),
        "max_position_embeddings": config.max_position_embeddings,
        "config": dataclasses.asdict(config),
    }


def _table(name: str, config: ModelConfig) -> Table:
    counts, table = config.parameter_counts(), Table(title=name, show_header=False)
    context = config.max_position_embeddings
    rows = [
        ("parameters", f"{_si(counts['total'])} ({counts['total']:,})"),
        ("  without embeddings", _si(counts["body"] + counts["mtp"])),
        ("  embedding and head", _si(counts["embed"] + counts["head"])),
        ("  MTP layer", _si(counts["mtp"] + counts["mtp_embeddings"])),
        (
            "active per token",
            f"{_si(counts['active'])} with the MTP layer, {_si(counts['active_without_mtp'])} without",
        ),
        (
            "layers",
            f"{config.num_dense_layers} dense + {config.num_moe_layers} MoE + {config.num_nextn_predict_layers} MTP",
        ),
        (
            "experts",
            f"{config.n_routed_experts}, {config.num_experts_per_tok} per token, {config.n_shared_experts} shared",
        ),
        (
            "attention",
            f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} KV heads",
        ),
        ("KV cache per token", f"{config.kv_cache_bytes_per_token():,} bytes in bfloat16"),
        (
            "KV cache, full context",
            f"{config.kv_cache_bytes_per_token() * context / 2**30:.1f} GiB for {context:,} tokens",
        ),
        ("weights", f"{counts['total'] * 2 / 1e9:.1f} GB in bfloat16"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _si(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3f} {unit}"
    return str(n)


def main(argv: list[str]) -> int:
    args = tyro.cli(Info, args=argv, prog="glm45 info")
    config = resolve_config(args.model)
    if args.json:
        print(json.dumps(describe(config), indent=2))
    else:
        Console().print(_table(args.model, config))
    return 0
