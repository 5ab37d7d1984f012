"""Memory stays where it is: a deeper checkpoint needs no more, a larger one no more than its largest matrix."""

from __future__ import annotations

import json

import pytest

from glm45_jax.config import get_preset
from tests.convert.support import make, run_python

CONVERT = """
import json, sys
from glm45_jax import convert
from glm45_jax.convert.files import remove
from pathlib import Path
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
source, own, back = map(Path, sys.argv[1:4])
before = peak()
convert.from_hf(source, own)
there = peak()
convert.to_hf(own, back)
print(json.dumps([before, there, peak()]))
remove(own), remove(back)
"""


def peaks(source, folder) -> list[int]:
    return json.loads(run_python(CONVERT, str(source), str(folder / "own"), str(folder / "back")))


@pytest.mark.slow
def test_a_checkpoint_larger_than_the_memory_used(tmp_path) -> None:
    """Its experts are 300 MB, in matrices of 2 MB: what comes on top of the interpreter is a fraction of that."""
    config = get_preset(
        "tiny", hidden_size=1024, vocab_size=1024, num_hidden_layers=2, n_routed_experts=48, moe_intermediate_size=1024
    )
    source = make(tmp_path / "hf", config, mtp="none", max_shard_size="5GB")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    before, there, back = peaks(source, tmp_path)
    assert size > 300e6
    assert max(there, back) - before < size / 3


@pytest.mark.slow
def test_depth_needs_no_memory(tmp_path) -> None:
    sizes = {}
    for layers in (4, 24):
        config = get_preset(
            "tiny", hidden_size=512, vocab_size=4096, num_hidden_layers=layers, n_routed_experts=32,
            moe_intermediate_size=256,
        )  # fmt: skip
        source = make(tmp_path / f"hf{layers}", config, mtp="none", max_shard_size="200MB")
        sizes[layers] = peaks(source, tmp_path)
    for few, many in zip(sizes[4], sizes[24]):
        assert many < 1.1 * few, sizes
