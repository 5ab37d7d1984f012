"""What there is to plan of a model: a step of training, reading prompts, one step of decoding; and their meshes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from glm45_jax.config import ModelConfig
from glm45_jax.errors import UserError
from glm45_jax.parallel import AXES, SERVING_RULES, MeshConfig
from glm45_jax.plan.model_flops import active_parameters, decode_flops, prefill_flops, train_flops
from glm45_jax.plan.programs import (
    Program,
    Storage,
    decode_program,
    engine_program,
    prefill_program,
    train_program,
)
from glm45_jax.plan.report import Job
from glm45_jax.train.config import TrainConfig


def train_job(config: TrainConfig, name: str) -> Job:
    m, batch, length = config.model, config.batch_size, config.seq_len
    return Job(
        program="train",
        model=name,
        make=lambda mesh: train_program(config, mesh),
        remat=m.remat,
        batch=batch,
        seq_len=length,
        tokens=batch * length,
        model_flops=train_flops(m, batch, length),
        active_parameters=active_parameters(m),
    )


def prefill_job(model: ModelConfig, name: str, batch_size: int, seq_len: int) -> Job:
    m = for_serving(model)
    return Job(
        program="prefill",
        model=name,
        make=lambda mesh: prefill_program(m, mesh, batch_size, seq_len),
        remat="none",
        batch=batch_size,
        seq_len=seq_len,
        tokens=batch_size * seq_len,
        model_flops=prefill_flops(m, batch_size, seq_len),
        active_parameters=active_parameters(m, mtp=False),
    )


def decode_job(
    model: ModelConfig,
    name: str,
    batch_size: int,
    seq_len: int,
    storage: Storage | None = None,
    engine: bool = False,
) -> Job:
    """`decode_step`, or the `engine`'s step, in which every sequence decodes. A quantised cache is the engine's."""
    m, storage = for_serving(model), storage or Storage()
    if storage.cache is not None and not engine:
        raise UserError("a quantised cache is the engine's: give --engine too")

    def make(mesh: Any) -> Program:
        if engine:
            return engine_program(m, mesh, batch_size, seq_len, storage)
        return decode_program(m, mesh, batch_size, seq_len, storage.weights)

    kept = [f"{what} in {how}" for what, how in (("weights", storage.weights), ("cache", storage.cache)) if how]
    return Job(
        program="decode",
        model=", ".join([name, *kept, *["engine"] * engine]),
        make=make,
        remat="none",
        batch=batch_size,
        seq_len=seq_len,
        tokens=batch_size,
        model_flops=decode_flops(m, batch_size, seq_len),
        active_parameters=active_parameters(m, mtp=False),
    )


def for_serving(model: ModelConfig) -> ModelConfig:
    """Weights that stay where they are used, unless the model has rules of its own; bfloat16."""
    rules = model.parallel.rules or SERVING_RULES
    parallel = dataclasses.replace(model.parallel, rules=rules)
    return model.replace(remat="none", param_dtype="bfloat16", dtype="bfloat16", parallel=parallel)


# --- meshes ----------------------------------------------------------------------------------------------------------


def parse_mesh(text: str) -> MeshConfig:
    """`fsdp=16,expert=16`; what is not named is 1, and fsdp, if not named, what remains.

    Raises:
      UserError: an axis that does not exist, or a size that is no number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if name not in AXES or not equals:
            raise UserError(f"--mesh {text!r}: {part!r} is no axis=size; axes are {', '.join(AXES)}")
        if not size.removeprefix("-").isdigit():
            raise UserError(f"--mesh {text!r}: the size of {name} is {size!r}, it must be a number")
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def default_mesh(program: str, model: ModelConfig, devices: int) -> MeshConfig:
    """A mesh to begin with.

    Training: up to 4 devices share the experts (an all-to-all of more is longer), fsdp is the rest. Serving: heads over
    as many as there are kv heads, experts over as many more as divide them, and copies of that.
    """
    experts = model.n_routed_experts
    if program == "train":
        return MeshConfig(expert=_largest(devices, 4, lambda n: experts % n == 0), fsdp=-1)
    tensor = _largest(devices, model.num_key_value_heads, lambda n: experts % n == 0)
    expert = _largest(devices // tensor, devices, lambda n: experts % (n * tensor) == 0)
    return MeshConfig(tensor=tensor, expert=expert, data=-1, fsdp=1)


def engine_mesh(model: ModelConfig, devices: int) -> MeshConfig:
    """For the engine, whose devices all have every row: heads and widths over as many as they divide, experts over
    the rest."""
    m, kv = model, model.num_key_value_heads
    sizes = (m.num_attention_heads, m.n_routed_experts, m.vocab_size, m.intermediate_size, m.moe_intermediate_size)

    def fits(n: int) -> bool:
        return (kv % n == 0 or n % kv == 0) and all(size % n == 0 for size in sizes)

    tensor = _largest(devices, devices, fits)
    expert = _largest(devices // tensor, devices, lambda n: m.n_routed_experts % (n * tensor) == 0)
    return MeshConfig(tensor=tensor, expert=expert, data=-1, fsdp=1)


def _largest(divides: int, most: int, fits) -> int:
    return max(n for n in range(1, min(divides, most) + 1) if divides % n == 0 and fits(n))


def rows_at_once(program: str, sizes: dict[str, int]) -> int:
    """The least batch in which every group of devices has a row: training's default."""
    batch = ("data", "pipeline", "fsdp", "expert")
    return math.prod(sizes[a] for a in batch) if program == "train" else 64


def with_remat(config: TrainConfig, remat: str) -> TrainConfig:
    return config.replace(model=config.model.replace(remat=remat))
