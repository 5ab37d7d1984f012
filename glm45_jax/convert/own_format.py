"""Into our own directory: `from_hf` from a Hugging Face checkpoint, `save_checkpoint` from params in memory."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from glm45_jax.config import ModelConfig
from glm45_jax.convert import files, memory, names, store
from glm45_jax.convert.hf_source import config_to_keep, open_source
from glm45_jax.convert.transfer import Progress, WorkDir, transfer, working


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    target: str
    tensors: int  # Hugging Face tensors
    arrays: int  # arrays written, or tensors for `to_hf`
    bytes: int
    resumed_bytes: int  # of those, done by an earlier run
    seconds: float
    digests: dict[str, str]


def from_hf(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    keep_fp8: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Converts a Hugging Face checkpoint into our own directory, streamed: an expert's matrix at a time.

    Killed and called again it goes on where it was. `keep_fp8` stores FP8 codes and their scales instead of bfloat16.

    Raises:
      UserError: everything that is wrong with the source, in one; the target exists; the disk is full.
    """
    begin, target = time.monotonic(), Path(target)
    checkpoint = open_source(Path(source))
    purpose = f"from_hf {checkpoint.fingerprint} keep_fp8={keep_fp8} version={store.VERSION}"
    done = _already(target, purpose)
    if done is not None:
        arrays = done["arrays"]
        digests = {path: row["digest"] for path, row in arrays.items()}
        return Summary(str(target), checkpoint.tensor_count, len(arrays), 0, 0, time.monotonic() - begin, digests)
    leaves = checkpoint.leaves if keep_fp8 else checkpoint.dequantised()
    quantised = checkpoint.quantised if keep_fp8 else None
    slots = names.hf_slots(checkpoint.config)
    exact = checkpoint.exact_dtypes
    if checkpoint.quantised and not keep_fp8:
        changed = {path for path in leaves if path + names.SCALE in checkpoint.leaves}
        exact = {name: d for name, d in exact.items() if name in slots and slots[name].path not in changed}
    work = WorkDir(target, purpose)
    arrays = store.plan_arrays(work.root, leaves, slots)
    jobs = store.layer_by_layer(arrays)
    with working(work, overwrite):
        store.create(arrays)
        resumed = transfer(jobs, work, progress)
        files.copy_companions(checkpoint.path, work.root)
        digests = store.write_metadata(
            work,
            arrays,
            config_to_keep(checkpoint, keep_fp8),
            exact_dtypes=exact,
            quantised=quantised,
            made_from=purpose,
        )
    total = sum(job.nbytes for job in jobs)
    seconds = time.monotonic() - begin
    return Summary(str(target), checkpoint.tensor_count, len(arrays), total, resumed, seconds, digests)


def _already(target: Path, purpose: str) -> dict[str, Any] | None:
    """The manifest at `target` if this very conversion has ended there before."""
    if not store.is_store(target):
        return None
    manifest = store.read_manifest(target)
    if manifest.get("made_from") != purpose:
        return None
    files.remove(target.with_name(target.name + ".partial"))  # killed right after the rename
    return manifest


def save_checkpoint(
    params: dict[str, Any],
    config: ModelConfig,
    path: str | os.PathLike,
    tokenizer_dir: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Writes params, sharded or not, as a checkpoint directory of our own; small files of `tokenizer_dir` come along.

    Where arrays span several processes, all of them call this and the first writes.

    Raises:
      UserError: params don't belong to `config`, the target exists, the disk is full.
    """
    begin = time.monotonic()
    leaves = memory.memory_leaves(params, config)
    config = config.replace(param_dtype=leaves["embed.weight"].dtype.name)
    slots = names.hf_slots(config)
    purpose = f"save_checkpoint {os.getpid()} {time.time_ns()}"  # never resumed: memory has no fingerprint
    work = WorkDir(path, purpose)
    arrays = store.plan_arrays(work.root, leaves, slots)
    jobs = [job for array in arrays for job in array.jobs()]
    digests = {}
    if not memory.takes_part_only(jobs):
        with working(work, overwrite):
            store.create(arrays)
            transfer(jobs, work, progress, reads_in_order=True)
            if tokenizer_dir is not None:
                files.copy_companions(Path(tokenizer_dir), work.root)
            digests = store.write_metadata(work, arrays, config.to_hf(), made_from="save_checkpoint")
    total = sum(job.nbytes for job in jobs)
    return Summary(str(path), len(slots), len(arrays), total, 0, time.monotonic() - begin, digests)
