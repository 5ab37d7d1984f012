"""`verify`: are the bytes of a checkpoint still those that were written?"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from glm45_jax.convert import files, store
from glm45_jax.convert.pieces import FilePiece, Leaf, whole
from glm45_jax.convert.safetensors_io import read_header
from glm45_jax.convert.transfer import digest_of, read_parts
from glm45_jax.errors import UserError


def verify(path: str | os.PathLike) -> dict[str, str]:
    """Reads every byte of a directory that `from_hf`, `to_hf` or their like wrote; returns the digest of every array or
    tensor.

    Raises:
      UserError: names every array or tensor that is damaged.
    """
    path = Path(path)
    if store.is_store(path):
        opened = store.open_store(path)
        expected = {name: row["digest"] for name, row in opened.manifest["arrays"].items()}
        found = store.digests_on_disk(opened)
    elif (path / files.DIGESTS).exists():
        expected = files.read_json(path / files.DIGESTS)["digests"]
        found = _exported(path)
    else:
        raise UserError(f"{path}: neither {files.MANIFEST} nor {files.DIGESTS} is there to compare with")
    damaged = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if damaged:
        raise UserError(f"{path}: damaged: " + ", ".join(damaged))
    return found


def _exported(path: Path) -> dict[str, str]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors, problems = read_header(file)
        if problems:
            raise UserError(f"{file}: " + "; ".join(problems))
        for name, info in tensors.items():
            piece = FilePiece(str(file), info.offset, (info.nbytes,), np.dtype(np.uint8))
            leaf = Leaf(piece.shape, piece.dtype, piece.shape, lambda grid, piece=piece: piece)
            found[name] = digest_of(read_parts(leaf, whole(leaf.shape)))
    return found
