"""The model's tokenizer: text, conversations and ids to tokens with their text and character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from threading import Lock

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """Tokens of one prompt.

    `pieces` are the tokens as text, spaces kept. `spans` are half-open character ranges in `text`, empty for tokens
    that have no text in it. `text` is the prompt, the rendered conversation, or the decoded ids.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    text: str


class TooManyTokens(ValueError):
    """A prompt has more tokens than allowed: `count` of them."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tokens")
        self.count = count


class Tokenizer:
    """Wraps a `transformers` tokenizer. May be used from several threads: its own state is not safe for that."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._lock = Lock()
        self._special = frozenset(tokenizer.all_special_ids)
        self._pieces: dict[int, str] = {}
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            # A run takes the whole text and nothing else, whatever the tokenizer's file says.
            self._backend.no_truncation()
            self._backend.no_padding()
        self._anchor = self._plain_token()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text; none where the tokenizer names none."""
        end = self._tokenizer.eos_token_id
        return frozenset() if end is None else frozenset({int(end)})

    def encode(self, text: str, *, special_tokens: bool = True, limit: int | None = None) -> Tokens:
        """Tokens of a text; `special_tokens` adds the model's own (such as a leading BOS).

        Raises TooManyTokens beyond `limit`, before it spends time and memory on them.
        """
        if self._backend is None:
            ids = self._tokenizer.encode(text, add_special_tokens=special_tokens)
            _check_count(len(ids), limit)
            return self.describe(ids)
        # Not through the wrapper, which keeps state between calls and must not be used from two threads at once. As a
        # batch of one, because that lets other threads run in the meantime.
        encoding = self._backend.encode_batch([text], add_special_tokens=special_tokens)[0]
        _check_count(len(encoding), limit)
        ids = encoding.ids
        return Tokens(tuple(ids), tuple(map(self.piece, ids)), tuple(encoding.offsets), text)

    def encode_chat(
        self, messages: Sequence[tuple[str, str]], *, generation_prompt: bool = True, limit: int | None = None
    ) -> Tokens:
        """Tokens of a conversation of (role, content) pairs, through the model's chat template.

        Raises ValueError when there is no template or the template refuses the conversation, and like `encode`.
        """
        if not self.has_chat_template:
            raise ValueError("this model's tokenizer has no chat template")
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, KeyError, TypeError) as fault:
            raise ValueError(f"the chat template refuses this conversation: {fault}") from fault
        return self.encode(str(text), special_tokens=False, limit=limit)

    def describe(self, ids: Sequence[int]) -> Tokens:
        """The same tokens, with the text that they decode to."""
        pieces = tuple(map(self.piece, ids))
        edges = list(accumulate(map(len, pieces), initial=0))
        return Tokens(tuple(ids), pieces, tuple(pairwise(edges)), "".join(pieces))

    def piece(self, token_id: int) -> str:
        """One token as text, its leading space kept: what it adds behind another token."""
        if token_id not in self._pieces:
            behind = self._decode([*self._anchor, token_id])
            self._pieces[token_id] = behind.removeprefix(self._decode(self._anchor))
        return self._pieces[token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens; special ones have none."""
        return self._decode([token for token in ids if token not in self._special])

    def _decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _plain_token(self) -> list[int]:
        """A token that is an ordinary word: decoders treat the first token of a text specially."""
        ids = self._tokenizer.encode("a", add_special_tokens=False)
        return [token for token in ids if token not in self._special][-1:]


def _check_count(count: int, limit: int | None) -> None:
    if limit is not None and count > limit:
        raise TooManyTokens(count)
