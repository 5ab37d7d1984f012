"""The engine's step as plans see it, the least bytes of decoding, and what they allow speculation."""

from __future__ import annotations

import json

import pytest

from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from glm45_jax.parallel import MeshConfig
from glm45_jax.plan.decode_bytes import (
    cache_bytes,
    experts_met,
    least_bytes,
    speculation_ceiling,
    speculative_bytes,
    weight_bytes,
)
from glm45_jax.plan.jobs import decode_job, engine_mesh
from glm45_jax.plan.programs import Storage
from glm45_jax.plan.report import plan
from pallas_kernels.analysis.compile import missing_compiler

AIR, FULL = get_preset("glm-4.5-air"), get_preset("glm-4.5")
needs_libtpu = pytest.mark.skipif(missing_compiler("tpu7x") is not None, reason="libtpu is not installed")


def test_experts_met_at_random() -> None:
    assert experts_met(AIR, 1) == pytest.approx(8)
    assert experts_met(AIR, 2) == pytest.approx(16 - 8 * 8 / 128)
    assert experts_met(AIR, 128) == pytest.approx(127.97, abs=0.01)


def test_least_bytes_by_hand() -> None:
    """Every weight but the MTP layer's and the embedding, and the cache, where all experts are met."""
    counts = AIR.parameter_counts()
    weights = 2 * (counts["body"] + counts["head"])
    assert weight_bytes(AIR, 10**6, Storage()) - 10**6 * 2 * AIR.hidden_size == pytest.approx(weights, rel=1e-4)
    assert cache_bytes(AIR, 128, 1535, Storage(), 46) == 128 * 1536 * AIR.kv_cache_bytes_per_token()
    quantised = least_bytes(AIR, 128, 1535, Storage("fp8", "fp8"))
    assert 0.5 < quantised / least_bytes(AIR, 128, 1535, Storage()) < 0.52  # the head, the router and scales beside


def test_one_sequence_meets_its_experts_alone() -> None:
    c = AIR
    active = weight_bytes(c, 1, Storage())
    experts = 45 * 3 * 8 * c.hidden_size * c.moe_intermediate_size * 2
    rest = weight_bytes(c, 0, Storage())
    assert active == pytest.approx(rest + experts + 2 * c.hidden_size)


@pytest.mark.parametrize("config", [AIR, FULL], ids=["air", "full"])
def test_the_ceiling_of_speculation(config) -> None:
    of = lambda batch, acceptance, drafts=1: speculation_ceiling(  # noqa: E731
        config, batch, 1536, drafts, acceptance, Storage()
    )
    assert of(1, 0.9) < 1.35 and of(128, 0.9) > 1.6  # a second token's experts, or all read anyway
    assert of(128, 1.0) < 2 and of(1, 0.0) < 1 and of(8, 0.9) > of(8, 0.6)
    assert speculative_bytes(config, 8, 1536, 2, Storage()) > speculative_bytes(config, 8, 1536, 1, Storage())


@pytest.mark.parametrize(("model", "devices", "tensor"), [(AIR, 8, 8), (FULL, 16, 16), (AIR, 32, 32)])
def test_meshes_of_the_engine(model, devices, tensor) -> None:
    assert engine_mesh(model, devices) == MeshConfig(tensor=tensor, expert=1, data=-1, fsdp=1)


@pytest.mark.slow
def test_the_command_plans_the_engines_step(tmp_path, capsys) -> None:
    from glm45_jax.cli import main

    file = tmp_path / "plan.json"
    args = ["--model", "tiny", "--slice", "tpu7x:2x2x1", "--mesh", "tensor=2,expert=4,fsdp=1", "--no-compile"]
    args += ["--batch-size", "8", "--seq-len", "64", "--page-size", "32", "--json", str(file)]
    assert main(["plan", "decode", *args, "--engine", "--quantize", "int8", "--cache-dtype", "int8"]) == 0
    found = json.loads(file.read_text())
    assert found["model"] == "tiny, weights in int8, cache in int8, engine" and "fused_moe" in found["kernels"]
    assert main(["plan", "decode", *args]) == 0
    plain = json.loads(file.read_text())
    assert plain["model"] == "tiny" and plain["memory"]["parameters"] > 1.3 * found["memory"]["parameters"]
    assert main(["plan", "decode", *args, "--cache-dtype", "int8"]) == 2
    assert "--engine" in capsys.readouterr().err


def test_a_quantised_cache_is_the_engines() -> None:
    with pytest.raises(UserError, match="--engine"):
        decode_job(AIR, "air", 8, 64, Storage(cache="int8"))


@needs_libtpu
@pytest.mark.slow
def test_each_expert_is_read_once_by_128_sequences() -> None:
    """Counted: neither sorted rows in chunks, which read experts again in each, nor a wide copy of quantised ones."""
    small = get_preset("glm-4.5-air", num_hidden_layers=3)
    job = decode_job(small, "air", 128, 1536, Storage("fp8", "fp8"), engine=True)
    found = plan(job, "tpu7x:2x2x1", MeshConfig(tensor=8, fsdp=1), compiled=False)
    assert found.kernels.keys() == {"fused_moe", "paged_attention"}
    experts = 2 * 128 * 3 * small.hidden_size * small.moe_intermediate_size / 8
    assert experts <= found.kernels["fused_moe"]["bytes"] < 1.05 * experts
    cache = cache_bytes(small, 128, 1536, Storage(cache="fp8"), 3) / 8
    assert cache <= found.kernels["paged_attention"]["bytes"] < 1.1 * cache


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "fp8", "fp8-block"])
def test_compiled_steps_read_quantised_weights_where_they_lie(form: str) -> None:
    """With more devices than kv heads, whose weights are held whole, and with blocks, which a kernel makes dense."""
    small = get_preset("glm-4.5", num_hidden_layers=12, n_routed_experts=32, vocab_size=16384, real_vocab_size=None)
    job = decode_job(small, "small", 64, 512, Storage(form, "fp8" if form == "fp8" else "int8"), engine=True)
    sizes = {"tensor": 4, "expert": 4} if form == "fp8-block" else {"tensor": 16}
    found = plan(job, "tpu7x:2x2x2", MeshConfig(**sizes, fsdp=1))
    assert found.fits and not found.notes
    assert found.memory.temporaries < 0.2 * found.memory.parameters
    assert found.bytes < 1.2 * (
        found.memory.parameters + found.memory.cache
    )  # the MTP layer's, which is not read, in it
    assert found.collective_bytes["tensor"] > 12 * 2 * 64 * small.hidden_size * 2
    assert ("grouped_matmul" in found.kernels) == (form == "fp8-block")
