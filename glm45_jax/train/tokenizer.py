"""The tokenizer of a run: loaded, or trained on the run's own text and kept beside its checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from glm45_jax.data import DataConfig, open_source
from glm45_jax.data.sources import Record, RecordError
from glm45_jax.errors import UserError
from glm45_jax.text import SPECIAL_TOKENS, Tokenizer, render_chat, train_tokenizer
from glm45_jax.text.chat import is_template_text
from glm45_jax.train.config import TrainConfig

_CONTROL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


def prepare_tokenizer(config: TrainConfig, folder: Path) -> Tokenizer | None:
    """The tokenizer that `config` names; else the one in `folder`/tokenizer, trained first if it is not there yet.

    None where the sources hold tokens alone, and nothing has to be encoded.
    """
    settings, kept = config.tokenizer, folder / "tokenizer"
    if settings.path is not None:
        return Tokenizer.load(settings.path, settings.chat_template)
    if (kept / "tokenizer.json").exists():
        return Tokenizer.load(kept)
    template = settings.chat_template or "glm-4.5"
    # a template of someone else's runs in a process of its own, too slow for every record
    sampled = "glm-4.5" if is_template_text(template) else template
    texts = _sample(config.data, settings.sample_bytes, config.seed, sampled) if config.data is not None else iter(())
    first = next(texts, None)
    if first is None:
        return None
    tokenizer = train_tokenizer(
        _chain(first, texts),
        config.model.vocab_size,
        split_digits=settings.split_digits,
        chat_template=template,
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


def _sample(data: DataConfig, limit: int, seed: int, template: str) -> Iterator[str]:
    """Text of records at random, up to `limit` bytes of each source; unusable records are left to the pipeline."""
    for number, settings in enumerate(data.sources):
        source, left = open_source(settings), limit
        for index in np.random.default_rng([seed, number]).permutation(len(source)):
            try:
                texts = _texts(source[int(index)], template)
            except (RecordError, UserError):
                continue
            for text in texts:
                yield text
                left -= len(text.encode())
            if left <= 0:
                break


def _texts(record: Record, template: str) -> list[str]:
    """A record's text; a conversation's as the template renders it, between the control tokens."""
    if record.get("messages") is None:
        texts = [record.get("text")]
    else:
        texts = _CONTROL.split(render_chat(record["messages"], record.get("tools"), template))
    return [text.encode("utf-8", "replace").decode() for text in texts if isinstance(text, str)]


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
