"""scripts/prove_peer_collectives.py: a layer is what more layers send more, whatever kernels write into the text."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("glm45_jax.plan.collectives")
import prove_peer_collectives as proof

HEAD = """HloModule step, num_partitions=256

ENTRY %main (p: bf16[16000,8]) -> bf16[16000,8] {
  %p = bf16[16000,8] parameter(0)
"""
# As splash attention leaves it: an attribute over several lines, one of which looks like a computation's end.
LAYER = """  %k.{i} = bf16[16000,8] custom-call(%p), custom_call_target="x", frontend_attributes={{a={{
"b":1
}}}}, metadata={{op_name="kernel"}}
  %g.{i} = bf16[256000,8] all-gather(%p), replica_groups=[16,16]<=[16,16]T(1,0), dimensions={{0}}
  %h.{i} = bf16[256000,8] all-gather(%p), replica_groups=[16,16]<=[256], dimensions={{0}}
"""
REST = """  %z = f32[1000000] broadcast(%p)
  %r = f32[1000000] all-reduce(%z), replica_groups=[1,256]<=[256], to_apply=%add
  ROOT %q = bf16[16000,8] copy(%p)
}
"""


def program(layers: int) -> str:
    return HEAD + "".join(LAYER.format(i=i) for i in range(layers)) + REST


def test_a_layer_is_told_from_what_stands_beside(tmp_path: Path) -> None:
    for layers in proof.LAYERS:
        (tmp_path / f"v-{layers}.txt").write_text(program(layers))
    few, many = (proof.count(proof.compiled_text("none", tmp_path, "v", {}, n)) for n in proof.LAYERS)
    figures = proof.by_layer(few, many)
    piece = 16000 * 8 * 2
    gather = {"operand": 2 * piece, "torus": 2 * piece * 15, "switch": 2 * piece * 15}
    layer = figures["per_layer"]
    assert layer["total"] == gather
    assert {"all-gather over fsdp", "all-gather over expert"} == set(layer) - {"total"}
    beside = figures["beside_the_layers"]
    assert beside["all-reduce over fsdp+expert"]["times"] == 1
    assert beside["total"]["operand"] == 4_000_000
    assert beside["total"]["torus"] == pytest.approx(2 * 4_000_000 * 255 / 256)
