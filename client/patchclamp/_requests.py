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
from patchclamp._arguments import flag, unicode_text
from patchclamp._interventions import Intervention, Known
from patchclamp._positions import At, Positions, is_whole_number
from patchclamp._reads import Read
from patchclamp._receipts import Edits, retold
from patchclamp._results import quoted
from patchclamp._tensors import damaged
from patchclamp._vectors import check_token
from patchclamp.errors import Error, FieldViolation, InvalidArgument, invalid_field
from patchclamp.v1 import handle_pb2, logits_pb2, model_pb2, numerics_pb2, prompt_pb2, run_pb2

ChatMessage: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = "str | Sequence[SupportsIndex] | Sequence[ChatMessage]"
Prompts: TypeAlias = "list[str] | list[list[int]] | list[list[dict[str, str]]] | list[Prompt] | tuple[str, ...]"
Reads: TypeAlias = "str | Read | Sequence[str | Read]"
Interventions: TypeAlias = "Intervention | Sequence[Intervention]"
Logits: TypeAlias = "Literal['last', 'all', 'none'] | Positions | None"
TokensLike: TypeAlias = "Sequence[SupportsIndex | str] | SupportsIndex | str"
Numerics: TypeAlias = Literal["default", "deterministic", "solo"]

# How many prompts one Tokenize call may bring is the server's to say; so few are always welcome.
LOOKUPS_PER_CALL = 16
# How many of the most probable next tokens a run tells unless asked otherwise.
TOP_K = 5

NUMERICS: dict[str, numerics_pb2.Numerics] = {
    "default": numerics_pb2.NUMERICS_DEFAULT,
    "deterministic": numerics_pb2.NUMERICS_DETERMINISTIC,
    "solo": numerics_pb2.NUMERICS_SOLO,
}


@dataclass(frozen=True, eq=False)
class RunSpec:
    """One run of a batch: what `Client.run` takes, as a value for `Client.run_many`."""

    prompt: Prompt
    _: KW_ONLY
    read: Reads | None = None
    interventions: Interventions | None = None
    logits: Logits = "last"
    top_k: int | None = None
    logprobs: TokensLike | None = None
    loss: bool = False
    baseline: bool = False
    keep: Reads | None = None


def is_many(prompt: Prompt | Prompts) -> TypeGuard[Prompts]:
    """Whether this is a list of prompts rather than one: text, token ids and a conversation are one."""
    if isinstance(prompt, str) or not isinstance(prompt, list | tuple) or not prompt:
        return False
    return isinstance(prompt[0], str) or not (isinstance(prompt[0], Mapping) or is_whole_number(prompt[0]))


def listed(prompt: Prompt | Prompts) -> list[Prompt]:
    """The prompts of a list; one prompt alone."""
    return list(prompt) if is_many(prompt) else [cast("Prompt", prompt)]


def one_prompt(prompt: Prompt) -> Prompt:
    """The prompt, where only one is taken."""
    if is_many(prompt):
        raise invalid_field("prompt", "a list of prompts; this takes one, generate(..) takes several")
    return prompt


def specs_of(
    prompts: Sequence[Prompt],
    *,
    read: Reads | None,
    interventions: Interventions | None,
    logits: Logits,
    top_k: int | None,
    logprobs: TokensLike | None,
    loss: bool,
    baseline: bool,
    keep: Reads | None,
) -> list[RunSpec]:
    """The same run for each prompt."""
    return [
        RunSpec(
            prompt,
            read=read,
            interventions=interventions,
            logits=logits,
            top_k=top_k,
            logprobs=logprobs,
            loss=loss,
            baseline=baseline,
            keep=keep,
        )
        for prompt in prompts
    ]


def tokenize_request(prompts: Sequence[Prompt], *, special_tokens: bool) -> model_pb2.TokenizeRequest:
    """The request that tokenizes these prompts."""
    messages = [_prompt(prompt, "prompt") for prompt in prompts]
    for message in messages:
        if message.HasField("text"):
            message.omit_special_tokens = not special_tokens
    return model_pb2.TokenizeRequest(prompts=messages)


def numerics_message(numerics: Numerics) -> numerics_pb2.Numerics:
    """How exact results are, as it travels."""
    if numerics not in NUMERICS:
        raise invalid_field("numerics", f"{numerics!r} is not one of {', '.join(NUMERICS)}")
    return NUMERICS[numerics]


class Lookups:
    """Prompts that the tokenizer is asked about; equal ones once."""

    def __init__(self, prompts: Iterable[prompt_pb2.Prompt]) -> None:
        self._sought = {_key(prompt): prompt for prompt in prompts}

    def requests(self) -> list[model_pb2.TokenizeRequest]:
        """What to ask; often nothing."""
        sought = list(self._sought.values())
        return [
            model_pb2.TokenizeRequest(prompts=sought[start : start + LOOKUPS_PER_CALL])
            for start in range(0, len(sought), LOOKUPS_PER_CALL)
        ]

    def found(self, answers: Sequence[model_pb2.TokenizeResponse]) -> dict[bytes, model_pb2.TokenizedPrompt]:
        """The answers, in the order of `requests`, by the serialized prompt."""
        tokenized = [prompt for answer in answers for prompt in answer.prompts]
        if len(tokenized) != len(self._sought):
            raise damaged(f"{len(tokenized)} of {len(self._sought)} prompts were tokenized")
        return dict(zip(self._sought, tokenized, strict=True))


class Draft:
    """A run request of which the looked-up parts are missing."""

    def __init__(self, specs: Sequence[RunSpec], numerics: Numerics) -> None:
        if not specs:
            raise invalid_field("runs", "an empty list; give one run at least")
        self._numerics = numerics_message(numerics)
        self._runs = [DraftRun(spec, "" if len(specs) == 1 else f"runs[{i}].") for i, spec in enumerate(specs)]
        prompts = [run.prompt for run in self._runs]
        self._lookups = Lookups(prompt for run in self._runs for prompt in run.sought(prompts))

    @property
    def edits(self) -> list[Edits]:
        """The interventions of each run, as they were written."""
        return [run.edits for run in self._runs]

    def explain(self, error: Error) -> Error:
        """The error of the whole call, naming interventions by their place in the callers' lists."""
        return retold(self.edits, error)

    def lookups(self) -> list[model_pb2.TokenizeRequest]:
        """What to ask the tokenizer first; often nothing."""
        return self._lookups.requests()

    def request(self, answers: Sequence[model_pb2.TokenizeResponse]) -> run_pb2.RunRequest:
        """The request, from the tokenizer's answers in the order of `lookups`."""
        found = self._lookups.found(answers)
        prompts = [run.prompt for run in self._runs]
        return run_pb2.RunRequest(runs=[run.message(found, prompts) for run in self._runs], numerics=self._numerics)


class DraftRun:
    """One run of a draft. `path` leads error messages, which call its prompt `prompt_field`."""

    def __init__(self, spec: RunSpec, path: str, prompt_field: str = "prompt") -> None:
        self._path = path
        self._spec = spec
        self.prompt = _prompt(spec.prompt, f"{path}{prompt_field}")
        self._reads = list(_named_reads(spec.read, f"{path}read"))
        self._keep = list(_named_reads(spec.keep, f"{path}keep"))
        self._interventions = list(_named_interventions(spec.interventions, f"{path}interventions"))
        self.edits = Edits(tuple(intervention for _, intervention in self._interventions))
        self._baseline = flag(spec.baseline, f"{path}baseline")
        self._logprobs = _tokens(spec.logprobs, f"{path}logprobs")
        self._logits = None if spec.logits == "none" else spec.logits
        if not isinstance(self._logits, At):
            _positions.to_message(self._logits, f"{path}logits")
        self._top_k = (0 if self._logits is None else TOP_K) if spec.top_k is None else operator.index(spec.top_k)
        if not 0 <= self._top_k < 2**32:
            raise invalid_field(f"{path}top_k", f"{spec.top_k} is not a number of tokens")

    def sought(self, prompts: Sequence[prompt_pb2.Prompt]) -> Iterator[prompt_pb2.Prompt]:
        """The prompts whose tokens this run must know; `prompts` are those of all runs."""
        needed = isinstance(self._logits, At) or any(item.needs_tokens for _, item in [*self._reads, *self._keep])
        if needed or any(intervention.needs_prompt for intervention in self.edits.written):
            yield self.prompt
        for field, intervention in self._interventions:
            run = intervention.looked_up_run
            if run is not None and run >= len(prompts):
                raise invalid_field(f"{field}.source", f"there is no run {run}: the call has {len(prompts)}")
            if run is not None:
                yield prompts[run]
        for field, text in self._token_texts():
            yield _bare(text, field)

    def message(
        self, found: Mapping[bytes, model_pb2.TokenizedPrompt], prompts: Sequence[prompt_pb2.Prompt]
    ) -> run_pb2.RunSpec:
        """The run as it travels."""
        tokenized = found.get(_key(self.prompt))
        token_ids = {
            text: _single_token(text, found[_key(_bare(text, field))], field) for field, text in self._token_texts()
        }
        return run_pb2.RunSpec(
            prompt=self.prompt,
            reads=[_reads.to_message(item, field, tokenized, token_ids) for field, item in self._reads],
            interventions=[
                message
                for field, intervention in self._interventions
                for message in intervention.messages(
                    Known(field, tokenized, _of_other_run(intervention, found, prompts), token_ids)
                )
            ],
            logits=self._logits_request(tokenized, token_ids),
            loss=self._spec.loss,
            keep=[
                handle_pb2.Keep(read=_reads.to_kept_message(item, field, tokenized, token_ids))
                for field, item in self._keep
            ],
            baseline=self._baseline,
        )

    def _token_texts(self) -> Iterator[tuple[str, str]]:
        """Texts that stand for single tokens, each with the argument that it is in."""
        for field, item in [*self._reads, *self._keep]:
            yield from ((f"{field}.onto", text) for text in item.token_texts)
        for field, intervention in self._interventions:
            yield from ((f"{field}.{argument}", text) for argument, text in intervention.token_texts())
        yield from ((f"{self._path}logprobs", token) for token in self._logprobs if isinstance(token, str))

    def _logits_request(
        self, tokenized: model_pb2.TokenizedPrompt | None, token_ids: dict[str, int]
    ) -> logits_pb2.LogitsRequest | None:
        values = self._logits is not None
        if not (values or self._top_k or self._logprobs):
            return None
        return logits_pb2.LogitsRequest(
            positions=_positions.to_message(self._logits, f"{self._path}logits", tokenized),
            values=values,
            top_k=self._top_k,
            logprob_tokens=[token_ids[token] if isinstance(token, str) else token for token in self._logprobs],
        )


def _prompt(prompt: Prompt, field: str) -> prompt_pb2.Prompt:
    """One prompt as it travels."""
    if isinstance(prompt, str):
        return prompt_pb2.Prompt(text=unicode_text(prompt, field))
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise TypeError(f"{field} is text, a list of token ids or a list of chat messages, not {type(prompt).__name__}")
    items: list[Any] = list(prompt)
    if not items:
        raise invalid_field(field, "an empty list is no prompt: one has a token at least, a list of prompts one prompt")
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
    return prompt_pb2.ChatMessage(
        role=unicode_text(message["role"], field), content=unicode_text(message["content"], field)
    )


def _bare(text: str, field: str) -> prompt_pb2.Prompt:
    """A text that should be one token: nothing is put before or after it."""
    return prompt_pb2.Prompt(text=unicode_text(text, field), omit_special_tokens=True)


def _tokens(tokens: Any, field: str) -> list[int | str]:
    if tokens is None:
        return []
    items = [tokens] if isinstance(tokens, str) or is_whole_number(tokens) else tokens
    if not isinstance(items, Iterable):
        raise TypeError(f"{field} is a list of token ids or their texts, not {tokens!r}")
    return [check_token(item, field) for item in items]


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


def _named_interventions(interventions: Interventions | None, field: str) -> Iterator[tuple[str, Intervention]]:
    """Each intervention with the name that error messages give it: those of a list have their index."""
    items: list[Any] = list(interventions or ()) if isinstance(interventions, Iterable | None) else [interventions]
    for index, item in enumerate(items):
        name = f"{field}[{index}]" if isinstance(interventions, Iterable) else field
        if not isinstance(item, Intervention):
            raise TypeError(f"{name} is pc.add(..), pc.patch(..) or another intervention, not {item!r}")
        yield name, item


def _of_other_run(
    intervention: Intervention,
    found: Mapping[bytes, model_pb2.TokenizedPrompt],
    prompts: Sequence[prompt_pb2.Prompt],
) -> dict[int, model_pb2.TokenizedPrompt]:
    """The tokens of the run that an intervention refers to, where it needs them."""
    run = intervention.looked_up_run
    return {} if run is None else {run: found[_key(prompts[run])]}


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
