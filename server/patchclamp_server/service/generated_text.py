"""Where generated tokens stand in the text that they make up.

A token that ends inside a character has no text yet; the one that completes the character has all of it.
"""

from __future__ import annotations

from patchclamp_server.adapters.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class GeneratedText:
    """The places of one sample's tokens, as they come. Stop texts are not cut off."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._length = 0
        self._pending: list[int] = []
        # Decoding one token takes as long as all the rest of its message.
        self._known: dict[int, str] = {}

    def append(self, token_id: int) -> tuple[str, int, int]:
        """The next token as text, and where that starts and ends, in code points."""
        if self._tokenizer is None:
            return "", 0, 0
        piece, start = self._tokenizer.piece(token_id), self._length
        if self._pending or _INCOMPLETE in piece:
            self._length += len(self._completed(token_id, self._tokenizer))
        else:
            if token_id not in self._known:
                # Special tokens have a name, but no text.
                special = piece.strip() and not self._tokenizer.decode((token_id,))
                self._known[token_id] = "" if special else piece
            self._length += len(self._known[token_id])
        return piece, start, self._length

    def _completed(self, token_id: int, tokenizer: Tokenizer) -> str:
        """The text that is complete with a token, behind others that were not."""
        self._pending.append(token_id)
        text = tokenizer.decode(self._pending)
        if text.endswith(_INCOMPLETE):
            return ""
        self._pending.clear()
        return text
