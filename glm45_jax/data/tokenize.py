"""Tokenising once: a source's records to ArrayRecord files of tokens, by several processes, resumable.

The records are cut into jobs by their number; a job makes one file, written beside and renamed, and then a note of what
it did. A run that was killed repeats only jobs without a note, and ends with the same bytes. All happens in
`OUT.partial`, which becomes `OUT` when everything is there.

A record of a file is a document: little-endian int32 tokens, one that is no target as its bitwise complement. Documents
are not turned round to be filled in: training does that, another way in every epoch, from the tokens.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from glm45_jax.data.config import SourceConfig
from glm45_jax.data.encode import encode_record
from glm45_jax.data.files import ABOUT, File
from glm45_jax.data.records import signed, tokenizer_digest
from glm45_jax.data.sources import RecordError, Source, fingerprint, open_files, open_source
from glm45_jax.errors import UserError
from glm45_jax.text import Tokenizer

Progress = Callable[[int, int], None]  # records done, records in all

_COUNTS = ("records", "tokens", "targets", "skipped", "files", "bytes")  # of a report, the same however it was made
_REPORT_EVERY = 64  # records


@dataclasses.dataclass(frozen=True)
class Job:
    """Records `first` to `first + count` of `files`, into output file `number`."""

    number: int
    files: tuple[File, ...]
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the bytes of the output."""

    source: SourceConfig
    tokenizer: str  # its directory
    append_eos: bool
    loss_on: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `tokenize` made."""

    out: str
    records: int  # documents written
    tokens: int
    targets: int  # tokens that the loss counts
    skipped: dict[str, int]  # records left out, by reason
    files: int
    bytes: int
    seconds: float  # of this call
    new_tokens: int  # made by this call; the others were there

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / max(self.seconds, 1e-9)


def tokenize(
    source: SourceConfig,
    tokenizer: str | Path,
    out: str | Path,
    *,
    append_eos: bool = True,
    loss_on: str = "assistant",
    workers: int | None = None,
    input_bytes: int = 64 << 20,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Writes the records of `source` as tokens to the new local directory `out`, or goes on where a call was stopped.

    Args:
      tokenizer: a checkpoint's directory, or a `tokenizer.json`.
      append_eos, loss_on: as in `DataConfig`.
      workers: processes; one for each processor by default.
      input_bytes: about so much of the input makes one file.
      overwrite: replace `out`, and what an earlier call left unfinished.

    Raises:
      UserError: `out` holds something else, a record cannot be used (unless `source.on_error` is "skip"), or none can.
    """
    out, start = Path(out), time.monotonic()
    partial, notes = out.with_name(out.name + ".partial"), out.with_name(out.name + ".partial") / ".notes"
    settings = Settings(source, str(tokenizer), append_eos, loss_on)
    identity = _identity(settings, input_bytes)
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
    if out.exists():
        return _finished(out, identity)
    if (partial / ABOUT).exists():  # a call that was stopped just before its end
        _finish(partial, out)
        return _finished(out, identity)
    notes.mkdir(parents=True, exist_ok=True)
    with _only_one(partial):
        _check_same(notes, identity)
        jobs = plan_jobs(open_source(source), input_bytes)
        done = {job.number: note for job in jobs if (note := _read_note(partial, job)) is not None}
        before = sum(note["tokens"] for note in done.values())
        _run([job for job in jobs if job.number not in done], settings, partial, workers, progress, done, jobs)
        report = _summary(list(done.values()), out, time.monotonic() - start, before)
        if not report.records:
            raise UserError(f"no record of {source.name} can be used: {report.skipped}")
        counts = {key: getattr(report, key) for key in _COUNTS}
        about = {"record": "tokens", "tokenizer": identity["tokenizer"], **counts, "made_of": identity}
        _write(partial / ABOUT, json.dumps(about, indent=2) + "\n")
    _finish(partial, out)
    return report


def _finish(partial: Path, out: Path) -> None:
    shutil.rmtree(partial / ".notes", ignore_errors=True)
    os.replace(partial, out)


def plan_jobs(source: Source, input_bytes: int) -> list[Job]:
    """Equal runs of records, each of about `input_bytes` of the files; the same for the same files."""
    total = sum(file.size for file in source.files)
    each = max(1, int(len(source) * input_bytes / max(total, 1)))
    jobs = []
    for number, start in enumerate(range(0, len(source), each)):
        stop = min(start + each, len(source))
        first = int(np.searchsorted(source.ends, start, side="right"))
        last = int(np.searchsorted(source.ends, stop - 1, side="right"))
        before = source.ends[first - 1] if first else 0
        jobs.append(Job(number, tuple(source.files[first : last + 1]), start - before, stop - start))
    return jobs


# --- one job -------------------------------------------------------------------------------------------------------


def make_file(job: Job, settings: Settings, folder: Path, tokenizer: Tokenizer, advance: Callable[[int], None]) -> Any:
    """Writes one job's file and its note. Returns the note."""
    source = _open(settings.source, job.files)
    file = folder / f"tokens-{job.number:05d}.array_record"
    new = folder / ".notes" / f"{file.name}.{os.getpid()}"  # what a killed worker leaves goes with the notes
    note: dict[str, Any] = {"records": 0, "tokens": 0, "targets": 0, "bytes": 0, "skipped": Counter()}
    try:
        writer = ArrayRecordWriter(str(new), "group_size:1")
        for done, index in enumerate(range(job.first, job.first + job.count), 1):
            document = _document(source, index, settings, tokenizer, note["skipped"])
            if document is not None:
                writer.write(document.astype("<i4").tobytes())
                note["records"] += 1
                note["tokens"] += len(document)
                note["targets"] += int((document >= 0).sum())
            if done % _REPORT_EVERY == 0 or done == job.count:
                advance((done - 1) % _REPORT_EVERY + 1)
        writer.close()
        if note["records"]:
            note["bytes"] = new.stat().st_size
            _flush(new)
            os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
    _write(_note_path(folder, job.number), json.dumps(note))
    return note


def _document(source: Source, index: int, settings: Settings, tokenizer: Tokenizer, skipped: Counter[str]) -> Any:
    try:
        tokens, targets = encode_record(
            source[index], tokenizer, append_eos=settings.append_eos, loss_on=settings.loss_on
        )
    except RecordError as error:
        if settings.source.on_error == "fatal":
            raise UserError(
                f"{source.place(index)}: {error}. Mend the record, or skip such records with on_error: skip"
            ) from error
        skipped[error.reason] += 1
        return None
    if not len(tokens):
        skipped["empty"] += 1
        return None
    return signed(tokens, targets)


@functools.lru_cache(1)  # jobs come in the order of the files, so that the next one mostly reads the same
def _open(config: SourceConfig, files: tuple[File, ...]) -> Source:
    return open_files(config, list(files))


# --- many jobs -----------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _run(
    jobs: list[Job], settings: Settings, folder: Path, workers: int | None, progress: Progress | None,
    done: dict[int, Any], all_jobs: list[Job],
) -> None:  # fmt: skip
    """Makes the files of `jobs` and puts their notes to `done`."""
    total = sum(job.count for job in all_jobs)
    before = total - sum(job.count for job in jobs)
    show = progress or (lambda done, total: None)
    show(before, total)
    processes = min(workers or _processors(), len(jobs))
    if processes <= 1:
        tokenizer, seen = Tokenizer.load(settings.tokenizer), [before]

        def advance(count: int) -> None:
            seen[0] += count
            show(seen[0], total)

        for job in jobs:
            done[job.number] = make_file(job, settings, folder, tokenizer, advance)
        return
    context = multiprocessing.get_context("spawn")  # threads of Arrow, tokenizers and JAX do not survive a fork
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, context, _start_worker, (settings, folder, counter, os.getpid())
    )
    with pool:
        waiting = {pool.submit(_work, job): job for job in jobs}
        try:
            while waiting:
                ready, _ = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
                show(before + counter.value, total)
                for future in ready:
                    done[waiting.pop(future).number] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _processors() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(settings: Settings, folder: Path, counter: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    _worker.update(settings=settings, folder=folder, counter=counter, tokenizer=Tokenizer.load(settings.tokenizer))


def _work(job: Job) -> Any:
    def advance(count: int) -> None:
        with _worker["counter"].get_lock():
            _worker["counter"].value += count

    return make_file(job, _worker["settings"], _worker["folder"], _worker["tokenizer"], advance)


def _end_with_parent(parent: int) -> None:
    """A parent that was killed leaves workers that nobody waits for."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# --- what is there already -----------------------------------------------------------------------------------------


def _identity(settings: Settings, input_bytes: int) -> dict[str, Any]:
    digest = tokenizer_digest(Tokenizer.load(settings.tokenizer))
    # what matters at training time alone is left out
    source = dataclasses.replace(
        settings.source, weight=1.0, packing="concat", overlong="truncate", fim_rate=0.0, fim_spm_rate=0.5
    )
    return {
        "source": fingerprint(source),
        "on_error": source.on_error,
        "tokenizer": digest,
        "append_eos": settings.append_eos,
        "loss_on": settings.loss_on,
        "input_bytes": input_bytes,
    }


def _check_same(notes: Path, identity: dict[str, Any]) -> None:
    """Refuses to go on with what another call began."""
    file = notes / "made_of.json"
    if not file.exists():
        _write(file, json.dumps(identity))
        return
    _compare(json.loads(file.read_text()), identity, notes.parent)


def _finished(out: Path, identity: dict[str, Any]) -> Report:
    try:
        about = json.loads((out / ABOUT).read_text())
    except (OSError, ValueError):
        raise UserError(f"{out} is there and is no tokenised data: take another directory, or overwrite it") from None
    _compare(about.get("made_of", {}), identity, out)
    return Report(out=str(out), seconds=0.0, new_tokens=0, **{key: about[key] for key in _COUNTS})


def _compare(made_of: dict[str, Any], identity: dict[str, Any], where: Path) -> None:
    different = [key for key, value in identity.items() if made_of.get(key) != value]
    if different:
        raise UserError(
            f"{where} was made of something else ({', '.join(different)} differ): take another directory, or "
            "overwrite it"
        )


def _note_path(folder: Path, number: int) -> Path:
    return folder / ".notes" / f"{number:05d}.json"


def _read_note(folder: Path, job: Job) -> dict[str, Any] | None:
    """What a finished job noted; None where it has to be done."""
    try:
        return json.loads(_note_path(folder, job.number).read_text())
    except FileNotFoundError:
        return None


def _summary(notes: list[dict[str, Any]], out: Path, seconds: float, before: int) -> Report:
    sums = {key: sum(note[key] for note in notes) for key in ("records", "tokens", "targets", "bytes")}
    skipped: Counter[str] = sum((Counter(note["skipped"]) for note in notes), Counter())
    files = sum(note["records"] > 0 for note in notes)
    return Report(
        out=str(out), skipped=dict(skipped), files=files, seconds=seconds, new_tokens=sums["tokens"] - before, **sums
    )


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Refuses a second process in the same folder; the lock ends with the process, however it ends."""
    with open(folder / ".notes" / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is tokenising into {folder}; wait for it") from None
        yield


def _write(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.write_text(text, "utf-8")
    os.replace(new, file)


def _flush(file: Path) -> None:
    with open(file, "rb") as f:
        os.fsync(f.fileno())
