"""Trains small byte-level BPE tokenizers in GLM's layout.

The layout is that of the published tokenizer: no normalisation, GLM's pre-tokenizer, `ignore_merges`, the base
vocabulary from the 256 bytes up, and right behind it GLM's 36 added tokens by the same names in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from glm45_jax.errors import UserError
from glm45_jax.text.special import PLAIN_TOKENS, SPECIAL_TOKENS
from glm45_jax.text.tokenizer import Tokenizer

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    split_digits: bool = False,
    min_frequency: int = 2,
    chat_template: str = "glm-4.5",
    show_progress: bool = False,
) -> Tokenizer:
    """A tokenizer trained on `texts`. The same texts give the same tokenizer.

    Args:
      texts: documents, read once.
      vocab_size: all tokens: 256 bytes, merges, and the 36 added tokens; 292 or more. Texts too small to fill it give
        fewer merges, and so a smaller `vocab_size`.
      split_digits: every digit is a token of its own, which small models need to learn arithmetic; GLM-4.5 itself
        groups up to three.
      min_frequency: how often a pair must occur to be merged.
      chat_template: see `Tokenizer`.

    Raises:
      UserError: `vocab_size` is below 292, or `texts` is not an iterable of strings.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} added tokens need "
            f"{MIN_VOCAB_SIZE}"
        )
    backend = _untrained(split_digits)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(_checked(texts), trainer)
    backend.add_tokens(
        [AddedToken(name, special=name not in PLAIN_TOKENS, normalized=False) for name in SPECIAL_TOKENS]
    )
    return Tokenizer(backend, chat_template)


def _untrained(split_digits: bool) -> Backend:
    backend = Backend(models.BPE(ignore_merges=True))
    split = Regex(_SPLIT % ("" if split_digits else "{1,3}"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _checked(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, (str, bytes)):
        raise UserError("texts: expected an iterable of documents, got a single string; put it in a list")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"texts[{index}]: expected a string, got {type(text).__name__}")
        yield text
