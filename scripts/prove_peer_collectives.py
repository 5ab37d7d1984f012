"""Counts what a layer of MaxText's sends between chips, at GLM-4.5's sizes, out of programs compiled for a v5p-512.

    python3.12 -m venv /tmp/peer && /tmp/peer/bin/pip install uv  # pip alone takes hours to find versions
    /tmp/peer/bin/uv pip install --python /tmp/peer/bin/python 'maxtext[tpu]==0.2.5'
    python scripts/prove_peer_collectives.py --python /tmp/peer/bin/python --json docs/proofs/maxtext_collectives.json

MaxText compiles its own training step (`train_compile`, no device needed) in its own environment, with two and with
four layers, not scanned; a layer is half of what four have more than two. The model is MaxText's Qwen3-MoE with the
widths, experts, heads and vocabulary of GLM-4.5: every layer routed, neither shared expert nor MTP layer, so that it
sends less for weights than GLM-4.5 must. 256 chips as fsdp 16 x expert 16. A compilation takes about 4 minutes of one
core and 3 GB. Beside it stands the step of this project, counted by `glm45 plan train --no-compile` on the same mesh
and on the one that docs/plans.md has.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances, write_figures
from rich.console import Console

from glm45_jax.config import get_preset
from glm45_jax.errors import UserError
from glm45_jax.plan.collectives import Collective, collectives
from glm45_jax.plan.hlo import parse

GLM = get_preset("glm-4.5")
MESH = {"fsdp": 16, "expert": 16}
SEQ_LEN, BATCH = 4096, 4  # of a device
LAYERS = (2, 4)
OUR_MESHES = ("fsdp=16,expert=16", "fsdp=64,expert=4")

# What MaxText's train_compile is told besides the number of layers.
SETTINGS: dict[str, Any] = {
    "model_name": "qwen3-235b-a22b",
    "override_model_config": True,
    "base_emb_dim": GLM.hidden_size,
    "num_experts": GLM.n_routed_experts,
    "num_experts_per_tok": GLM.num_experts_per_tok,
    "base_num_query_heads": GLM.num_attention_heads,
    "base_num_kv_heads": GLM.num_key_value_heads,
    "head_dim": GLM.head_dim,
    "base_moe_mlp_dim": GLM.moe_intermediate_size,
    "base_mlp_dim": GLM.moe_intermediate_size,
    "vocab_size": GLM.vocab_size,
    "scan_layers": False,
    "compile_topology": "v5p-512",
    "compile_topology_num_slices": 1,
    "allow_split_physical_axes": True,
    "per_device_batch_size": BATCH,
    "max_target_length": SEQ_LEN,
    "ici_fsdp_parallelism": MESH["fsdp"],
    "ici_expert_parallelism": MESH["expert"],
    "sparse_matmul": True,
    "megablox": True,
    "ragged_buffer_factor": 1.25,  # with buffers for the worst case (-1) the step needs 118 GB of a chip's 96
    "remat_policy": "full",
    "attention": "flash",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ragged-all-to-all": {},
    "ring-of-experts": {
        "use_ring_of_experts": True,
        "use_ragged_sort": True,
        # its SparseCore kernel asks for more memory than there is at these sizes; nothing that is sent depends on it
        "ragged_gather_fallback": True,
        "ragged_gather_reduce_fallback": True,
    },
}

# In MaxText's environment: its own compilation, whose text is kept.
DRIVER = """
import sys
from maxtext.trainers.pre_train import train_compile
compile = train_compile.jit_and_compile
def compile_and_keep(*args, **kwargs):
    compiled = compile(*args, **kwargs)
    with open(sys.argv[1], "w") as file:
        file.write(compiled.as_text())
    return compiled
train_compile.jit_and_compile = compile_and_keep
import maxtext, os
base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
train_compile.main(["train_compile", base, *sys.argv[2:]])
"""
VERSIONS = """
import importlib.metadata, json, platform
names = "maxtext jax jaxlib libtpu flax".split()
print(json.dumps({"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}))
"""


@dataclasses.dataclass(frozen=True)
class Proof:
    """Collective bytes of a layer of MaxText's."""

    python: str
    """The interpreter of an environment with maxtext[tpu]."""
    json: Path | None = None
    """Where to write the figures."""
    texts: Path | None = None
    """Where compiled programs are kept; one that is there is not compiled again."""


def main(proof: Proof) -> None:
    console = Console(stderr=True)
    figures: dict[str, Any] = {
        **circumstances("jax"),
        "peer": json.loads(run(proof.python, "-c", VERSIONS)),
        "devices": "v5p-512 (256 chips), described",
        "mesh": MESH,
        "settings": SETTINGS,
        "layers": list(LAYERS),
        "tokens_per_device": SEQ_LEN * BATCH,
        "bytes": "operand: of the operands on one device. torus, switch: what a device puts on the links of all axes "
        "together, on rings (each piece passes through those between) and where each pair has its own way",
        "variants": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = proof.texts or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, more in VARIANTS.items():
            console.print(f"{name}: compiling, a few minutes for each of {LAYERS} layers")
            few, many = (count(compiled_text(proof.python, folder, name, more, n)) for n in LAYERS)
            figures["variants"][name] = {"settings": more, **by_layer(few, many)}
            console.print(json.dumps(figures["variants"][name]["per_layer"]["total"]))
    figures["step"] = {
        "torus": "bytes of a whole step that a device puts on the links; theirs with GLM-4.5's number of layers",
        "theirs": {name: whole_step(variant) for name, variant in figures["variants"].items()},
        "ours": {mesh: our_step(mesh) for mesh in OUR_MESHES},
    }
    print(json.dumps(figures, indent=1))
    write_figures(proof.json, figures, indent=1)


def whole_step(variant: dict[str, Any]) -> float:
    layer, beside = (variant[part]["total"]["torus"] for part in ("per_layer", "beside_the_layers"))
    return GLM.num_hidden_layers * layer + beside


def our_step(mesh: str) -> dict[str, float]:
    """Bytes on the links of each axis, and of all."""
    sizes = ("--seq-len", str(SEQ_LEN), "--batch-size", str(BATCH * math.prod(MESH.values())))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        how = (
            "--model",
            "glm-4.5",
            "--slice",
            "v5p:8x8x4",
            "--mesh",
            mesh,
            *sizes,
            "--no-compile",
            "--json",
            str(file),
        )
        run(sys.executable, "-m", "glm45_jax", "plan", "train", *how, cwd=Path(__file__).parents[1])
        sent = json.loads(file.read_text())["collective_bytes"]
    return {**sent, "all": sum(sent.values())}


def compiled_text(python: str, folder: Path, name: str, more: dict[str, Any], layers: int) -> str:
    file = folder / f"{name}-{layers}.txt"
    if not file.exists():
        settings = {**SETTINGS, **more, "base_num_decoder_layers": layers}
        partial = file.with_suffix(".partial")
        run(python, "-c", DRIVER, str(partial), *(f"{k}={v}" for k, v in settings.items()), cwd=folder)
        partial.replace(file)
    # Attributes of kernels hold line ends; an instruction is to be one line.
    return re.sub(r'\n(?="|}})', " ", file.read_text())


def run(*command: str, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[0]} ended with {done.returncode}; its last words:\n{done.stderr[-2000:]}")
    return done.stdout


Counted = dict[tuple[str, str], collections.Counter]


def count(text: str) -> Counted:
    """By kind and axes: how many run in a step, and their bytes."""
    counted: Counted = collections.defaultdict(collections.Counter)
    for found in collectives(parse(text), MESH):
        counted[found.kind, "+".join(found.axes)].update(measures(found))
    return counted


def measures(found: Collective) -> dict[str, float]:
    return {
        "times": found.times,
        "operand": found.times * found.bytes,
        "torus": sum(found.sent_bytes("torus").values()),
        "switch": sum(found.sent_bytes("switch").values()),
    }


def by_layer(few: Counted, many: Counted) -> dict[str, Any]:
    """What one layer has, and what stands beside the layers: embedding, head, loss, optimizer."""
    extra = LAYERS[1] - LAYERS[0]
    names = ("times", "operand", "torus", "switch")
    layer = {k: {n: (many[k][n] - few[k][n]) / extra for n in names} for k in sorted(many)}
    rest = {k: {n: few[k][n] - LAYERS[0] * layer[k][n] for n in names} for k in layer}
    return {"per_layer": table(layer), "beside_the_layers": table(rest)}


def table(rows: dict[tuple[str, str], dict[str, float]]) -> dict[str, Any]:
    """Rows that hold something, in numbers that can be read, and their sum."""
    shown = {
        f"{kind} over {axes}": {name: round(value, 1) for name, value in row.items()}
        for (kind, axes), row in rows.items()
        if abs(row["operand"]) > 1e5
    }
    total = {name: round(sum(row[name] for row in rows.values())) for name in ("operand", "torus", "switch")}
    return {**shown, "total": total}


if __name__ == "__main__":
    main(tyro.cli(Proof))
