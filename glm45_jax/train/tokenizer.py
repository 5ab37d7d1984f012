"""The tokenizer of a run: loaded, or trained on the run's own text and kept beside its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax.data import DataConfig, open_source
from glm45_jax.data.sources import RecordError
from glm45_jax.text import Tokenizer, train_tokenizer
from glm45_jax.train.config import TrainConfig


def prepare_tokenizer(config: TrainConfig, folder: Path) -> Tokenizer | None:
    """The tokenizer that `config` names; else the one in `folder`/tokenizer, trained first if it is not there yet.

    None where the sources hold tokens alone, and nothing has to be encoded.
    """
    settings, kept = config.tokenizer, folder / "tokenizer"
    if settings.path is not None:
        return Tokenizer.load(settings.path, settings.chat_template)
    if (kept / "tokenizer.json").exists():
        return Tokenizer.load(kept)
    texts = _sample(config.data, settings.sample_bytes, config.seed) if config.data is not None else iter(())
    first = next(texts, None)
    if first is None:
        return None
    tokenizer = train_tokenizer(
        _chain(first, texts),
        config.model.vocab_size,
        split_digits=settings.split_digits,
        chat_template=settings.chat_template or "glm-4.5",
    )
    keep_tokenizer(tokenizer, kept)
    return tokenizer


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Saves to `folder` unless it is there; whole or not at all, for a run may be killed between its files."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    tokenizer.save(partial)
    os.replace(partial, folder)


def _sample(data: DataConfig, limit: int, seed: int) -> Iterator[str]:
    """Text of records at random, up to `limit` bytes of each source; unusable records are left to the pipeline."""
    for number, settings in enumerate(data.sources):
        source, left = open_source(settings), limit
        for index in np.random.default_rng([seed, number]).permutation(len(source)):
            try:
                record = source[int(index)]
            except RecordError:
                continue
            for text in _strings(record.get("text") or [record.get("messages"), record.get("tools")]):
                yield text
                left -= len(text.encode("utf-8", "replace"))
            if left <= 0:
                break


def _strings(value: Any) -> Iterator[str]:
    """Every string in a record's text or messages that can be encoded."""
    if isinstance(value, str):
        yield value.encode("utf-8", "replace").decode()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
