"""Meshes and remat policies to try, best first by arithmetic; and the largest batch that fits.

The estimate is coarse, of what a layer must do: its use is the order, the figures are the compiled plan's.

Axes: T tokens of a device, D model, k experts per token, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from glm45_jax.config import ModelConfig
from glm45_jax.parallel import AXES, MeshConfig
from glm45_jax.plan.collectives import all_to_all_bytes
from glm45_jax.plan.model_flops import layer_parameters
from glm45_jax.plan.report import Job, Plan, memory_limit
from glm45_jax.plan.slices import Slice, axis_speeds, mesh_of, parse_slice

REMATS = ("full", "save_block_outputs", "none")
_WORK = {"full": 8 / 6, "save_block_outputs": 8 / 6, "none": 1.0, "dots": 7 / 6}  # FLOPs over those of the model
_LONG = 16384  # tokens from which pieces of a sequence are worth an axis


@dataclasses.dataclass(frozen=True)
class Candidate:
    """`seconds` and `bytes` of a device, by estimate."""

    mesh: MeshConfig
    remat: str
    seconds: float
    bytes: float

    @property
    def name(self) -> str:
        sizes = dataclasses.asdict(self.mesh)
        return ", ".join(f"{a}={n}" for a, n in sizes.items() if n > 1) + (
            f", remat {self.remat}" if self.remat else ""
        )


def candidates(job: Job, model: ModelConfig, slice_name: str, remats: Sequence[str] | None = None) -> list[Candidate]:
    """Best first; those that cannot fit by far are left out, unless none can."""
    where = parse_slice(slice_name)
    policies = (remats or REMATS) if job.program == "train" else ("none",)
    found = []
    for sizes in meshes(job, model, where.devices):
        mesh = MeshConfig(**sizes)
        speeds = axis_speeds(where, mesh_of(slice_name, mesh))
        found += [_estimated(job, model, where, mesh, sizes, speeds, remat) for remat in policies]
    able = [c for c in found if c.bytes <= 1.1 * memory_limit(where)] or sorted(found, key=lambda c: c.bytes)[:3]
    return sorted(able, key=lambda c: c.seconds)


def meshes(job: Job, model: ModelConfig, devices: int) -> Iterator[dict[str, int]]:
    """Sizes that divide the devices, the batch, heads and experts."""
    training, heads = job.program == "train", model.num_key_value_heads
    for tensor in (1, 2, 4, 8):
        for expert in range(1, devices + 1):
            if devices % (tensor * expert) or model.n_routed_experts % (tensor * expert) or heads % tensor:
                continue
            rest = devices // (tensor * expert)
            for context in (1, 2, 4, 8, 16) if training and job.seq_len >= _LONG else (1,):
                if rest % context:
                    continue
                spread = rest // context
                if training and job.batch % (spread * expert):
                    continue
                own = {"fsdp": spread} if training else {"data": spread, "fsdp": 1}
                yield dict.fromkeys(AXES, 1) | own | {"expert": expert, "context": context, "tensor": tensor}


def _estimated(
    job: Job, model: ModelConfig, where: Slice, mesh: MeshConfig, sizes: dict[str, int], speeds: Any, remat: str
) -> Candidate:
    if job.program == "train":
        nbytes, sent = _train_bytes(job, model, where, sizes, remat), _train_sent(job, model, where, sizes)
        work = _WORK[remat]
    else:
        nbytes, sent, work = _serve_bytes(job, model, sizes), _serve_sent(job, model, sizes), 1.0
    compute = work * job.model_flops / where.devices / where.chip.bf16_flops_per_s
    memory = nbytes / where.chip.memory_bytes_per_s if job.program == "decode" else 0.0
    terms = [compute, memory, *(sent.get(a, 0.0) / speeds[a] for a in speeds)]
    # between all overlapped and nothing: what cannot hide behind the longest costs some
    return Candidate(mesh, remat, max(terms) + 0.25 * (sum(terms) - max(terms)), nbytes)


def _tokens(job: Job, sizes: dict[str, int]) -> float:
    """Of a device, before what `tensor` cuts between the products."""
    return job.tokens / math.prod(sizes[a] for a in ("data", "pipeline", "fsdp", "expert", "context"))


def _train_bytes(job: Job, c: ModelConfig, where: Slice, sizes: dict[str, int], remat: str) -> float:
    # float32 parameters, their gradient, and one or two moments: 4 + 4 + 4 bytes, and some of the update at once
    state = c.parameter_counts()["total"] * 14 / where.devices
    tokens = _tokens(job, sizes) / sizes["tensor"]
    wide = c.num_attention_heads * c.head_dim * 2 + 3 * c.num_experts_per_tok * c.moe_intermediate_size
    kept = {"full": 1, "save_block_outputs": 3, "dots": 6, "none": 8 + (wide + c.num_experts_per_tok * c.hidden_size)
            / c.hidden_size}[remat]  # fmt: skip
    layer = 2 * (_shared(c) + 3 * _expert(c) / (sizes["expert"] * sizes["tensor"]))  # gathered, and its gradient
    return state + 2.0 * tokens * c.hidden_size * c.num_hidden_layers * kept + 2 * layer


def _shared(c: ModelConfig) -> float:
    """Values of a MoE layer's matrices but for the routed experts'."""
    return layer_parameters(c, True) - 3 * c.hidden_size * c.moe_intermediate_size * c.num_experts_per_tok


def _expert(c: ModelConfig) -> float:
    """Values of one matrix of all experts of a layer."""
    return c.n_routed_experts * c.hidden_size * c.moe_intermediate_size


def _train_sent(job: Job, c: ModelConfig, where: Slice, sizes: dict[str, int]) -> dict[str, float]:
    """Weights gathered forward and backward and their gradients scattered (6 bytes a value), rows to their experts."""
    layers, network = c.num_hidden_layers, "switch" if where.platform == "cuda" else "torus"
    e, f, x, t = (sizes[a] for a in ("expert", "fsdp", "context", "tensor"))
    mine = 6.0 * layers
    sent = {"fsdp": mine * (_shared(c) / t + 3 * _expert(c) / (e * t)) * (f - 1) / f, "context": 0.0}
    rows = 2.0 * _tokens(job, sizes) / t * c.hidden_size * layers
    travelled = all_to_all_bytes(rows * min(c.num_experts_per_tok, e * t), e, network)
    sent["expert"] = mine * _shared(c) / t / f * (e - 1) / e + 6 * travelled
    if x > 1:  # keys and values of the other pieces, forward, again, and their gradients back
        kv = 2 * c.num_key_value_heads * c.head_dim / t
        sent["context"] = 2.0 * 4 * _tokens(job, sizes) * kv * layers * (x - 1) + sent["fsdp"] / f * (x - 1) / x
    sent["tensor"] = 2.0 * _tokens(job, sizes) * c.hidden_size * layers * 4 * 3 * (t - 1) / t
    return sent


def _serve_bytes(job: Job, c: ModelConfig, sizes: dict[str, int]) -> float:
    counts, cut = c.parameter_counts(), sizes["expert"] * sizes["tensor"]
    experts = c.num_moe_layers * 3 * _expert(c)
    rest = counts["total"] - experts
    rows = job.batch / math.gcd(job.batch, sizes["data"] * sizes["expert"])
    cache = rows * job.seq_len * c.kv_cache_bytes_per_token() / min(sizes["tensor"], c.num_key_value_heads)
    return 2.0 * (experts / cut + rest / sizes["tensor"]) + cache


def _serve_sent(job: Job, c: ModelConfig, sizes: dict[str, int]) -> dict[str, float]:
    tokens, layers = _tokens(job, sizes), c.num_hidden_layers
    e, t = sizes["expert"], sizes["tensor"]
    width = 2.0 * tokens * c.hidden_size * layers
    return {"expert": width * 2 * (e - 1), "tensor": width * 4 * (t - 1) / t}


def largest_batch(at: Plan, plan_of: Callable[[int], Plan]) -> int:
    """The largest batch that fits, in multiples of what the mesh needs; 0 where none does.

    Memory grows as a line with the batch, which begins at what is held without one: where it meets the limit is
    compiled next, and the line goes on from there, until it ends at a batch that fits.
    """
    unit = math.prod(at.mesh[a] for a in ("data", "pipeline", "fsdp", "expert"))
    assert at.memory.peak is not None and at.batch % unit == 0
    peaks = {0: at.memory.parameters + at.memory.optimizer, at.batch // unit: at.memory.peak}
    fits, fails = (at.batch // unit, math.inf) if at.fits else (0, at.batch // unit)
    while True:
        (first, low), (second, high) = sorted(peaks.items())[-2:]
        each = max(1.0, (high - low) / (second - first))
        guess = int(min(first + (at.memory.limit - low) / each, fails - 1))
        if guess <= fits:
            return fits * unit
        plan = plan_of(guess * unit)
        assert plan.memory.peak is not None
        peaks[guess] = plan.memory.peak
        fits, fails = (guess, fails) if plan.fits else (fits, guess)
