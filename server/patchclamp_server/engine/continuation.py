"""Continuations: the text of a sample as its tokens come, and when it ends.

A token's text is certain only once the characters it belongs to are complete, and once it cannot be the beginning of a
stop text: until then it is held back. Tokens are decoded behind the last few before them, because decoders treat the
first token of a text specially.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from patchclamp_server.engine.messages import Finish, StopRules

Decode = Callable[[Sequence[int]], str]

# Tokens before the new ones that decoding looks back to: characters of more tokens do not exist.
_CONTEXT = 6
_INCOMPLETE = "\ufffd"


@dataclass(eq=False)
class Continuation:
    """What one sample has generated. `room` is how many more tokens the model's context takes."""

    prompt: tuple[int, ...]
    stop: StopRules
    room: int
    decode: Decode
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    _decoded: int = 0
    _held: str = ""

    def append(self, token_id: int) -> str:
        """Takes the next token; gives the text that became certain with it."""
        self.tokens.append(token_id)
        self.finish = self._ended_by(token_id)
        if token_id in self.stop.token_ids:
            return ""
        self._held += self._new_text()
        cut = self._stop_text()
        if cut is not None:
            self.finish, text, self._held = Finish.STOP, self._held[:cut], ""
            return text
        kept = self._possible_stop()
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return text

    def rest(self) -> str:
        """What is still held back when the sample ends."""
        unfinished = "" if self.tokens and self.tokens[-1] in self.stop.token_ids else self._tail()
        text, self._held = self._held + unfinished, ""
        return "" if self.finish is Finish.STOP and not text else text

    def _ended_by(self, token_id: int) -> Finish | None:
        if token_id in self.stop.token_ids:
            return Finish.STOP
        if len(self.tokens) >= self.stop.max_new_tokens:
            return Finish.LENGTH
        return Finish.CONTEXT if len(self.tokens) >= self.room else None

    def _new_text(self) -> str:
        """Text of the tokens that are not decoded yet; nothing while a character is incomplete."""
        text = self._tail()
        if text.endswith(_INCOMPLETE):
            return ""
        self._decoded = len(self.tokens)
        return text

    def _tail(self) -> str:
        before = self.tokens[max(0, self._decoded - _CONTEXT) : self._decoded]
        if len(before) < _CONTEXT:
            before = [*self.prompt[len(before) - _CONTEXT :], *before]
        return self.decode([*before, *self.tokens[self._decoded :]]).removeprefix(self.decode(before))

    def _stop_text(self) -> int | None:
        """Where the first stop text begins in what is held."""
        places = [place for text in self.stop.texts if (place := self._held.find(text)) >= 0]
        return min(places, default=None)

    def _possible_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        return max(
            (n for text in self.stop.texts for n in range(1, len(text)) if self._held.endswith(text[:n])), default=0
        )
