"""Copies that survive being killed: a work directory beside the target, a log of what is done, one rename at the end.

`DST.partial/` holds `target/`, which becomes DST, and `done.jsonl`: a line that says what is being made from what, then
one line for each chunk or tensor with its xxh3 digest, written only once its bytes are on the disk. The same command
run again goes on after those lines; another source, other options, or a file that is not what the log says start anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import xxhash

from glm45_jax.convert import files
from glm45_jax.convert.pieces import Index
from glm45_jax.errors import UserError

Progress = Callable[[int, int], None]  # bytes done, bytes in all

PART = 8 * 2**20  # bytes of a tensor that are held at a time
_WRITE = 2**18  # bytes given to one `write`: Linux takes far longer over one of a megabyte than over four of these
_THREADS = 4
_IN_FLIGHT = 256 * 2**20  # bytes of arrays held at a time, whatever the number of threads
_SYNC_EVERY = 256 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Job(Protocol):
    """One chunk or tensor to be made."""

    @property
    def key(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def read(self) -> np.ndarray: ...

    def copy(self, values: np.ndarray | None = None) -> str:
        """Writes what `read` gave, or what it reads itself part by part, and returns its digest."""
        ...

    def unsynced(self) -> int | None:
        """The file descriptor to sync before what was written is on the disk, if it is not there already."""
        ...

    def written(self) -> bool:
        """Whether the file that the log speaks of is there, at its length."""
        ...


class WorkDir:
    """`DST.partial/`, locked for this process."""

    def __init__(self, target: str | os.PathLike, purpose: str):
        self.target = target = Path(os.path.abspath(target))
        self.directory = target.with_name(target.name + ".partial")
        self.root = self.directory / "target"
        self._log_path = self.directory / "done.jsonl"
        self._purpose = purpose
        self._log: TextIO | None = None
        self._lock: int | None = None
        self.digests: dict[str, str] = {}

    def open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.directory / "lock")
        lines = self._log_path.read_text("utf-8").splitlines() if self._log_path.exists() else []
        if not lines or lines[0] != json.dumps({"purpose": self._purpose}):
            files.remove(self.root)
            files.write_bytes(self._log_path, (json.dumps({"purpose": self._purpose}) + "\n").encode())
            lines = []
        for line in lines[1:]:
            with contextlib.suppress(ValueError, TypeError):  # the last line may be torn
                key, digest = json.loads(line)
                self.digests[key] = digest
        self.root.mkdir(exist_ok=True)
        self._log = open(self._log_path, "a", encoding="utf-8")  # noqa: SIM115
        self._log.write("\n")  # ends a torn line

    @property
    def is_open(self) -> bool:
        return self._log is not None

    def record(self, digests: dict[str, str]) -> None:
        assert self._log
        self.digests |= digests
        self._log.writelines(json.dumps([key, digest]) + "\n" for key, digest in digests.items())
        self._log.flush()

    def finish(self, overwrite: bool) -> None:
        """The one rename that makes the target. With `overwrite` an older checkpoint there steps aside first."""
        for directory, _, _ in os.walk(self.root):
            files.sync_directory(Path(directory))
        old = self.directory / "replaced"
        if overwrite and self.target.exists():
            os.rename(self.target, old)
        os.rename(self.root, self.target)
        files.sync_directory(self.target.parent)
        self.discard()

    def discard(self) -> None:
        files.remove(self.directory)

    def close(self) -> None:
        if self._log:
            with contextlib.suppress(OSError):  # of a disk that was full
                self._log.close()
        if self._lock is not None:
            os.close(self._lock)


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UserError(f"{path.parent}: another process is writing there; wait, or choose another target") from None
    except OSError:
        pass  # a file system without locks
    return fd


def check_target(target: Path, overwrite: bool) -> None:
    """A target must be new, an empty directory, or with `overwrite` an older checkpoint."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: a file stands there; name a directory")
    inside = {file.name for file in target.iterdir()}
    if not inside:
        return
    if not overwrite:
        raise UserError(f"{target}: exists already; choose another directory, or overwrite it")
    if "config.json" not in inside:
        raise UserError(f"{target}: exists and holds no checkpoint; it is not overwritten")


@contextlib.contextmanager
def working(work: WorkDir, overwrite: bool) -> Iterator[None]:
    """Within the block `work` may be written to. It becomes the target when the block ends, is kept for the next run
    when the process is stopped, and is removed when the input turns out bad or the disk full."""
    check_target(work.target, overwrite)
    try:
        work.open()
        yield
        work.finish(overwrite)
    except UserError:
        if work.is_open:
            work.discard()
        raise
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"{work.target}: cannot be written ({e.strerror}: {e.filename})") from e
        if not _disk_full(e):
            raise
        work.discard()
        raise UserError(f"{work.target}: the disk is full; nothing was left there") from e
    finally:
        work.close()


def _disk_full(e: Exception) -> bool:
    if isinstance(e, OSError):
        return e.errno in _FULL
    code = re.search(r"os_error_code='(\d+)'", str(e))  # tensorstore tells it in words
    return code is not None and int(code[1]) in _FULL


def transfer(
    jobs: Sequence[Job], work: WorkDir, progress: Progress | None = None, *, reads_in_order: bool = False
) -> int:
    """Does every job that the log does not have; returns the bytes that had been done before.

    `reads_in_order`: reads happen one after the other on this thread, for sources that other processes take part in.
    """
    total = sum(job.nbytes for job in jobs)
    todo = [job for job in jobs if not (job.key in work.digests and job.written())]
    remaining = sum(job.nbytes for job in todo)
    _check_space(work, remaining)
    show = progress or (lambda done, total: None)
    show(total - remaining, total)
    log = _Log(work, lambda done: show(total - remaining + done, total))
    # Read here, a job's values wait in memory for a thread; else the threads read, and a job waiting weighs nothing.
    weight = (lambda job: job.nbytes) if reads_in_order else (lambda job: _IN_FLIGHT // 64)
    room = _Room(_IN_FLIGHT)
    with ThreadPoolExecutor(_THREADS) as pool:
        futures: deque[tuple[Job, Future[str]]] = deque()
        try:
            for job in todo:
                room.take(weight(job))
                values = job.read() if reads_in_order else None
                futures.append((job, pool.submit(_copy, job, values, room, weight(job))))
                del values
                while futures and futures[0][1].done():
                    log.add(futures[0][0], futures.popleft()[1].result())
            while futures:
                job, future = futures.popleft()
                log.add(job, future.result())
            log.flush()
        except BaseException:
            for _, future in futures:
                future.cancel()
            raise
    return total - remaining


def _copy(job: Job, values: np.ndarray | None, room: _Room, weight: int) -> str:
    try:
        return job.copy(values)
    finally:
        room.give(weight)


def raw(values: np.ndarray) -> np.ndarray:
    """Its bytes in C order, as a flat array."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def write_parts(parts: Iterable[np.ndarray], fd: int, offset: int) -> str:
    """Writes arrays one after the other from `offset` on; returns the xxh3-128 of their bytes."""
    digest = xxhash.xxh3_128()
    for part in parts:
        data = raw(part).data
        digest.update(data)
        for begin in range(0, len(data), _WRITE):
            piece = data[begin : begin + _WRITE]
            while piece:
                done = os.pwrite(fd, piece, offset)
                offset, piece = offset + done, piece[done:]
    return digest.hexdigest()


def read_parts(leaf: Any, index: Index) -> Iterator[np.ndarray]:
    """`leaf[index]` in parts that follow each other in C order; each is valid until the next is asked for."""
    sizes = [part.stop - part.start for part in index]
    axis = next((i for i, size in enumerate(sizes) if size > 1), len(sizes) - 1)
    rows = max(1, PART // (math.prod(sizes[axis + 1 :]) * leaf.dtype.itemsize))
    for start in range(index[axis].start, index[axis].stop, rows):
        stop = min(start + rows, index[axis].stop)
        part = (*index[:axis], slice(start, stop), *index[axis + 1 :])
        shape = (*sizes[:axis], stop - start, *sizes[axis + 1 :])
        yield leaf.read(part, out=_scratch(shape, leaf.dtype))


def digest_of(parts: Iterable[np.ndarray]) -> str:
    """The xxh3-128 of arrays one after the other."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(raw(part).data)
    return digest.hexdigest()


_reused = threading.local()


def _scratch(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array for the calling thread to use until it asks again: fresh memory costs as much time as reading."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > PART:
        return np.empty(shape, dtype)
    if not hasattr(_reused, "buffer"):
        _reused.buffer = np.empty(PART, np.uint8)
    return _reused.buffer[:nbytes].view(dtype).reshape(shape)


class _Log:
    """Gathers finished jobs and records them once their bytes are on the disk."""

    def __init__(self, work: WorkDir, show: Callable[[int], None]):
        self._work, self._show = work, show
        self._waiting: list[tuple[Job, str]] = []
        self._bytes = self._done = 0

    def add(self, job: Job, digest: str) -> None:
        self._waiting.append((job, digest))
        self._bytes += job.nbytes
        self._done += job.nbytes
        self._show(self._done)
        if self._bytes >= _SYNC_EVERY:
            self.flush()

    def flush(self) -> None:
        for fd in {job.unsynced() for job, _ in self._waiting} - {None}:
            os.fsync(fd)  # pyright: ignore
        self._work.record({job.key: digest for job, digest in self._waiting})
        self._waiting, self._bytes = [], 0


class _Room:
    """Bounds the bytes in flight; a job larger than the bound goes alone."""

    def __init__(self, limit: int):
        self._limit, self._used, self._changed = limit, 0, threading.Condition()

    def take(self, nbytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + nbytes <= self._limit)
            self._used += nbytes

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()


def _check_space(work: WorkDir, nbytes: int) -> None:
    free = shutil.disk_usage(work.directory).free
    if nbytes > free:
        raise UserError(
            f"{work.target.parent}: the disk is too full: {nbytes / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free"
        )
