"""From what a caller writes to the messages that travel. Does no I/O; both clients use it.

Most of a request is known at once. Text that stands for positions (`pc.at`) or for single tokens (`pc.unembed`,
`logprobs=`) must be looked up by the server's tokenizer first, so a `Draft` says what to look up and makes the request
from the answers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias, TypeGuard, cast

from patchclamp import _positions, _reads
from patchclamp._positions import At, Positions, is_whole_number
from patchclamp._reads import Read
from patchclamp._results import quoted
from patchclamp._tensors import damaged
from patchclamp.errors import FieldViolation, InvalidArgument, invalid_field
from patchclamp.v1 import model_pb2, prompt_pb2, run_pb2

ChatMessage: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = "str | Sequence[SupportsIndex] | Sequence[ChatMessage]"
Prompts: TypeAlias = "list[str] | list[list[int]] | list[list[dict[str, str]]] | list[Prompt] | tuple[str, ...]"
Reads: TypeAlias = "str | Read | Sequence[str | Read]"
Logits: TypeAlias = "Literal['last', 'all', 'none'] | Positions | None"
TokensLike: TypeAlias = "Sequence[SupportsIndex | str] | SupportsIndex | str"
Numerics: TypeAlias = Literal["default", "deterministic", "solo"]

# How many prompts one Tokenize call may bring is the server's to say; so few are always welcome.
LOOKUPS_PER_CALL = 16
# How many of the most probable next tokens a run tells unless asked otherwise.
TOP_K = 5

_NUMERICS: dict[str, run_pb2.Numerics] = {
    "default": run_pb2.NUMERICS_DEFAULT,
    "deterministic": run_pb2.NUMERICS_DETERMINISTIC,
    "solo": run_pb2.NUMERICS_SOLO,
}


@dataclass(frozen=True, eq=False)
class RunSpec:
    """One run of a batch: what `Client.run` takes, as a value for `Client.run_many`."""

    prompt: Prompt
    _: KW_ONLY
    read: Reads | None = None
    logits: Logits = "last"
    top_k: int | None = None
    logprobs: TokensLike | None = None
    loss: bool = False


def is_many(prompt: Prompt | Prompts) -> TypeGuard[Prompts]:
    """Whether this is a list of prompts rather than one: text, token ids and a conversation are one."""
    if isinstance(prompt, str) or not isinstance(prompt, list | tuple) or not prompt:
        return False
    return isinstance(prompt[0], str) or not (isinstance(prompt[0], Mapping) or is_whole_number(prompt[0]))


def listed(prompt: Prompt | Prompts) -> list[Prompt]:
    """The prompts of a list; one prompt alone."""
    return list(prompt) if is_many(prompt) else [cast("Prompt", prompt)]


def specs_of(
    prompts: Sequence[Prompt],
    *,
    read: Reads | None,
    logits: Logits,
    top_k: int | None,
    logprobs: TokensLike | None,
    loss: bool,
) -> list[RunSpec]:
    """The same run for each prompt."""
    return [RunSpec(prompt, read=read, logits=logits, top_k=top_k, logprobs=logprobs, loss=loss) for prompt in prompts]


def tokenize_request(prompts: Sequence[Prompt], *, special_tokens: bool) -> model_pb2.TokenizeRequest:
    """The request that tokenizes these prompts."""
    messages = [_prompt(prompt, "prompt") for prompt in prompts]
    for message in messages:
        if message.HasField("text"):
            message.omit_special_tokens = not special_tokens
    return model_pb2.TokenizeRequest(prompts=messages)


class Draft:
    """A run request of which the looked-up parts are missing."""

    def __init__(self, specs: Sequence[RunSpec], numerics: Numerics) -> None:
        if not specs:
            raise invalid_field("runs", "an empty list; give one run at least")
        if numerics not in _NUMERICS:
            raise invalid_field("numerics", f"{numerics!r} is not one of {', '.join(_NUMERICS)}")
        self._numerics = _NUMERICS[numerics]
        self._runs = [_DraftRun(spec, "" if len(specs) == 1 else f"runs[{i}].") for i, spec in enumerate(specs)]
        # Keyed by the serialized prompt: equal prompts are looked up once.
        self._sought = {_key(prompt): prompt for run in self._runs for prompt in run.sought()}

    def lookups(self) -> list[model_pb2.TokenizeRequest]:
        """What to ask the tokenizer first; often nothing."""
        sought = list(self._sought.values())
        return [
            model_pb2.TokenizeRequest(prompts=sought[start : start + LOOKUPS_PER_CALL])
            for start in range(0, len(sought), LOOKUPS_PER_CALL)
        ]

    def request(self, answers: Sequence[model_pb2.TokenizeResponse]) -> run_pb2.RunRequest:
        """The request, from the tokenizer's answers in the order of `lookups`."""
        tokenized = [prompt for answer in answers for prompt in answer.prompts]
        if len(tokenized) != len(self._sought):
            raise damaged(f"{len(tokenized)} of {len(self._sought)} prompts were tokenized")
        found = dict(zip(self._sought, tokenized, strict=True))
        return run_pb2.RunRequest(runs=[run.message(found) for run in self._runs], numerics=self._numerics)


class _DraftRun:
    """One run of a draft. `path` leads error messages."""

    def __init__(self, spec: RunSpec, path: str) -> None:
        self._path = path
        self._spec = spec
        self._prompt = _prompt(spec.prompt, f"{path}prompt")
        self._reads = list(_named_reads(spec.read, f"{path}read"))
        self._logprobs = _tokens(spec.logprobs, f"{path}logprobs")
        self._logits = None if spec.logits == "none" else spec.logits
        if not isinstance(self._logits, At):
            _positions.to_message(self._logits, f"{path}logits")
        self._top_k = (0 if self._logits is None else TOP_K) if spec.top_k is None else operator.index(spec.top_k)
        if not 0 <= self._top_k < 2**32:
            raise invalid_field(f"{path}top_k", f"{spec.top_k} is not a number of tokens")

    def sought(self) -> Iterator[prompt_pb2.Prompt]:
        """The prompts whose tokens this run must know."""
        if isinstance(self._logits, At) or any(item.needs_tokens for _, item in self._reads):
            yield self._prompt
        for field, text in self._token_texts():
            yield _bare(text, field)

    def message(self, found: Mapping[bytes, model_pb2.TokenizedPrompt]) -> run_pb2.RunSpec:
        """The run as it travels."""
        tokenized = found.get(_key(self._prompt))
        token_ids = {
            text: _single_token(text, found[_key(_bare(text, field))], field) for field, text in self._token_texts()
        }
        return run_pb2.RunSpec(
            prompt=self._prompt,
            reads=[_reads.to_message(item, field, tokenized, token_ids) for field, item in self._reads],
            logits=self._logits_request(tokenized, token_ids),
            loss=self._spec.loss,
        )

    def _token_texts(self) -> Iterator[tuple[str, str]]:
        """Texts that stand for single tokens, each with the argument that it is in."""
        for field, item in self._reads:
            yield from ((f"{field}.onto", text) for text in item.token_texts)
        yield from ((f"{self._path}logprobs", token) for token in self._logprobs if isinstance(token, str))

    def _logits_request(
        self, tokenized: model_pb2.TokenizedPrompt | None, token_ids: dict[str, int]
    ) -> run_pb2.LogitsRequest | None:
        values = self._logits is not None
        if not (values or self._top_k or self._logprobs):
            return None
        return run_pb2.LogitsRequest(
            positions=_positions.to_message(self._logits, f"{self._path}logits", tokenized),
            values=values,
            top_k=self._top_k,
            logprob_tokens=[token_ids[token] if isinstance(token, str) else token for token in self._logprobs],
        )


def _prompt(prompt: Prompt, field: str) -> prompt_pb2.Prompt:
    """One prompt as it travels."""
    if isinstance(prompt, str):
        return prompt_pb2.Prompt(text=_unicode(prompt, field))
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise TypeError(f"{field} is text, a list of token ids or a list of chat messages, not {type(prompt).__name__}")
    items: list[Any] = list(prompt)
    if not items:
        raise invalid_field(field, "an empty list; a run has one token at least")
    if all(isinstance(item, Mapping) for item in items):
        messages = [_chat_message(item, f"{field}[{i}]") for i, item in enumerate(items)]
        return prompt_pb2.Prompt(chat=prompt_pb2.Chat(messages=messages))
    if not all(map(is_whole_number, items)):
        odd = next(item for item in items if not is_whole_number(item))
        raise TypeError(f"{field} is text, a list of token ids or a list of chat messages; {odd!r} is none of these")
    ids = [operator.index(item) for item in items]
    if any(not 0 <= token_id < 2**32 for token_id in ids):
        raise invalid_field(field, f"{min(ids) if min(ids) < 0 else max(ids)} is no token id")
    return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=ids))


def _chat_message(message: ChatMessage, field: str) -> prompt_pb2.ChatMessage:
    if set(message) != {"role", "content"} or not all(isinstance(value, str) for value in message.values()):
        raise invalid_field(field, f"a chat message is {{'role': text, 'content': text}}, not {dict(message)!r}")
    return prompt_pb2.ChatMessage(role=_unicode(message["role"], field), content=_unicode(message["content"], field))


def _bare(text: str, field: str) -> prompt_pb2.Prompt:
    """A text that should be one token: nothing is put before or after it."""
    return prompt_pb2.Prompt(text=_unicode(text, field), omit_special_tokens=True)


def _unicode(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise invalid_field(field, f"character {fault.start} is half a surrogate pair, which is no text") from None
    return text


def _tokens(tokens: Any, field: str) -> list[int | str]:
    if tokens is None:
        return []
    items = [tokens] if isinstance(tokens, str) or is_whole_number(tokens) else tokens
    if not isinstance(items, Iterable):
        raise TypeError(f"{field} is a list of token ids or their texts, not {tokens!r}")
    return [_reads.check_token(item, field) for item in items]


def _named_reads(reads: Reads | None, field: str) -> Iterator[tuple[str, Read]]:
    """Each read with the name that error messages give it. All that is wrong with them fails at once."""
    items = [reads] if isinstance(reads, str | Read) else list(reads or ())
    violations: list[FieldViolation] = []
    for index, item in enumerate(items):
        name = f"{field}[{index}]" if len(items) > 1 else field
        if isinstance(item, Read):
            yield name, item
            continue
        if not isinstance(item, str):
            raise TypeError(f"{name} is a hook point's name or pc.read(..), not {item!r}")
        try:
            yield name, _reads.read(item)
        except InvalidArgument as fault:
            violations += [FieldViolation(name, violation.description) for violation in fault.field_violations]
    if violations:
        raise InvalidArgument(field_violations=violations, reason="INVALID_FIELD")


def _single_token(text: str, found: model_pb2.TokenizedPrompt, field: str) -> int:
    """The id of the one token that a text is."""
    tokens = found.tokens
    if len(tokens) != 1:
        pieces = ", ".join(quoted(token.text, token.id) for token in tokens[:8])
        raise invalid_field(field, f"{text!r} is {len(tokens)} tokens ({pieces}); give one token, or its id")
    # An unknown word becomes one token too; its text tells.
    if tokens[0].text.strip().casefold() != text.strip().casefold():
        made = quoted(tokens[0].text, tokens[0].id)
        raise invalid_field(field, f"{text!r} is no token: the tokenizer makes {made} of it")
    return tokens[0].id


def _key(prompt: prompt_pb2.Prompt) -> bytes:
    return prompt.SerializeToString(deterministic=True)
