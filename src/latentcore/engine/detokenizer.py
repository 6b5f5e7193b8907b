"""Token ids to text, a token at a time.

The text given out only ever grows: a character whose bytes are spread over several tokens appears
when its last byte does. What a model leaves unfinished comes out at `flush`, as U+FFFD, which is
what decoding everything at once gives.
"""

import codecs
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tokenizers


class Detokenizer(Protocol):
    """Turns one sequence's generated tokens into text."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; often empty."""

    def flush(self) -> str:
        """The text that is still held back; no token may follow."""


class ByteDetokenizer:
    """For vocabularies whose tokens are byte strings: byte-level BPE and tiktoken.

    `token_bytes[i]` is token i's bytes, None for ids without a token. Tokens in `hidden` give no
    text.
    """

    def __init__(self, token_bytes: Sequence[bytes | None], hidden: Set[int]) -> None:
        self._token_bytes = token_bytes
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._hidden or token_id >= len(self._token_bytes):
            return ""
        return self._decoder.decode(self._token_bytes[token_id] or b"")

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StreamDetokenizer:
    """For every other kind of `tokenizer.json`: decodes a sliding window of tokens.

    A token's text may depend on the tokens before it, so each step decodes the last stretch twice,
    without and with the new token, and gives out the difference once it ends in a whole character.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._published = 0
        """Tokens of the window whose text is out."""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        known = self._decode(self._window[: self._published])
        text = self._decode(self._window)
        if len(text) <= len(known) or text.endswith("�"):
            return ""
        del self._window[: self._published]
        self._published = len(self._window)
        return text[len(known) :]

    def flush(self) -> str:
        known = self._decode(self._window[: self._published])
        text = self._decode(self._window)
        self._window.clear()
        self._published = 0
        return text[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)
