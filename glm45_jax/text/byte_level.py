"""Byte-level tokens: the printable characters that stand for bytes, and text out of a stream of tokens.

Source of the alphabet: the byte-level BPE of GPT-2, which GLM's tokenizer uses: printable Latin-1 characters stand for
themselves, the other 68 bytes for the characters from U+0100 on.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_HIDDEN)}


def token_to_bytes(token: str) -> bytes:
    """The bytes of one token; one with characters outside the alphabet (an added token) is its own UTF-8."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


class DetokenizeStream:
    """Turns token ids into text as they come: `push` each id, `finish` at the end.

    The pieces joined are what `Tokenizer.decode` gives for all ids at once; no piece holds half of a UTF-8 character.
    Each id costs the same however long the text is.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]):
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: empty while a character waits for its last bytes."""
        return self._decoder.decode(self._bytes_of(int(token_id)))

    def finish(self) -> str:
        """What was left waiting: empty, or U+FFFD where the text ends inside a character. The stream is then as new."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text

    def pieces(self, token_ids: Iterable[int]) -> Iterator[str]:
        """The non-empty pieces of a whole stream of ids."""
        for token_id in token_ids:
            if piece := self.push(token_id):
                yield piece
        if piece := self.finish():
            yield piece
