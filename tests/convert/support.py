"""Checkpoints to convert, and an independent reading of what stands in them (by the safetensors library)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from glm45_jax.config import ModelConfig, get_preset

ROOT = Path(__file__).parents[2]
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F8_E4M3": ml_dtypes.float8_e4m3fn}

spec = importlib.util.spec_from_file_location("make_checkpoint", ROOT / "scripts" / "make_checkpoint.py")
assert spec and spec.loader
maker: Any = importlib.util.module_from_spec(spec)
sys.modules["make_checkpoint"] = maker
spec.loader.exec_module(maker)

NARROW = get_preset("tiny", hidden_size=32, vocab_size=64, num_attention_heads=4, intermediate_size=48)


def make(path: Path, config: ModelConfig = NARROW, **options: Any) -> Path:
    """A random checkpoint in shards of 30 kB."""
    maker.make_checkpoint(maker.Options(path, **({"max_shard_size": "30KB"} | options)), config)
    return path


def raw_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """{name: (dtype, shape, bytes)} of all safetensors files of a directory."""
    out = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, t in safetensors.deserialize(file.read_bytes()):
            assert name not in out
            out[name] = (t["dtype"], tuple(t["shape"]), bytes(t["data"]))
    return out


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(b, DTYPES[d]).reshape(s) for name, (d, s, b) in raw_tensors(path).items()}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    contiguous = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    path.write_bytes(safetensors.numpy.save(contiguous, {"format": "pt"}))


def rewrite(path: Path, change: Any) -> Path:
    """Puts `change(tensors)` in place of a checkpoint's weights, as one file without an index."""
    tensors = change(arrays(path))
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    write_safetensors(path / "model.safetensors", tensors)
    return path


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def same(a: Any, b: Any) -> bool:
    """Equal dtype, shape and bytes."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def run_python(code: str, *args: str, env: dict[str, str] | None = None) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {})
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
