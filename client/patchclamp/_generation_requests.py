"""From what callers of `generate` and `stream` write to the messages that travel. Does no I/O; both clients use it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias

from patchclamp import _requests
from patchclamp._arguments import flag, number, unicode_text, whole_number
from patchclamp._positions import is_whole_number
from patchclamp._reads import Read
from patchclamp._receipts import Edits, retold
from patchclamp._requests import DraftRun, Interventions, Lookups, Numerics, Prompt, Prompts, Reads, RunSpec
from patchclamp.errors import Error, FieldViolation, InvalidArgument, invalid_field
from patchclamp.v1 import generation_pb2, model_pb2

Stop: TypeAlias = "str | SupportsIndex | Sequence[str | SupportsIndex] | None"

_MOST_SEED = 2**64 - 1
# What the server calls by other names than the caller: places within the messages that the arguments travel in.
_SERVERS_NAMES = re.compile(
    r"\bsampling\.(?P<sampling>\w+)|\bstop\.(?P<rule>max_new_tokens|ignore_eos)\b"
    r"|\bstop\.(?P<stop>texts|token_ids)\b(?:\[(?P<number>\d+)\])?|\breads(?:\[(?P<read>\d+)\]|(?=\.)|$)"
)


class GenerationDraft:
    """Requests to generate, of which the looked-up parts are missing: the same for each prompt."""

    def __init__(
        self,
        prompt: Prompt | Prompts,
        *,
        max_new_tokens: SupportsIndex,
        interventions: Interventions | None,
        read: Reads | None,
        temperature: SupportsFloat,
        top_k: SupportsIndex,
        top_p: SupportsFloat,
        repetition_penalty: SupportsFloat,
        seed: SupportsIndex | None,
        samples: SupportsIndex,
        stop: Stop,
        ignore_eos: bool,
        top_logprobs: SupportsIndex,
        numerics: Numerics,
    ) -> None:
        prompts = _requests.listed(prompt)
        names = [f"prompt[{i}]" for i in range(len(prompts))] if _requests.is_many(prompt) else ["prompt"]
        self._runs = [
            DraftRun(RunSpec(one, read=read, interventions=interventions, logits=None), "", name)
            for one, name in zip(prompts, names, strict=True)
        ]
        self._prompt_names = names
        self._one_read = isinstance(read, str | Read) or len(read or ()) <= 1
        self._stop, self._stop_places = _stop_rules(stop)
        self._many_stops = sum(map(len, self._stop_places.values())) > 1
        self._stop.max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", least=1)
        self._stop.ignore_eos = flag(ignore_eos, "ignore_eos")
        self._sampling = generation_pb2.Sampling(
            temperature=number(temperature, "temperature"),
            top_k=whole_number(top_k, "top_k", least=0),
            top_p=number(top_p, "top_p"),
            repetition_penalty=number(repetition_penalty, "repetition_penalty"),
            seed=None if seed is None else whole_number(seed, "seed", least=0, most=_MOST_SEED),
            samples=whole_number(samples, "samples", least=1),
        )
        self._top_logprobs = whole_number(top_logprobs, "top_logprobs", least=0)
        self._numerics = _requests.numerics_message(numerics)
        self._lookups = Lookups(prompt for run in self._runs for prompt in run.sought([]))

    @property
    def edits(self) -> Edits:
        """The interventions, as they were written."""
        return self._runs[0].edits

    def lookups(self) -> list[model_pb2.TokenizeRequest]:
        """What to ask the tokenizer first; often nothing."""
        return self._lookups.requests()

    def requests(self, answers: Sequence[model_pb2.TokenizeResponse]) -> list[generation_pb2.GenerateRequest]:
        """A request for each prompt, from the tokenizer's answers in the order of `lookups`."""
        found = self._lookups.found(answers)
        messages = [run.message(found, []) for run in self._runs]
        return [
            generation_pb2.GenerateRequest(
                prompt=message.prompt,
                interventions=message.interventions,
                reads=message.reads,
                sampling=self._sampling,
                stop=self._stop,
                top_logprobs=self._top_logprobs,
                numerics=self._numerics,
            )
            for message in messages
        ]

    def explain(self, error: Error, which: int = 0) -> Error:
        """The error of one prompt's call, in the caller's own names: its arguments, and interventions by their place
        in the list."""
        error = retold([self.edits], error) if isinstance(error, InvalidArgument) else self.edits.explain(error)
        error.say(_SERVERS_NAMES.sub(self._argument, error.message))
        if isinstance(error, InvalidArgument):
            error.field_violations = tuple(
                FieldViolation(
                    self._field(violation.field, which),
                    _SERVERS_NAMES.sub(self._argument, violation.description),
                )
                for violation in error.field_violations
            )
        return error

    def _field(self, field: str, which: int) -> str:
        if field == "prompt" or field.startswith("prompt."):
            return self._prompt_names[which] + field.removeprefix("prompt")
        return _SERVERS_NAMES.sub(self._argument, field)

    def _argument(self, found: re.Match[str]) -> str:
        """The caller's name of a place within a request."""
        if found["sampling"] or found["rule"]:
            return found["sampling"] or found["rule"]
        if found["stop"]:
            places = self._stop_places[found["stop"]]
            index = int(found["number"] or len(places))
            return f"stop[{places[index]}]" if self._many_stops and index < len(places) else "stop"
        return f"read[{found['read']}]" if found["read"] and not self._one_read else "read"


def _stop_rules(stop: Any) -> tuple[generation_pb2.StopRules, dict[str, list[int]]]:
    """Texts and ids that end a sample, and the place of each among the caller's."""
    items = [stop] if isinstance(stop, str) or is_whole_number(stop) else () if stop is None else stop
    if not isinstance(items, Iterable):
        raise TypeError(f"stop is a list of texts and token ids, not {stop!r}")
    rules = generation_pb2.StopRules()
    places: dict[str, list[int]] = {"texts": [], "token_ids": []}
    for place, item in enumerate(items):
        if isinstance(item, str):
            if not item:
                raise invalid_field("stop", "an empty text would stop at once")
            rules.texts.append(unicode_text(item, "stop"))
            places["texts"].append(place)
        elif is_whole_number(item):
            rules.token_ids.append(whole_number(item, "stop", least=0))
            places["token_ids"].append(place)
        else:
            raise TypeError(f"stop is a list of texts and token ids; {item!r} is neither")
    return rules, places
