"""Names of GLM's added tokens, in the order in which they follow the base vocabulary, and what they are for.

Source: the published tokenizer of GLM-4.5 (ids 151329 to 151364). The ten marked plain are `special: false` there:
decoding with `skip_special_tokens` keeps them, because a reader of the text needs them to find thinking and calls.
"""

from __future__ import annotations

from glm45_jax.errors import UserError

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|begin_of_transcription|>",
    "<|end_of_transcription|>",
    "<|code_prefix|>",
    "<|code_middle|>",
    "<|code_suffix|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "/nothink",
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "<|image|>",
    "<|video|>",
)

# `special: false`: kept by decoding with skip_special_tokens
PLAIN_TOKENS = frozenset(SPECIAL_TOKENS[SPECIAL_TOKENS.index("<think>") : SPECIAL_TOKENS.index("/nothink")])

# A turn ends where the next one's role token begins; `<|endoftext|>` ends a document and pads.
EOS_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
PAD_TOKEN = "<|endoftext|>"

# Id of "<|endoftext|>" in the published tokenizer: its base vocabulary has this many tokens.
PUBLISHED_BASE_SIZE = 151329


def padded_vocab_size(size: int, multiple: int = 128) -> int:
    """The smallest multiple of `multiple` that holds `size` tokens: rows of an embedding that shards and tiles well."""
    if size < 1 or multiple < 1:
        raise UserError(f"padded_vocab_size: size and multiple must be at least 1, got {size} and {multiple}")
    return -(-size // multiple) * multiple
