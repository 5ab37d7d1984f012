"""One record to token ids, and to the mask that says which of them the loss counts as targets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from glm45_jax.data.fim import Cuts
from glm45_jax.data.sources import Record, RecordError
from glm45_jax.errors import UserError
from glm45_jax.text import PAD_TOKEN, Tokenizer
from glm45_jax.text.messages import check_is_list

Encoded = tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]

_FIELDS = ("text", "messages", "tokens")
# A role token after the assistant's turn ends it; the model itself writes these two.
_CLOSING = ("<|user|>", "<|observation|>")
_ROLES = ("<|system|>", "<|assistant|>", *_CLOSING)


def encode_record(
    record: Record,
    tokenizer: Tokenizer | None,
    *,
    append_eos: bool = True,
    loss_on: str = "assistant",
    vocab_size: int | None = None,
    cuts: Cuts | None = None,
) -> Encoded:
    """Tokens of a record and, for each, whether it is a target.

    Args:
      record: has one of `text` (a document; `complete: false` says that its end is cut off), `messages` (a conversation
        as `Tokenizer.encode_chat` takes it, with optional `tools` and `enable_thinking`), or `tokens` (ids, with an
        optional `loss_mask`).
      append_eos: `<|endoftext|>` after a document of text.
      loss_on: of conversations, "assistant" or "all".
      vocab_size: ids from here on are refused; the tokenizer's by default.
      cuts: turn a document (not a conversation) round here, to be filled in the middle.

    Raises:
      RecordError: the record has none or several of these fields, or one of another form.
    """
    fields = [field for field in _FIELDS if record.get(field) is not None]
    if len(fields) != 1:
        found = ", ".join(map(repr, fields or record)) or "nothing"
        raise RecordError(f"expected one of the fields {', '.join(map(repr, _FIELDS))}, found {found}")
    if fields == ["tokens"]:
        given = _given_tokens(record, vocab_size or (tokenizer.vocab_size if tokenizer else None))
        if cuts is None or tokenizer is None or not given[1].all():
            return given
        return _all_targets(cuts.encode_tokens(given[0].tolist(), tokenizer))
    if tokenizer is None:
        raise RecordError(f"{fields[0]!r} needs a tokenizer, and this run has none")
    try:
        if fields == ["messages"]:
            return _chat(record, tokenizer, loss_on)
        return _document(record, tokenizer, append_eos, cuts)
    except UserError as error:
        raise RecordError(str(error)) from error


def _given_tokens(record: Record, vocab_size: int | None) -> Encoded:
    try:
        tokens = np.asarray(record["tokens"])
        mask = np.ones(tokens.shape, bool) if record.get("loss_mask") is None else np.asarray(record["loss_mask"])
    except ValueError as error:
        raise RecordError(f"'tokens' and 'loss_mask' must be lists of numbers: {error}") from None
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise RecordError("'tokens' must be a list of whole numbers")
    if mask.shape != tokens.shape or mask.dtype.kind not in "biu":
        raise RecordError(f"'loss_mask' must be a list of {tokens.size} zeros and ones, one for each token")
    if tokens.size and (tokens.min() < 0 or (vocab_size is not None and tokens.max() >= vocab_size)):
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise RecordError(f"'tokens' holds {worst}, the vocabulary ends at {vocab_size}")
    return tokens.astype(np.int32), mask.astype(bool)


def _document(record: Record, tokenizer: Tokenizer, append_eos: bool, cuts: Cuts | None) -> Encoded:
    text = record["text"]
    if not isinstance(text, str):
        raise RecordError(f"'text' must be a string, found {type(text).__name__}")
    # A corpus that mentions <|user|> does not start a turn.
    tokens = tokenizer.encode(text, allow_special=False) if cuts is None or not text else cuts.encode(text, tokenizer)
    if append_eos and tokens and record.get("complete", True):
        tokens = [*tokens, tokenizer.token_id(PAD_TOKEN)]
    return _all_targets(tokens)


def _all_targets(tokens: Sequence[int]) -> Encoded:
    return np.asarray(tokens, np.int32), np.ones(len(tokens), bool)


def _chat(record: Record, tokenizer: Tokenizer, loss_on: str) -> Encoded:
    messages = record["messages"]
    check_is_list(messages, "messages")
    thinking = record.get("enable_thinking", True)
    ids = tokenizer.encode_chat(
        messages, record.get("tools"), add_generation_prompt=False, enable_thinking=thinking, sanitize=True
    )
    if messages and messages[-1].get("role") == "assistant":
        # The template leaves the last turn open: its end is the role token that the model writes next.
        ids = [*ids, tokenizer.token_id(_CLOSING[1 if messages[-1].get("tool_calls") else 0])]
    tokens = np.asarray(ids, np.int32)
    if loss_on == "all":
        return tokens, np.ones(len(tokens), bool)
    mask = assistant_mask(tokens, tokenizer)
    turns, said = int(np.sum(tokens == tokenizer.token_id("<|assistant|>"))), _count_assistant(messages)
    if turns != said:
        raise RecordError(f"{said} assistant messages make {turns} turns: one of them writes a role token itself")
    if not mask.any():
        raise RecordError("no message of the assistant, so nothing to learn; loss_on: all trains on every token")
    return tokens, mask


def assistant_mask(tokens: Int[np.ndarray, " n"], tokenizer: Tokenizer) -> Bool[np.ndarray, " n"]:
    """Which tokens the assistant writes: its turns after `<|assistant|>`, with the role token that closes each.

    What the prompt for an answer already holds is left out: the empty thinking block of a turn that shows none, which
    history turns have even where the model did think, and in GLM-4.7's format the opening `<think>`. Trained on it,
    a model would learn not to think.
    """
    special = {name: tokenizer.token_id(name) for name in (*_ROLES, "<think>", "</think>")}
    roles, closing = [special[name] for name in _ROLES], [special[name] for name in _CLOSING]
    borders = [*np.flatnonzero(np.isin(tokens, roles)), len(tokens)]
    mask = np.zeros(len(tokens), bool)
    for start, end in itertools.pairwise(borders):
        if tokens[start] != special["<|assistant|>"]:
            continue
        given = _given_by_prompt(tokens[start + 1 : end], special["<think>"], special["</think>"])
        mask[start + 1 + given : end] = True
        if end < len(tokens) and tokens[end] in closing:
            mask[end] = True
    return mask


def _given_by_prompt(turn: Int[np.ndarray, " n"], think: int, end_think: int) -> int:
    """How many of a turn's first tokens belong to the prompt: `</think>`, `<think>` or `\\n<think></think>`."""
    first = int(np.argmax(turn == think)) if think in turn[:2] else 0  # GLM-4.5's has a newline before
    if turn[:1] == end_think:
        return 1
    if turn[first : first + 1] == think:
        if turn[first + 1 : first + 2] == end_think:
            return first + 2
        return 1 if first == 0 else 0
    return 0


def _count_assistant(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(message.get("role") == "assistant" for message in messages)
