"""Measures what the converter promises, on a checkpoint of real GLM-4.5-Air widths: speed, memory, survival.

    python scripts/prove_convert.py --json docs/proofs/convert.json
    python scripts/prove_convert.py --work /mnt/big --kills 5

It writes a random two-layer checkpoint (one dense layer, one of 128 experts of 1408, vocabulary 151552: 7.65 GB),
copies it with `cp` and `sync` for comparison, converts it both ways, compares every byte, kills both conversions at
random moments, and converts a narrower model of 4 and of 24 layers. About 31 GB of disk, all of it removed at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances
from make_checkpoint import Options, make_checkpoint

from glm45_jax.config import get_preset

ROOT = Path(__file__).parents[1]
# `glm45 …` in a process of its own, which reports the most memory that it ever held
RUN = """
import sys
from glm45_jax.cli import main
code = main(sys.argv[2:])
with open(sys.argv[1], "w") as f:
    f.write(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""
PART = 2**26
AIR = get_preset("glm-4.5-air", num_hidden_layers=2)
NARROW = get_preset(
    "glm-4.5-air", hidden_size=1024, intermediate_size=2816, moe_intermediate_size=352, num_attention_heads=16,
    n_routed_experts=64, vocab_size=32768, real_vocab_size=None, num_key_value_heads=4,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Proof:
    """Speed, memory and survival of the converter."""

    json: Path | None = None
    """Where to write the figures."""
    work: Path | None = None
    """A directory with 31 GB free; a temporary one without."""
    repeats: int = 3
    """Measurements of each time; the median counts."""
    kills: int = 20
    """For each direction."""


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-c", RUN, *map(str, args)]


ENV = os.environ | {"JAX_PLATFORMS": "cpu"}


def convert(which: str, source: Path, target: Path) -> dict[str, Any]:
    """One conversion: seconds of the whole process, peak bytes, digests."""
    peak = target.with_name("peak")
    begin = time.monotonic()
    done = subprocess.run(
        command(peak, "convert", which, source, target, "--json"), env=ENV, cwd=ROOT, check=True, capture_output=True
    )
    seconds = time.monotonic() - begin
    summary = json.loads(done.stdout)
    return {"seconds": seconds, "peak": int(peak.read_text()) * 1024, "digests": summary["digests"]}


def copy_and_sync(source: Path, target: Path) -> float:
    os.sync()
    begin = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()
    seconds = time.monotonic() - begin
    shutil.rmtree(target)
    return seconds


def speed_and_memory(folder: Path, repeats: int) -> dict[str, Any]:
    """The 7.65 GB both ways, by turns with cp; what comes back must be what was there."""
    source, own, back = folder / "air", folder / "own", folder / "back"
    made = make_checkpoint(Options(source, mtp="none"), AIR)
    written = json.loads((source / "glm45_digests.json").read_text())["digests"]
    times: dict[str, list[float]] = {"cp_and_sync": [], "from_hf": [], "to_hf": []}
    peaks: dict[str, int] = {}
    for turn in range(repeats):
        times["cp_and_sync"].append(copy_and_sync(source, folder / "copy"))
        there = convert("from-hf", source, own)
        again = convert("to-hf", own, back)
        assert again["digests"] == written, "tensors changed on their way there and back"
        for which, result in (("from_hf", there), ("to_hf", again)):
            times[which].append(result["seconds"])
            peaks[which] = max(peaks.get(which, 0), result["peak"])
        if turn == 0:
            compare_bytes(source, back)
        shutil.rmtree(own)
        shutil.rmtree(back)
    medians = {which: statistics.median(seconds) for which, seconds in times.items()}
    return {
        "bytes": made["bytes"],
        "tensors": made["tensors"],
        "seconds": {which: [round(s, 2) for s in seconds] for which, seconds in times.items()},
        "gigabytes_per_second": {which: round(made["bytes"] / s / 1e9, 3) for which, s in medians.items()},
        "speed_relative_to_cp_and_sync": {
            which: round(medians["cp_and_sync"] / medians[which], 2) for which in ("from_hf", "to_hf")
        },
        "peak_vmhwm_bytes": peaks,
    }


def compare_bytes(source: Path, back: Path) -> None:
    """Every tensor, read again here, apart from the converter and its digests."""
    a, b = locate(source), locate(back)
    assert a.keys() == b.keys()
    for name, (entry, file, offset, nbytes) in a.items():
        assert (entry, nbytes) == (b[name][0], b[name][3]), name
        with open(file, "rb") as left, open(b[name][1], "rb") as right:
            left.seek(offset)
            right.seek(b[name][2])
            for _ in range(0, nbytes, PART):
                size = min(PART, offset + nbytes - left.tell())
                assert left.read(size) == right.read(size), name


def locate(path: Path) -> dict[str, tuple[Any, Path, int, int]]:
    """{tensor: (dtype and shape, file, offset, bytes)} from the headers."""
    out = {}
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            out[name] = ((entry["dtype"], entry["shape"]), file, 8 + length + begin, end - begin)
    return out


def survival(folder: Path, kills: int, seconds: float) -> dict[str, Any]:
    """Both conversions killed at random moments and started again until they end: the digests of the bytes on disk."""
    source, own, back = folder / "air", folder / "own", folder / "back"
    expected = {"from-hf": convert("from-hf", source, own)["digests"]}
    expected["to-hf"] = convert("to-hf", own, back)["digests"]
    shutil.rmtree(back)
    out: dict[str, Any] = {}
    rng = random.Random(0)
    for which, start in (("from-hf", source), ("to-hf", own)):
        target, killed, ended = folder / "killed", 0, 0
        while killed < kills:
            killed += kill(which, start, target, rng.uniform(0, seconds))
            if killed == kills and not target.exists():
                convert(which, start, target)
            if target.exists():
                assert not target.with_name("killed.partial").exists()
                assert verified(target) == expected[which], "other digests after being killed"
                shutil.rmtree(target)
                ended += 1
        out[which.replace("-", "_")] = {"kills": killed, "conversions_ended": ended, "digests": "the same"}
    shutil.rmtree(own)
    return out


def kill(which: str, source: Path, target: Path, after: float) -> bool:
    """Starts a conversion and kills it `after` seconds; says whether it was still at work."""
    args = command("/dev/null", "convert", which, source, target, "--json")
    process = subprocess.Popen(args, env=ENV, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        return process.wait(after) != 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def verified(path: Path) -> dict[str, str]:
    """The digests of the bytes on disk."""
    code = "import json, sys; from glm45_jax import convert; print(json.dumps(convert.verify(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=ENV, cwd=ROOT, check=True, capture_output=True)
    return json.loads(done.stdout)


def depth(folder: Path) -> dict[str, Any]:
    """Peak memory for 4 layers and for 24."""
    peaks: dict[str, dict[int, int]] = {"from_hf": {}, "to_hf": {}}
    for layers in (4, 24):
        source, own, back = folder / "deep", folder / "own", folder / "back"
        made = make_checkpoint(Options(source, mtp="none"), NARROW.replace(num_hidden_layers=layers))
        peaks["from_hf"][layers] = convert("from-hf", source, own)["peak"]
        peaks["to_hf"][layers] = convert("to-hf", own, back)["peak"]
        for path in (source, own, back):
            shutil.rmtree(path)
        peaks.setdefault("bytes", {})[layers] = made["bytes"]
    sizes = peaks.pop("bytes")
    ratios = {which: round(peak[24] / peak[4], 3) for which, peak in peaks.items()}
    return {"checkpoint_bytes": sizes, "peak_vmhwm_bytes": peaks, "24_layers_relative_to_4": ratios}


@contextlib.contextmanager
def working_folder(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="prove_convert_", dir=parent))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder is large: it goes whatever happens
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def write(results: dict[str, Any], file: Path | None) -> None:
    """What is known so far: the whole takes most of an hour."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")


def main(proof: Proof) -> None:
    results = circumstances("jax", "tensorstore", "orbax-checkpoint", "numpy", "xxhash")
    with working_folder(proof.work) as folder:
        air = results["glm_4_5_air_two_layers"] = speed_and_memory(folder, proof.repeats)
        print(json.dumps(air, indent=2), flush=True)
        write(results, proof.json)
        results["killed"] = survival(folder, proof.kills, statistics.median(air["seconds"]["from_hf"]))
        print(json.dumps(results["killed"]), flush=True)
        write(results, proof.json)
        shutil.rmtree(folder / "air")
        results["depth"] = depth(folder)
        print(json.dumps(results["depth"]))
    promises = {
        "peak below 4 GB": max(air["peak_vmhwm_bytes"].values()) < 4e9,
        "at least half the speed of cp + sync": min(air["speed_relative_to_cp_and_sync"].values()) >= 0.5,
        "24 layers within 10 % of 4": max(results["depth"]["24_layers_relative_to_4"].values()) <= 1.1,
        "killed, the same digests": True,  # else `survival` had stopped
    }
    results["promises_kept"] = promises
    print(json.dumps(promises))
    write(results, proof.json)
    sys.exit(0 if all(promises.values()) else 1)


if __name__ == "__main__":
    main(tyro.cli(Proof, description=__doc__))
