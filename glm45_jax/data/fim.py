"""Fill-in-the-middle: a document cut at two places, its middle moved to the end, so that it is learnt from both sides.

Prefix first (PSM): `<|code_prefix|>` prefix `<|code_suffix|>` suffix `<|code_middle|>` middle. Suffix first (SPM):
`<|code_suffix|>` suffix `<|code_prefix|>` prefix `<|code_middle|>` middle. The loss counts all tokens. The cuts lie
between characters, anywhere in the document with equal chance (Bavarian et al. 2022, arXiv:2207.14255, section 3).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from glm45_jax.errors import UserError
from glm45_jax.text import PAD_TOKEN, Tokenizer

PREFIX, MIDDLE, SUFFIX = "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"


def check_tokens(tokenizer: Tokenizer | None, where: str) -> None:
    """Refuses a source that asks for filling in where the tokenizer has no tokens for it."""
    if tokenizer is None:
        raise UserError(f"{where}: fim_rate needs a tokenizer, and this run has none")
    missing = [name for name in (PREFIX, MIDDLE, SUFFIX) if name not in tokenizer.special_ids]
    if missing:
        raise UserError(f"{where}: fim_rate needs the tokens {', '.join(missing)}, which the tokenizer lacks")


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Where one document is cut, as shares of its length, and which part comes first."""

    first: float
    second: float
    suffix_first: bool

    def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Token ids of a text turned round."""
        start, end = sorted(int(share * (len(text) + 1)) for share in (self.first, self.second))
        prefix = [tokenizer.token_id(PREFIX), *tokenizer.encode(text[:start], allow_special=False)]
        middle = [tokenizer.token_id(MIDDLE), *tokenizer.encode(text[start:end], allow_special=False)]
        suffix = [tokenizer.token_id(SUFFIX), *tokenizer.encode(text[end:], allow_special=False)]
        return suffix + prefix + middle if self.suffix_first else prefix + suffix + middle

    def encode_tokens(self, tokens: list[int], tokenizer: Tokenizer) -> list[int]:
        """The same for a document that is tokenised already; as it is where it is not one of plain text."""
        end = tokens[-1:] if tokens[-1:] == [tokenizer.token_id(PAD_TOKEN)] else []
        inside = tokens[: len(tokens) - len(end)]
        text = tokenizer.decode(inside)
        if not text or tokenizer.encode(text, allow_special=False) != inside:
            return tokens
        return self.encode(text, tokenizer) + end


def draw_cuts(rate: float, spm_rate: float, key: tuple[int, ...]) -> Cuts | None:
    """The cuts of the document that `key` (seed, source, epoch, record) names; None where it stays as it is."""
    if not rate:
        return None
    chosen, form, first, second = np.random.default_rng(key).random(4)
    return Cuts(first, second, form < spm_rate) if chosen < rate else None
