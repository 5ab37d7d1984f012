"""Into Hugging Face's format: `to_hf` from our own directory, `export_hf` from params in memory.

Sharded safetensors with an index, one tensor per expert, in the order of the layers, each tensor in the dtype that it
had in the checkpoint it came from. Beside them the config, generation config and tokenizer files, and the digest of
every tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax.config import ModelConfig
from glm45_jax.convert import dtypes, files, memory, names, store
from glm45_jax.convert.own_format import Summary
from glm45_jax.convert.pieces import Index, Leaf, whole
from glm45_jax.convert.safetensors_io import TensorInfo, make_header
from glm45_jax.convert.transfer import Progress, WorkDir, read_parts, transfer, working, write_parts
from glm45_jax.errors import UserError

MAX_SHARD_SIZE = "5GB"
_LARGE = 256 * 2**20


@dataclasses.dataclass
class Shard:
    """One safetensors file being written at its full length, tensors in any order."""

    path: Path
    header: bytes
    places: dict[str, TensorInfo]
    fd: int = -1
    whole_before: bool = False  # an earlier run left it at its full length

    @property
    def size(self) -> int:
        return len(self.header) + sum(place.nbytes for place in self.places.values())

    def open(self) -> None:
        self.whole_before = self.path.exists() and self.path.stat().st_size == self.size
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self.fd, self.size)
        os.pwrite(self.fd, self.header, 0)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclasses.dataclass
class TensorJob:
    """One tensor, into its place in a shard."""

    key: str
    shard: Shard
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return self.shard.places[self.key].nbytes

    def read(self) -> np.ndarray:
        return next(iter(self.parts()))

    def copy(self, values: np.ndarray | None = None) -> str:
        parts = self.parts() if values is None else [values]
        return write_parts(parts, self.shard.fd, self.shard.places[self.key].offset)

    def unsynced(self) -> int:
        return self.shard.fd

    def written(self) -> bool:
        return self.shard.whole_before


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor on its way out: `parts` gives its values, in one array or in several that follow each other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]


def plan_shards(tensors: list[Outgoing], root: Path, max_shard_size: str | int) -> list[TensorJob]:
    """Divides the tensors over shards of at most `max_shard_size` (a larger tensor has one for itself)."""
    limit, groups, used = parse_size(max_shard_size), [[]], 0
    for tensor in tensors:
        nbytes = math.prod(tensor.shape) * dtypes.BY_NAME[tensor.dtype].itemsize
        if used and used + nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += nbytes
    jobs = []
    for i, group in enumerate(groups, 1):
        header, places = make_header((t.name, t.dtype, t.shape) for t in group)
        shard = Shard(root / f"model-{i:05d}-of-{len(groups):05d}.safetensors", header, places)
        jobs += [TensorJob(t.name, shard, t.parts) for t in group]
    return sorted(jobs, key=lambda job: job.nbytes < _LARGE)  # largest first: else one thread ends long after the rest


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a number."""
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise UserError(f"size {size!r} is not understood; write it like 5GB or 500MB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def write_checkpoint(
    jobs: list[TensorJob],
    work: WorkDir,
    hf_config: dict[str, Any],
    companions: Path | None,
    *,
    overwrite: bool,
    made_from: str,
    progress: Progress | None,
    reads_in_order: bool = False,
) -> int:
    """Tensors, then everything beside them; returns the bytes done by an earlier run."""
    shards = {job.shard.path: job.shard for job in jobs}
    with working(work, overwrite):
        try:
            for shard in shards.values():
                shard.open()
            resumed = transfer(jobs, work, progress, reads_in_order=reads_in_order)
            for shard in shards.values():
                os.fsync(shard.fd)
        finally:
            for shard in shards.values():
                shard.close()
        if companions is not None:
            files.copy_companions(companions, work.root)
        if not (work.root / "generation_config.json").exists():
            files.write_json(work.root / "generation_config.json", _generation_config(hf_config))
        digests = {job.key: work.digests[job.key] for job in jobs}
        files.write_json(work.root / files.DIGESTS, {"made_from": made_from, "digests": digests})
        index = {
            "metadata": {"total_size": sum(job.nbytes for job in jobs)},
            "weight_map": {job.key: job.shard.path.name for job in sorted(jobs, key=lambda job: job.key)},
        }
        files.write_json(work.root / files.HF_INDEX, index)
        files.write_json(work.root / "config.json", hf_config)
    return resumed


def _generation_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    ids = {key: hf_config[key] for key in ("eos_token_id", "pad_token_id") if hf_config.get(key) is not None}
    return {"_from_model_config": True, **ids}


# --- from our own directory ----------------------------------------------------------------------------------------


def to_hf(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Converts our own directory into Hugging Face's format. Killed and called again it goes on where it was.

    Raises:
      UserError: the source is not whole, the target exists, the disk is full.
    """
    begin, target = time.monotonic(), Path(target)
    if not store.is_store(Path(source)):
        raise UserError(f"{source}: no checkpoint of glm45_jax ({files.MANIFEST} is missing)")
    checkpoint = store.open_store(source)
    facts = [checkpoint.manifest, files.read_json(checkpoint.path / "config.json"), str(max_shard_size)]
    purpose = f"to_hf {files.fingerprint(files.companions(checkpoint.path), facts)}"
    done = _already(target, purpose)
    if done is not None:
        return Summary(str(target), len(done), len(done), 0, 0, time.monotonic() - begin, done)
    work = WorkDir(target, purpose)
    jobs = plan_shards(_stored_tensors(checkpoint), work.root, max_shard_size)
    resumed = write_checkpoint(
        jobs, work, facts[1], checkpoint.path, overwrite=overwrite, made_from=purpose, progress=progress
    )
    return _summary(jobs, work, resumed, begin)


def _summary(jobs: list[TensorJob], work: WorkDir, resumed: int, begin: float) -> Summary:
    digests = {job.key: work.digests[job.key] for job in jobs if job.key in work.digests}
    total = sum(job.nbytes for job in jobs)
    return Summary(str(work.target), len(jobs), len(jobs), total, resumed, time.monotonic() - begin, digests)


def _already(target: Path, purpose: str) -> dict[str, str] | None:
    """The digests at `target` if this very conversion has ended there before."""
    if not (target / files.DIGESTS).exists() or not (target / "config.json").exists():
        return None
    found = files.read_json(target / files.DIGESTS)
    if found.get("made_from") != purpose:
        return None
    files.remove(target.with_name(target.name + ".partial"))  # killed right after the rename
    return found["digests"]


def _stored_tensors(checkpoint: store.Store) -> list[Outgoing]:
    """Every tensor of the checkpoint, FP8 codes followed by their scales, in the dtypes that they came in."""
    out = []
    exact, leaves = checkpoint.manifest["source_dtypes"], checkpoint.leaves
    for name, slot in names.hf_slots(checkpoint.config).items():
        out.append(_stored(name, slot, leaves[slot.path], exact.get(name)))
        if out[-1].dtype == "F8_E4M3":
            assert checkpoint.quantised
            scale = name + names.SCALE_SUFFIXES[checkpoint.quantised.form]
            out.append(_stored(scale, slot, leaves[slot.path + names.SCALE], exact.get(scale)))
    return out


def _stored(name: str, slot: names.Slot, leaf: Leaf, dtype: str | None) -> Outgoing:
    """The tensor of `leaf` at `slot`, in the array's dtype or, exactly, in the narrower one that it came in."""
    dtype = dtype or dtypes.NAMES[leaf.dtype]
    shape, lead = leaf.shape[len(slot.index) :], tuple(slice(i, i + 1) for i in slot.index)

    def parts() -> Iterator[np.ndarray]:
        for values in read_parts(leaf, (*lead, *whole(shape))):
            yield dtypes.narrow(values, dtypes.BY_NAME[dtype])

    return Outgoing(name, dtype, shape, parts)


# --- from memory ---------------------------------------------------------------------------------------------------


def export_hf(
    params: dict[str, Any],
    config: ModelConfig,
    path: str | os.PathLike,
    *,
    tokenizer_dir: str | os.PathLike | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Writes params, sharded or not, as a Hugging Face checkpoint that transformers loads.

    Arrays come to the host one layer at a time; where they span several processes, all of them call this and the first
    writes. The small files of `tokenizer_dir` (tokenizer, chat template, generation config) come along.

    Raises:
      UserError: params don't belong to `config`, the target exists, the disk is full.
    """
    begin = time.monotonic()
    leaves = memory.memory_leaves(params, config)
    config = config.replace(param_dtype=leaves["embed.weight"].dtype.name)
    tensors = []
    for name, slot in names.hf_slots(config).items():
        leaf = leaves[slot.path]
        index = (*(slice(i, i + 1) for i in slot.index), *whole(slot.shape))
        parts = functools.partial(_in_memory, leaf, index)
        tensors.append(Outgoing(name, dtypes.NAMES[leaf.dtype], slot.shape, parts))
    work = WorkDir(path, f"export_hf {os.getpid()} {time.time_ns()}")  # never resumed: memory has no fingerprint
    jobs = plan_shards(tensors, work.root, max_shard_size)
    if not memory.takes_part_only(jobs):
        write_checkpoint(
            jobs,
            work,
            config.to_hf(),
            Path(tokenizer_dir) if tokenizer_dir is not None else None,
            overwrite=overwrite,
            made_from="export_hf",
            progress=progress,
            reads_in_order=True,
        )
    return _summary(jobs, work, 0, begin)


def _in_memory(leaf: memory.MemoryLeaf, index: Index) -> list[np.ndarray]:
    return [leaf.read(index)]
