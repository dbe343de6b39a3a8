"""Prompts of a request, as tokens that fit the model."""

from __future__ import annotations

from collections.abc import Sequence

from patchclamp.v1 import prompt_pb2
from patchclamp_server.adapters.tokenizer import Tokenizer, Tokens
from patchclamp_server.engine.messages import Loaded
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.service.violations import Violations


def parse_prompt(wire: prompt_pb2.Prompt, path: str, loaded: Loaded, found: Violations) -> Tokens | None:
    """The tokens of a prompt, one at least and at most the model's context; None when invalid."""
    match wire.WhichOneof("content"):
        case "text":
            where = f"{path}.text"
            tokens = _tokenizer(loaded).encode(wire.text, special_tokens=not wire.omit_special_tokens)
        case "token_ids":
            return _from_ids(wire.token_ids.ids, f"{path}.token_ids.ids", loaded, found)
        case "chat":
            where, conversation = f"{path}.chat", _conversation(wire.chat, f"{path}.chat", loaded, found)
            if conversation is None:
                return None
            tokens = conversation
        case _:
            found.add(path, "a prompt is needed: text, token_ids or chat")
            return None
    return tokens if _fits(tokens.ids, where, loaded, found) else None


def _tokenizer(loaded: Loaded) -> Tokenizer:
    if loaded.tokenizer is None:
        raise FailedPrecondition("this model came without a tokenizer: send token ids")
    return loaded.tokenizer


def _from_ids(ids: Sequence[int], path: str, loaded: Loaded, found: Violations) -> Tokens | None:
    if not _fits(ids, path, loaded, found):
        return None
    if loaded.tokenizer is None:
        return Tokens(tuple(ids), ("",) * len(ids), ((0, 0),) * len(ids), "")
    return loaded.tokenizer.describe(ids)


def _conversation(wire: prompt_pb2.Chat, path: str, loaded: Loaded, found: Violations) -> Tokens | None:
    tokenizer = _tokenizer(loaded)
    if not tokenizer.has_chat_template:
        raise FailedPrecondition("this model's tokenizer has no chat template: send text or token ids")
    if not wire.messages:
        found.add(f"{path}.messages", "at least one message is needed")
        return None
    messages = [(message.role, message.content) for message in wire.messages]
    try:
        return tokenizer.encode_chat(messages, generation_prompt=not wire.omit_generation_prompt)
    except ValueError as fault:
        found.add(f"{path}.messages", str(fault))
        return None


def _fits(ids: Sequence[int], path: str, loaded: Loaded, found: Violations) -> bool:
    """Whether the model can read these ids."""
    dims = loaded.facts.dims
    if not ids:
        found.add(path, "a prompt has at least one token, this one has none")
    elif dims.n_ctx and len(ids) > dims.n_ctx:
        text = f"the prompt has {len(ids)} tokens, this model's context holds {dims.n_ctx}"
        found.add(path, text, reason="PROMPT_TOO_LONG", limit=str(dims.n_ctx), demand=str(len(ids)))
    elif max(ids) >= dims.d_vocab:
        _name_strangers(ids, path, dims.d_vocab, found)
    else:
        return True
    return False


def _name_strangers(ids: Sequence[int], path: str, d_vocab: int, found: Violations) -> None:
    for index, token_id in enumerate(ids):
        if token_id >= d_vocab:
            found.add(f"{path}[{index}]", f"token {token_id} is not in the vocabulary: 0 .. {d_vocab - 1}")
