"""The files of a checkpoint directory: which hold weights, which come along, what identifies them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from glm45_jax.errors import UserError

HF_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
MANIFEST = "glm45_checkpoint.json"  # ours: arrays, chunks, digests, source dtypes
DIGESTS = "glm45_digests.json"  # beside an exported checkpoint: the digest of every tensor
PARAMS = "params"  # ours: the directory that Orbax restores

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_OURS = ("config.json", HF_INDEX, TORCH_INDEX, MANIFEST, DIGESTS)
_LARGEST_KEPT = 256 * 2**20  # a tokenizer.json takes 20 MB; what is larger is no companion of the weights


def companions(directory: Path) -> list[Path]:
    """The small files that belong to a checkpoint beside its weights: tokenizer, chat template, generation config, …"""
    found = []
    for file in sorted(directory.iterdir()):
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in _OURS and file.stat().st_size <= _LARGEST_KEPT:
            found.append(file)
    return found


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies them; returns their names."""
    kept = companions(source)
    for file in kept:
        write_bytes(target / file.name, file.read_bytes())
    return [file.name for file in kept]


def fingerprint(files: Iterable[Path], *facts: Any) -> str:
    """Changes when any of the files is another, longer or rewritten, or when `facts` (JSON) differ."""
    rows: list[Any] = list(facts)
    for file in sorted(files):
        stat = file.stat()
        rows.append([file.name, stat.st_size, stat.st_mtime_ns])
    return xxhash.xxh3_128_hexdigest(json.dumps(rows, sort_keys=True).encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a UserError that says what is wrong with the file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all, and on the disk when this returns."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """A file or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
