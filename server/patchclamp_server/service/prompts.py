"""Prompts of a request, as tokens that fit the model."""

from __future__ import annotations

from collections.abc import Sequence

from patchclamp.v1 import prompt_pb2
from patchclamp_server.adapters.tokenizer import Tokenizer, Tokens, TooManyTokens
from patchclamp_server.engine.messages import Loaded
from patchclamp_server.errors import FailedPrecondition, TooLarge
from patchclamp_server.service.violations import Violations


class PromptParser:
    """Turns the prompts of one request into tokens; notes what is wrong with them.

    A text too long to be tokenized at all raises TooLarge: tokenizing it only to name all that is wrong with the
    request is what the limit is there to prevent.
    """

    def __init__(self, loaded: Loaded, max_characters: int, found: Violations) -> None:
        self._tokenizer = loaded.tokenizer
        self._dims = loaded.facts.dims
        self._max_characters = max_characters
        self._found = found

    def parse(self, wire: prompt_pb2.Prompt, path: str) -> Tokens | None:
        """The tokens of a prompt, one at least and at most the model's context; None when invalid."""
        match wire.WhichOneof("content"):
            case "text":
                where = f"{path}.text"
                tokens = self._from_text(wire, where)
            case "token_ids":
                return self._from_ids(wire.token_ids.ids, f"{path}.token_ids.ids")
            case "chat":
                where = f"{path}.chat"
                tokens = self._from_chat(wire.chat, where)
            case _:
                self._found.add(path, "a prompt is needed: text, token_ids or chat")
                return None
        return tokens if tokens is not None and self._fits(tokens.ids, where) else None

    def _from_text(self, wire: prompt_pb2.Prompt, path: str) -> Tokens | None:
        tokenizer = self._needed_tokenizer()
        if not wire.text:
            # Also where a BOS would make it one token: nobody means to ask about that alone by leaving the text out.
            self._found.add(path, "empty; give text, or token ids")
            return None
        self._check_characters(len(wire.text))
        try:
            return tokenizer.encode(wire.text, special_tokens=not wire.omit_special_tokens, limit=self._limit)
        except TooManyTokens as excess:
            self._refuse_length(excess.count, path)
            return None

    def _from_ids(self, ids: Sequence[int], path: str) -> Tokens | None:
        if not self._fits(ids, path):
            return None
        if self._tokenizer is None:
            return Tokens(tuple(ids), ("",) * len(ids), ((0, 0),) * len(ids), "")
        return self._tokenizer.describe(ids)

    def _from_chat(self, wire: prompt_pb2.Chat, path: str) -> Tokens | None:
        tokenizer = self._needed_tokenizer()
        if not tokenizer.has_chat_template:
            raise FailedPrecondition("this model's tokenizer has no chat template: send text or token ids")
        if not wire.messages:
            self._found.add(f"{path}.messages", "at least one message is needed")
            return None
        messages = [(message.role, message.content) for message in wire.messages]
        self._check_characters(sum(len(role) + len(content) for role, content in messages))
        try:
            return tokenizer.encode_chat(messages, generation_prompt=not wire.omit_generation_prompt, limit=self._limit)
        except TooManyTokens as excess:
            self._refuse_length(excess.count, path)
        except ValueError as fault:
            self._found.add(f"{path}.messages", str(fault))
        return None

    def _needed_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise FailedPrecondition("this model came without a tokenizer: send token ids")
        return self._tokenizer

    @property
    def _limit(self) -> int | None:
        """Tokens that the model's context holds; None: it has no end."""
        return self._dims.n_ctx or None

    def _check_characters(self, count: int) -> None:
        if count > self._max_characters:
            raise TooLarge("characters of one prompt", limit=self._max_characters, demand=count)

    def _fits(self, ids: Sequence[int], path: str) -> bool:
        """Whether the model can read these ids."""
        if not ids:
            self._found.add(path, "a prompt has at least one token, this one has none")
        elif self._limit is not None and len(ids) > self._limit:
            self._refuse_length(len(ids), path)
        elif max(ids) >= self._dims.d_vocab:
            self._name_strangers(ids, path)
        else:
            return True
        return False

    def _refuse_length(self, count: int, path: str) -> None:
        text = f"the prompt has {count} tokens, this model's context holds {self._limit}"
        self._found.add(path, text, reason="PROMPT_TOO_LONG", limit=str(self._limit), demand=str(count))

    def _name_strangers(self, ids: Sequence[int], path: str) -> None:
        d_vocab = self._dims.d_vocab
        for index, token_id in enumerate(ids):
            if token_id >= d_vocab:
                self._found.add(f"{path}[{index}]", f"token {token_id} is not in the vocabulary: 0 .. {d_vocab - 1}")
