"""Stopped anywhere and called again, a conversion goes on and ends the same; what is half made is never the target."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from glm45_jax import convert
from glm45_jax.convert import files, hf_format, own_format, store, transfer
from glm45_jax.errors import UserError
from tests.convert.support import ROOT, make, raw_tensors


class Stopped(BaseException):
    """What a signal does to the process, without the process."""


def tree(path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def stop_after(monkeypatch, cls, count: int) -> list[int]:
    """Lets `count` jobs of `cls` pass, then stops; returns the counter of jobs done."""
    whole, done = cls.copy, [0]

    def copy(self, values=None):
        if done[0] >= count:
            raise Stopped
        done[0] += 1
        return whole(self, values)

    monkeypatch.setattr(cls, "copy", copy)
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    source = make(folder / "hf", fp8="channel", mtp="shared")
    convert.from_hf(source, folder / "own", keep_fp8=True)
    convert.to_hf(folder / "own", folder / "back", max_shard_size="30KB")
    return folder


DIRECTIONS = {
    "from_hf": (store.ChunkJob, lambda f, out: convert.from_hf(f / "hf", out, keep_fp8=True), "own"),
    "to_hf": (hf_format.TensorJob, lambda f, out: convert.to_hf(f / "own", out, max_shard_size="30KB"), "back"),
}


@pytest.mark.parametrize("cls,run,expected", DIRECTIONS.values(), ids=DIRECTIONS)
def test_goes_on_where_it_was(cls, run, expected, whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "_SYNC_EVERY", 4000)  # record after every few jobs
    out, redone, total = tmp_path / "out", 0, 0
    for count in (0, 1, 30, 80, 50):
        with monkeypatch.context() as patch:
            done = stop_after(patch, cls, count)
            with pytest.raises(Stopped):
                run(whole, out)
            redone += done[0]
        assert not out.exists() and (tmp_path / "out.partial").exists()
        with pytest.raises(UserError, match=r"interrupted|no such directory"):
            convert.load_checkpoint(out)
        with pytest.raises(UserError):
            convert.load_checkpoint(tmp_path / "out.partial" / "target")
    with monkeypatch.context() as patch:
        done = stop_after(patch, cls, 10**9)
        summary = run(whole, out)
        total = done[0] + redone
    assert summary.resumed_bytes > 0
    assert tree(out) == tree(whole / expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # no more than a few jobs, those not yet recorded, were done twice
    assert total < len(list_jobs(whole, expected)) + 5 * 12


def list_jobs(whole, expected):
    if expected == "own":
        return list((whole / "own" / "params").rglob("c.*"))
    return list(raw_tensors(whole / "back"))


@pytest.mark.parametrize("cls,run,expected", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("step", ["companions", "json", "rename", "removal"])
def test_stopped_at_the_end(cls, run, expected, step, whole, tmp_path, monkeypatch) -> None:
    def stop(*args, **kwargs):
        raise Stopped

    places = {
        "companions": (files, "copy_companions"),
        "json": (files, "write_json"),
        "rename": (os, "rename"),
        "removal": (transfer.WorkDir, "discard"),
    }
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(*places[step], stop)
        with pytest.raises(Stopped):
            run(whole, out)
    assert out.exists() == (step == "removal")
    run(whole, out)
    assert tree(out) == tree(whole / expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run(whole, out).bytes == 0  # done already


def test_another_source_starts_anew(tmp_path, monkeypatch) -> None:
    """Also one of the same names and sizes: only its times and bytes differ."""
    first, second = make(tmp_path / "first"), make(tmp_path / "second", seed=1)
    with monkeypatch.context() as patch:
        stop_after(patch, store.ChunkJob, 40)
        with pytest.raises(Stopped):
            convert.from_hf(first, tmp_path / "own")
    summary = convert.from_hf(second, tmp_path / "own")
    assert summary.resumed_bytes == 0
    convert.to_hf(tmp_path / "own", tmp_path / "back")
    assert raw_tensors(tmp_path / "back") == raw_tensors(second)


def test_other_options_start_anew(whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "_SYNC_EVERY", 1)
    with monkeypatch.context() as patch:
        stop_after(patch, store.ChunkJob, 40)
        with pytest.raises(Stopped):
            convert.from_hf(whole / "hf", tmp_path / "own", keep_fp8=True)
    assert convert.from_hf(whole / "hf", tmp_path / "own").resumed_bytes == 0


def test_damaged_work_is_done_again(whole, tmp_path, monkeypatch) -> None:
    """A log with a torn last line, a chunk cut short, another gone."""
    monkeypatch.setattr(transfer, "_SYNC_EVERY", 1)
    with monkeypatch.context() as patch:
        stop_after(patch, store.ChunkJob, 60)
        with pytest.raises(Stopped):
            convert.from_hf(whole / "hf", tmp_path / "own", keep_fp8=True)
    work = tmp_path / "own.partial"
    with open(work / "done.jsonl", "a") as log:
        log.write('["moe_layers.moe.experts.gate/0/')
    chunks = sorted((work / "target" / "params").rglob("c.*"))
    chunks[0].unlink()
    os.truncate(chunks[1], 3)
    convert.from_hf(whole / "hf", tmp_path / "own", keep_fp8=True)
    assert tree(tmp_path / "own") == tree(whole / "own")


def test_two_at_once(whole, tmp_path) -> None:
    work = transfer.WorkDir(tmp_path / "own", "another")
    work.open()
    with pytest.raises(UserError, match="another process is writing there"):
        convert.from_hf(whole / "hf", tmp_path / "own")
    assert work.directory.exists()
    work.close()
    convert.from_hf(whole / "hf", tmp_path / "own")


def test_digests_do_not_depend_on_the_run(whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "_THREADS", 1)
    convert.from_hf(whole / "hf", tmp_path / "own", keep_fp8=True)
    assert tree(tmp_path / "own") == tree(whole / "own")
    manifest = json.loads((tmp_path / "own" / files.MANIFEST).read_text())
    assert (
        manifest["arrays"]["final_norm.scale"]["digest"]
        == own_format.store.digests_on_disk(store.open_store(tmp_path / "own"))["final_norm.scale"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("command,expected", [("from-hf", "own"), ("to-hf", "back")])
def test_killed(command, expected, whole, tmp_path) -> None:
    """SIGKILL at random moments, from the first byte written to the last."""
    source = whole / ("hf" if command == "from-hf" else "own")
    extra = ["--keep-fp8"] if command == "from-hf" else ["--max-shard-size", "30KB"]
    args = [sys.executable, "-m", "glm45_jax", "convert", command, str(source), str(tmp_path / "out"), "-j", *extra]
    where = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
    rng, kills = random.Random(0), 0
    while kills < 4:
        process = subprocess.Popen(args, **where)
        begin = time.monotonic()
        while not (tmp_path / "out.partial").exists() and time.monotonic() < begin + 60:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if (tmp_path / "out").exists():  # ended before it was killed
            shutil.rmtree(tmp_path / "out")
    subprocess.run(args, check=True, **where)
    assert tree(tmp_path / "out") == tree(whole / expected)
