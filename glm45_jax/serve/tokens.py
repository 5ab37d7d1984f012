"""Single tokens shown to clients, and POST /tokenize, POST /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from typing import Any

from glm45_jax.errors import UserError
from glm45_jax.serve.asked import Model, read_messages
from glm45_jax.serve.fields import Fields, read_json
from glm45_jax.text import Tokenizer
from glm45_jax.text.byte_level import token_to_bytes

_MOST = 1 << 20


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of one token; none for an id outside the vocabulary."""
    found = tokenizer.backend.id_to_token(token)
    return b"" if found is None else token_to_bytes(found)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token; half a character is U+FFFD."""
    return token_bytes(tokenizer, token).decode("utf-8", "replace")


def shown(logprob: float) -> float:
    """A log-probability in JSON, which has no -inf."""
    return max(logprob, -9999.0)


def tokenize(model: Model, body: bytes) -> dict[str, Any]:
    """The tokens of a `prompt`, or of `messages` as a chat request renders them. Raises `ApiError`."""
    fields = Fields(read_json(body))
    if fields.get("messages") is not None:
        tokens = read_messages(model, fields)
    else:
        try:
            tokens = model.tokenizer.encode(fields.text("prompt"))
        except UserError as error:
            raise fields.wrong("prompt", str(error)) from error
    found = {"tokens": tokens, "count": len(tokens), "max_model_len": model.engine.room}
    if fields.boolean("return_token_strs"):
        found["token_strs"] = [token_text(model.tokenizer, token) for token in tokens]
    return found


def detokenize(model: Model, body: bytes) -> dict[str, Any]:
    """The text of `tokens`. Raises `ApiError`."""
    fields = Fields(read_json(body))
    tokens = fields.list("tokens")
    if len(tokens) > _MOST or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise fields.wrong("tokens", f"expected a list of at most {_MOST} token ids")
    return {"prompt": model.tokenizer.decode(tokens)}


def tokenizer_info(model: Model) -> dict[str, Any]:
    """What clients that count tokens by the two routes above ask besides; the names are vLLM's."""
    end = model.tokenizer.backend.id_to_token(model.stop_ids[0]) if model.stop_ids else None
    template = model.tokenizer.chat_template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": end, "pad_token": end,
        "chat_template": template if "{" in template else None, "vocab_size": model.tokenizer.vocab_size,
    }  # fmt: skip
