"""Text: tokenizers, their training, and conversations rendered as the models read them."""

from glm45_jax.text.bpe import train_tokenizer
from glm45_jax.text.byte_level import DetokenizeStream
from glm45_jax.text.chat import TEMPLATES, builtin_template, render_chat
from glm45_jax.text.parsing import ParsedOutput, StreamParser, ToolCall, parse_output
from glm45_jax.text.special import EOS_TOKENS, PAD_TOKEN, PLAIN_TOKENS, SPECIAL_TOKENS, padded_vocab_size
from glm45_jax.text.tokenizer import Tokenizer

__all__ = [
    "EOS_TOKENS",
    "PAD_TOKEN",
    "PLAIN_TOKENS",
    "SPECIAL_TOKENS",
    "TEMPLATES",
    "DetokenizeStream",
    "ParsedOutput",
    "StreamParser",
    "Tokenizer",
    "ToolCall",
    "builtin_template",
    "padded_vocab_size",
    "parse_output",
    "render_chat",
    "train_tokenizer",
]
