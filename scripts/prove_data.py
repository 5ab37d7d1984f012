"""Measures the data pipeline: tokenising, reading on the fly and from tokens, packing, many shards, memory, padding.

    python scripts/prove_data.py --json docs/proofs/data.json

It cuts the standard library into documents of log-normal length, trains a tokenizer on them, tokenises them and reads
batches in several ways. Rates are by processor second of the process and its threads, so that they hold on a busy
machine too; `wall` stands beside. Each reading runs in a process of its own, whose largest memory is noted. Some
minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
from circumstances import circumstances, write_figures
from rich.console import Console

from glm45_jax.data import DataConfig, SourceConfig, build_data
from glm45_jax.data.generated import standard_library
from glm45_jax.data.tokenize import tokenize
from glm45_jax.text import Tokenizer, train_tokenizer

SEQ = 4096
MEDIAN_CHARACTERS = 3000  # of a document; one sigma is a factor of e


@dataclasses.dataclass(frozen=True)
class Proof:
    """Speed, memory and padding of the data pipeline."""

    json: Path | None = None
    """Where to write the figures."""
    seconds: float = 10.0
    """How long each reading goes on."""
    copies: int = 4
    """How often the text is repeated (in another cut) for more documents."""


def write_corpus(folder: Path, copies: int) -> Path:
    text, rng = "".join(standard_library(20_000_000)), random.Random(0)
    with open(folder / "corpus.jsonl", "w") as f:
        for _ in range(copies):
            at = 0
            while at < len(text):
                length = max(20, int(MEDIAN_CHARACTERS * math.exp(rng.gauss(0, 1))))
                f.write(json.dumps({"text": text[at : at + length]}) + "\n")
                at += length
    train_tokenizer([text[:2_000_000]], 16384).save(folder / "tokenizer")
    return folder / "corpus.jsonl"


def read(config: DataConfig, tokenizer: str, batch: int, seconds: float, result: Any) -> None:
    """Batches for some seconds, in a process of its own."""
    loaded = Tokenizer.load(tokenizer)
    begin = time.monotonic()
    data = build_data(config, loaded, batch, SEQ)
    next(data)
    first = time.monotonic() - begin
    cpu, begin, tokens, rows = time.process_time(), time.monotonic(), 0, 0
    while time.monotonic() - begin < seconds:
        tokens += int((next(data)["segment_ids"] > 0).sum())
        rows += batch
    cpu, wall = time.process_time() - cpu, time.monotonic() - begin
    state = len(json.dumps(data.get_state()))
    data.close()
    result.send(
        {
            "tokens_per_cpu_second": round(tokens / cpu),
            "tokens_per_second": round(tokens / wall),
            "padding": round(1 - tokens / (rows * SEQ), 4),
            "first_batch_s": round(first, 2),
            "state_kB": round(state / 1e3, 1),
            "largest_memory_MB": largest_memory(),
        }
    )


def largest_memory() -> int:
    """Of this process, in MB; unlike `ru_maxrss` without what its parent held before it began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1e3)


def measure(config: DataConfig, tokenizer: Path, batch: int, seconds: float) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=read, args=(config, str(tokenizer), batch, seconds, there))
    process.start()
    there.close()
    figures = here.recv()
    process.join()
    return figures


def cases(corpus: Path, tokens: Path) -> dict[str, tuple[DataConfig, int]]:
    """Name of a reading -> its configuration and batch size."""

    def config(*sources: SourceConfig, **kwargs: Any) -> DataConfig:
        return DataConfig(sources=sources, **kwargs)

    text, made = (str(corpus),), (str(tokens),)
    eight = [SourceConfig(path=made, weight=1 + i, packing=("concat", "best_fit")[i % 2]) for i in range(8)]
    return {
        "text, concat, 8 shards": (config(SourceConfig(path=text)), 8),
        "text, concat, all filled in the middle": (config(SourceConfig(path=text, fim_rate=1.0)), 8),
        "tokens, concat, 8 shards": (config(SourceConfig(path=made)), 8),
        "tokens, concat, 64 shards": (config(SourceConfig(path=made)), 64),
        "tokens, best_fit, 1 shard": (config(SourceConfig(path=made, packing="best_fit"), shards=1), 8),
        "tokens, best_fit, 8 shards": (config(SourceConfig(path=made, packing="best_fit")), 8),
        "tokens, best_fit, 64 shards": (config(SourceConfig(path=made, packing="best_fit")), 64),
        "tokens, mixture of 8 sources, 64 shards": (config(*eight), 64),
    }


def main() -> None:
    args, console = tyro.cli(Proof), Console(stderr=True)
    figures: dict[str, Any] = {"circumstances": circumstances("grain", "array-record", "tokenizers", "numpy")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder, args.copies)
        cpu = time.process_time()
        report = tokenize(SourceConfig(path=(str(corpus),)), folder / "tokenizer", folder / "tokens", workers=1)
        cpu = time.process_time() - cpu
        figures["tokenize, 1 worker"] = {
            "records": report.records,
            "tokens": report.tokens,
            "input_MB": round(corpus.stat().st_size / 1e6, 1),
            "output_MB": round(report.bytes / 1e6, 1),
            "tokens_per_cpu_second": round(report.tokens / cpu),
            "tokens_per_second": round(report.tokens_per_second),
            "input_MB_per_cpu_second": round(corpus.stat().st_size / 1e6 / cpu, 2),
        }
        console.print("tokenize", figures["tokenize, 1 worker"])
        for case, (config, batch) in cases(corpus, folder / "tokens").items():
            figures[case] = measure(config, folder / "tokenizer", batch, args.seconds)
            console.print(case, figures[case])
    write_figures(args.json, figures)


if __name__ == "__main__":
    main()
