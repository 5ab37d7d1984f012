"""Our own checkpoint directory: plain zarr3 arrays that Orbax restores, one chunk per expert, with a digest of each.

    DIR/config.json             Hugging Face's, every field of the source kept, our facts under "glm45_jax"
    DIR/glm45_checkpoint.json   arrays (shape, dtype, chunk, digest), the source's dtypes where they differ, FP8 form
    DIR/params/_METADATA        Orbax's: written last, so that what has it is whole
    DIR/params/moe_layers.moe.experts.gate/zarr.json, c.0.5.0.0, …
    DIR/tokenizer.json, chat_template.jinja, …   the source's small files

Chunks are uncompressed and in C order, so that any part of an array is a few byte ranges: a process reads its own.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import xxhash

from glm45_jax.config import ModelConfig, load_hf_config
from glm45_jax.convert import dtypes, files, names
from glm45_jax.convert.hf_source import Quantised, dequantised
from glm45_jax.convert.pieces import AnyLeaf, FilePiece, Index, Leaf, boxes
from glm45_jax.convert.transfer import WorkDir, digest_of, read_parts, write_parts
from glm45_jax.errors import UserError

VERSION = 1
_SMALL = 4 * 2**20  # an array up to this size is one chunk, unless it holds experts
_TALL = 256 * 2**20  # a matrix beyond this size is cut into chunks of rows
_ROWS = 32 * 2**20


def chunk_shape(path: str, shape: tuple[int, ...], dtype: np.dtype, lead: int) -> tuple[int, ...]:
    """One expert's matrix; of other stacks one layer's; rows of an embedding; a small array whole.

    `lead`: leading dimensions that count layers and experts.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    experts = ".experts." in path and not path.endswith(names.SCALE)
    if nbytes <= _SMALL and not experts:
        return shape
    if lead:
        count = lead if experts else 1
        return (1,) * count + shape[count:]
    if nbytes > _TALL:
        return (_rows(shape[0], _ROWS // (nbytes // shape[0])), *shape[1:])
    return shape


def _rows(height: int, most: int) -> int:
    """The largest divisor of `height` up to `most`; `most` itself if all are small (the last chunk is padded)."""
    best = next(rows for rows in range(most, 0, -1) if height % rows == 0)
    return best if best > most // 8 else most


# --- writing -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ChunkJob:
    """One chunk of one array, from a leaf to its file."""

    array: Array
    grid: tuple[int, ...]
    index: Index

    @property
    def key(self) -> str:
        return f"{self.array.path}/{'/'.join(map(str, self.grid))}"

    @property
    def nbytes(self) -> int:
        return math.prod(part.stop - part.start for part in self.index) * self.array.leaf.dtype.itemsize

    def read(self) -> np.ndarray:
        return self.array.leaf.read(self.index)

    def copy(self, values: np.ndarray | None = None) -> str:
        """A chunk without compression is its values in C order; what lies beyond the array's edge is zeros."""
        parts = read_parts(self.array.leaf, self.index) if values is None else [values]
        fd = os.open(_chunk_file(self.array.directory, self.grid), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            digest = write_parts(parts, fd, 0)
            os.ftruncate(fd, self.size)
            os.fsync(fd)
        finally:
            os.close(fd)
        return digest

    def unsynced(self) -> None:
        return None

    def written(self) -> bool:
        try:
            size = os.stat(_chunk_file(self.array.directory, self.grid)).st_size
        except OSError:
            return False
        return size == self.size

    @property
    def size(self) -> int:
        """Bytes of the chunk's file."""
        return math.prod(self.array.chunk) * self.array.leaf.dtype.itemsize


@dataclasses.dataclass
class Array:
    """An array being written."""

    path: str
    leaf: Any  # reads like a Leaf
    chunk: tuple[int, ...]
    directory: str

    def jobs(self) -> list[ChunkJob]:
        return [ChunkJob(self, grid, index) for grid, index in boxes(self.leaf.shape, self.chunk)]


def _chunk_file(directory: str, grid: tuple[int, ...]) -> str:
    return f"{directory}/c.{'.'.join(map(str, grid))}"


def plan_arrays(root: Path, leaves: dict[str, Any], slots: dict[str, names.Slot]) -> list[Array]:
    """The array below `root`/params for every leaf; nothing is written yet."""
    lead, arrays = names.lead_dims(slots), []
    for path, leaf in leaves.items():
        chunk = chunk_shape(path, leaf.shape, leaf.dtype, lead[path.removesuffix(names.SCALE)])
        arrays.append(Array(path, leaf, chunk, str(root / files.PARAMS / path)))
    return arrays


def _spec(array: Array) -> dict[str, Any]:
    codec: dict[str, Any] = {"name": "bytes"}
    if array.leaf.dtype.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    metadata = {
        "shape": list(array.leaf.shape),
        "data_type": array.leaf.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},  # one directory per array
        "codecs": [codec],
    }
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": array.directory}, "metadata": metadata}


def create(arrays: list[Array]) -> None:
    """Creates them on disk, without chunks yet, or finds them where an earlier run did."""
    for opening in [ts.open(_spec(array), open=True, create=True) for array in arrays]:
        opening.result()


def layer_by_layer(arrays: list[Array]) -> list[ChunkJob]:
    """Their jobs in the order of the source's layers: its shards are then read from front to back."""
    stacks = ("dense_layers", "moe_layers", "mtp")

    def order(job: ChunkJob) -> tuple[int, int]:
        kind = job.array.path.split(".")[0]
        stack = stacks.index(kind) if kind in stacks else -1
        return stack, job.grid[0] if stack in (0, 1) else 0

    return sorted((job for array in arrays for job in array.jobs()), key=order)


def write_metadata(
    work: WorkDir,
    arrays: list[Array],
    hf_config: dict[str, Any],
    *,
    made_from: str,
    exact_dtypes: dict[str, str] | None = None,
    quantised: Quantised | None = None,
) -> dict[str, str]:
    """All that makes the chunks a checkpoint, Orbax's metadata last. Returns the digest of every array."""
    for directory, _, there in os.walk(work.root / files.PARAMS):
        for name in there:
            if name.endswith(".__lock"):  # of a write that was killed
                os.unlink(os.path.join(directory, name))
    rows = {}
    for array in arrays:
        digests = [bytes.fromhex(work.digests[job.key]) for job in array.jobs()]
        rows[array.path] = {
            "shape": array.leaf.shape,
            "dtype": array.leaf.dtype.name,
            "chunk": array.chunk,
            "digest": xxhash.xxh3_128_hexdigest(b"".join(digests)),
        }
    manifest = {
        "format": "glm45_jax checkpoint",
        "version": VERSION,
        "made_from": made_from,
        "quantised": dataclasses.asdict(quantised) if quantised else None,
        "source_dtypes": exact_dtypes or {},
        "arrays": rows,
    }
    files.write_json(work.root / files.MANIFEST, manifest)
    files.write_json(work.root / "config.json", hf_config)
    _write_orbax(work.root / files.PARAMS, list(rows))
    return {path: row["digest"] for path, row in rows.items()}


def _write_orbax(params: Path, paths: list[str]) -> None:
    """What Orbax looks for beside the arrays (orbax-checkpoint 0.12: `_METADATA`, and `_sharding` by base64 name).

    `np.ndarray` restores into host memory when no sharding is asked for; the sharding noted, replicated over whatever
    devices there are, serves abstract trees that name none.
    """
    sharding = {"sharding_type": "NamedSharding", "shape": [-1], "axis_names": ["devices"], "partition_spec": []}
    entries = {}
    for path in paths:
        keys = path.split(".")
        entries[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    tree = {"use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
    shardings = {base64.b64encode(path.encode()).decode(): json.dumps(sharding) for path in paths}
    files.write_json(params / "_sharding", shardings)
    files.write_json(params / "_METADATA", {"tree_metadata": entries, **tree, "custom_metadata": None})


# --- reading -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Store:
    """A checkpoint directory of our own, opened. `leaves` holds kept FP8 codes, and their scales as `PATH_scale`."""

    path: Path
    config: ModelConfig
    manifest: dict[str, Any]
    leaves: dict[str, Leaf]
    quantised: Quantised | None

    def dequantised(self) -> dict[str, AnyLeaf]:
        return dequantised(self.leaves, self.quantised)


def is_store(path: Path) -> bool:
    return (path / files.MANIFEST).exists()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole."""
    manifest = files.read_json(path / files.MANIFEST)
    if manifest.get("version") != VERSION:
        raise UserError(f"{path}: checkpoint version {manifest.get('version')!r}, this program reads {VERSION}")
    if not (path / files.PARAMS / "_METADATA").exists():
        raise UserError(f"{path}: not whole, params/_METADATA is missing; convert or copy it again")
    return manifest


def open_store(path: str | os.PathLike) -> Store:
    """Opens a directory that `from_hf` or `save_checkpoint` made.

    Raises:
      UserError: it is not whole, or its arrays are not those of its config.json.
    """
    path = Path(path)
    manifest, config = read_manifest(path), load_hf_config(path)
    quantised = None
    if manifest["quantised"]:
        quantised = Quantised(manifest["quantised"]["form"], tuple(manifest["quantised"]["block"]))
    leaves = {}
    for name, row in manifest["arrays"].items():
        leaves[name] = _leaf(path / files.PARAMS / name, row)
    store = Store(path, config, manifest, leaves, quantised)
    found = {name: leaf.shape for name, leaf in store.dequantised().items()}
    problems = names.difference(found, {name: leaf.shape for name, leaf in names.flat_shapes(config).items()})
    if problems:
        raise UserError(f"{path}: the arrays are not those of config.json: " + "; ".join(problems))
    return store


def _leaf(directory: Path, row: dict[str, Any]) -> Leaf:
    dtype, chunk, prefix = dtypes.named(row["dtype"]), tuple(row["chunk"]), str(directory)
    return Leaf(tuple(row["shape"]), dtype, chunk, lambda grid: FilePiece(_chunk_file(prefix, grid), 0, chunk, dtype))


def digests_on_disk(store: Store) -> dict[str, str]:
    """The digest of every array, from its bytes as they are now."""
    out = {}
    for path, leaf in store.leaves.items():
        parts = [bytes.fromhex(digest_of(read_parts(leaf, index))) for _, index in boxes(leaf.shape, leaf.block)]
        out[path] = xxhash.xxh3_128_hexdigest(b"".join(parts))
    return out
