"""`Tokenizer`: text and conversations to token ids and back, from and to the files of a Hugging Face checkpoint."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from glm45_jax.errors import UserError
from glm45_jax.text.byte_level import DetokenizeStream, token_to_bytes
from glm45_jax.text.chat import builtin_template, is_template_text, known_template, render_chat, template_name
from glm45_jax.text.messages import check_is_list
from glm45_jax.text.special import EOS_TOKENS, PAD_TOKEN, padded_vocab_size

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

# What transformers reads beside tokenizer.json; the values of the published GLM-4.5 file.
_DEFAULT_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "eos_token": PAD_TOKEN,
    "pad_token": PAD_TOKEN,
    "padding_side": "left",
    "model_max_length": 131072,
    "model_input_names": ["input_ids", "attention_mask"],
}
# Named tokens that transformers hands to chat templates.
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A byte-level BPE tokenizer in GLM's layout. Immutable, picklable and safe to share between threads.

    Nothing is added automatically: `[gMASK]<sop>` comes from the chat template.

    Attributes:
      chat_template: what `render_chat` takes as `template`: `glm-4.5`, `glm-4.7`, or the jinja text of the
        checkpoint's own template where it is another.
      config: the content of `tokenizer_config.json`, without the template.
      backend: the `tokenizers.Tokenizer` underneath.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str = "glm-4.5",
        config: Mapping[str, Any] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        is_text = is_template_text(chat_template)
        self.chat_template = known_template(chat_template) if is_text else template_name(chat_template)
        self.config = dict(_DEFAULT_CONFIG if config is None else config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], chat_template: str | None = None) -> Tokenizer:
        """Reads a checkpoint's directory, or a `tokenizer.json` with what lies beside it.

        Args:
          chat_template: a name or jinja text in place of the checkpoint's own; `glm-4.5` where it has none.

        Raises:
          UserError: the file is missing or is not a tokenizer.
        """
        path = Path(path)
        file = path if path.is_file() else path / TOKENIZER_FILE
        if not file.is_file():
            raise UserError(f"{path}: no {TOKENIZER_FILE} here; expected a checkpoint's directory or that file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{file}: not a tokenizer that the tokenizers library reads: {error}") from error
        config = _read_config(file.parent / CONFIG_FILE)
        own = config.pop("chat_template", None) if config else None
        if chat_template is None:
            chat_template = _own_template(file.parent, own) or "glm-4.5"
        return cls(backend, chat_template, config)

    @property
    def vocab_size(self) -> int:
        """Tokens that exist, added ones included: 151365 for GLM-4.5. The model's own is this padded."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def padded_vocab_size(self, multiple: int = 128) -> int:
        """`vocab_size` rounded up, for the rows of a new model's embedding."""
        return padded_vocab_size(self.vocab_size, multiple)

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """Added tokens by name, `special: false` ones too: `tokenizer.special_ids["<think>"]`."""
        return {token.content: id_ for id_, token in sorted(self.backend.get_added_tokens_decoder().items())}

    def token_id(self, name: str) -> int:
        """The id of a token. Raises `UserError` where the vocabulary does not have it."""
        found = self.backend.token_to_id(name)
        if found is None:
            raise UserError(f"the tokenizer has no token {name!r}")
        return found

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: `<|endoftext|>`, `<|user|>`, `<|observation|>`, else the configured end token."""
        ids = (self.backend.token_to_id(name) for name in EOS_TOKENS)
        found = tuple(id_ for id_ in ids if id_ is not None)
        end = _token_text(self.config.get("eos_token"))
        return found or ((self.token_id(end),) if end else ())

    @property
    def pad_id(self) -> int:
        """The id that fills up batches."""
        return self.token_id(_token_text(self.config.get("pad_token")) or PAD_TOKEN)

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token ids of `text`.

        With `allow_special=False` the names of control tokens (`<|user|>`, `<think>`, ...) are text like any other.
        Raises `UserError` for text that is not valid Unicode (a lone surrogate).
        """
        backend = self.backend if allow_special else self._plain_backend
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise UserError(_why_unencodable([text])) from error

    def encode_batch(self, texts: Sequence[str], allow_special: bool = True) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        backend = self.backend if allow_special else self._plain_backend
        try:
            return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:
            raise UserError(_why_unencodable(texts)) from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids. Ids outside the vocabulary (padded rows) have no text; broken UTF-8 becomes U+FFFD.

        `skip_special_tokens` leaves out those marked special; `<think>`, `<tool_call>` and the like stay.
        """
        return self.backend.decode([int(id_) for id_ in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = False) -> DetokenizeStream:
        """An incremental `decode`: a `DetokenizeStream` to push ids into as they are generated."""
        if type(self.backend.decoder) is not tokenizers.decoders.ByteLevel:
            raise UserError("streaming needs a byte-level tokenizer, which every GLM tokenizer is; use decode")
        skipped = self._hidden_ids if skip_special_tokens else frozenset()

        def bytes_of(id_: int) -> bytes:
            token = None if id_ in skipped else self.backend.id_to_token(id_)
            return token_to_bytes(token) if token is not None else b""

        return DetokenizeStream(bytes_of)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = True,
        **kwargs: Any,
    ) -> str:
        """`glm45_jax.text.render_chat` with this tokenizer's template."""
        if is_template_text(self.chat_template):  # other libraries' templates may ask for bos_token and the like
            names = {name: _token_text(self.config.get(name)) for name in _TEMPLATE_TOKENS}
            kwargs = {name: text for name, text in names.items() if text} | kwargs
        return render_chat(messages, tools, self.chat_template, add_generation_prompt, enable_thinking, **kwargs)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = True,
        sanitize: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation.

        With `sanitize=True` the names of control tokens inside tools and system, user and tool messages are plain
        text: a user who types `<|assistant|>` does not start a turn. The assistant's own messages keep their meaning.
        """
        if not sanitize or not self.special_ids:
            text = self.render_chat(messages, tools, add_generation_prompt, enable_thinking, **kwargs)
            return self.encode(text)
        check_is_list(messages, "messages")
        mark = _unused_character([messages, tools])
        messages = [m if m.get("role") == "assistant" else self._marked(m, mark) for m in messages]
        tools = self._marked(tools, mark)
        text = self.render_chat(messages, tools, add_generation_prompt, enable_thinking, **kwargs)
        ids: list[int] = []
        for piece in self._special_pattern.split(text):
            special = self.special_ids.get(piece)
            ids += [special] if special is not None else self.encode(piece.replace(mark, ""), allow_special=False)
        return ids

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, which transformers loads.

        Each file is written beside and renamed.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        own = self.chat_template
        _write(folder / TOKENIZER_FILE, self.backend.to_str(pretty=True))
        _write(folder / CONFIG_FILE, json.dumps(self.config, ensure_ascii=False, indent=2) + "\n")
        _write(folder / TEMPLATE_FILE, own if is_template_text(own) else builtin_template(own))

    @functools.cached_property
    def _hidden_ids(self) -> frozenset[int]:
        return frozenset(id_ for id_, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        # tokenizers' own switch leaves `special: false` tokens in force, and flips them for every thread
        layout = json.loads(self.backend.to_str())
        layout["added_tokens"] = []
        return tokenizers.Tokenizer.from_str(json.dumps(layout))

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @functools.cached_property
    def _special_start(self) -> re.Pattern[str]:
        return re.compile("[" + re.escape("".join(sorted({name[0] for name in self.special_ids}))) + "]")

    def _marked(self, value: Any, mark: str) -> Any:
        """`value` with `mark` after every character that could begin a control token: no token can then come of it,
        not even from parts that a template joins."""
        if isinstance(value, str):
            return self._special_start.sub(lambda found: found[0] + mark, value)
        if isinstance(value, Mapping):
            return {self._marked(key, mark): self._marked(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._marked(item, mark) for item in value]
        return value


def _read_config(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected an object, got {type(config).__name__}")
    return config


def _own_template(folder: Path, in_config: Any) -> str | None:
    """The template a checkpoint brings: its file, else the entry of tokenizer_config.json (a text or named texts)."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text("utf-8")
    if isinstance(in_config, list):
        in_config = {e.get("name"): e.get("template") for e in in_config if isinstance(e, Mapping)}.get("default")
    if in_config is not None and not isinstance(in_config, str):
        raise UserError(f"{folder / CONFIG_FILE}: chat_template is neither a text nor a list with a default one")
    return in_config


def _token_text(token: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with its text as `content`."""
    return token.get("content") if isinstance(token, Mapping) else token


def _unused_character(values: Any) -> str:
    """A noncharacter (U+FDD0 to U+FDEF: never in interchanged text) that no string in `values` holds."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    return next((char for char in map(chr, range(0xFDD0, 0xFDF0)) if char not in text), "\ufdd0")


def _why_unencodable(texts: Sequence[Any]) -> str:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return f"cannot encode text {index}: expected a string, got {type(text).__name__}"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"cannot encode text {index}: not valid Unicode at character {error.start} ({text[error.start]!r})"
    return "cannot encode: expected a list of strings"


def _write(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        new.write_text(text, "utf-8")
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
