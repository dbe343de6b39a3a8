"""Interventions: edits of a run, as values, and what travels of them.

`_operations` has the kinds, `_edits` the functions that make them. One that names several hook points, or several
layers to knock out, travels as several, one after the other; what the server says of those is told of the one that the
caller wrote.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, MISSING, Field, dataclass, fields
from typing import Any, ClassVar

from patchclamp import _positions, _vectors
from patchclamp._hookpoints import HookName
from patchclamp._positions import ALL, At, Positions
from patchclamp._vectors import Source, Unembed
from patchclamp.v1 import intervention_pb2 as pb
from patchclamp.v1 import model_pb2


@dataclass(frozen=True)
class Known:
    """What the tokenizer said for one intervention, which error messages call `field`.

    `prompt` are the tokens of its run, `prompts` those of the runs that it refers to, `token_ids` the ids of tokens
    that are given as text; each as far as it was asked for.
    """

    field: str
    prompt: model_pb2.TokenizedPrompt | None = None
    prompts: Mapping[int, model_pb2.TokenizedPrompt] | None = None
    token_ids: Mapping[str, int] | None = None

    def vector(self, source: Source) -> Any:
        """A vector as it travels."""
        return _vectors.to_message(source, dict(self.token_ids or {}))


class Intervention(ABC):
    """One edit of a run. Made by `pc.add`, `pc.ablate`, `pc.patch` and so on; a value that never changes."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it does: the name of the function that makes it."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Where it applies, for people: hook points, as a rule."""

    @property
    @abstractmethod
    def count(self) -> int:
        """As how many it travels."""

    @property
    def needs_prompt(self) -> bool:
        """Whether positions are looked up in the run's own prompt."""
        return False

    @property
    def looked_up_run(self) -> int | None:
        """The other run in whose prompt positions are looked up."""
        return None

    def token_texts(self) -> Iterator[tuple[str, str]]:
        """Texts that stand for single tokens, each with the argument that it is in."""
        return iter(())

    @abstractmethod
    def messages(self, known: Known) -> list[pb.Intervention]:
        """What travels."""


@dataclass(frozen=True)
class Condition:
    """Restricts an intervention to tokens whose projection on a unit direction lies beyond a threshold. See `when`."""

    hook: HookName
    direction: Source
    _: KW_ONLY
    greater: float | None = None
    less: float | None = None

    def __repr__(self) -> str:
        side = f"less={self.less!r}" if self.greater is None else f"greater={self.greater!r}"
        return f"pc.when({str(self.hook)!r}, {self.direction!r}, {side})"

    def to_message(self, known: Known) -> pb.Condition:
        """The condition as it travels."""
        return pb.Condition(
            hook_point=self.hook.to_message(),
            direction=known.vector(self.direction),
            comparison=pb.COMPARISON_LESS if self.greater is None else pb.COMPARISON_GREATER,
            threshold=self.less if self.greater is None else self.greater,
        )


@dataclass(frozen=True, repr=False)
class Edit(Intervention):
    """An intervention that was written in Python. `arm` is what the protos call its kind."""

    arm: ClassVar[str]
    _: KW_ONLY
    positions: Positions = ALL
    when: Condition | None = None
    allow_never_fired: bool = False

    @property
    def kind(self) -> str:
        return self.arm

    @property
    def count(self) -> int:
        return 1

    @property
    def needs_prompt(self) -> bool:
        return isinstance(self.positions, At)

    def token_texts(self) -> Iterator[tuple[str, str]]:
        named: list[tuple[str, Any]] = [(field.name, getattr(self, field.name)) for field in fields(self)]
        named += [("when.direction", self.when.direction)] if self.when else []
        for name, value in named:
            if isinstance(value, Unembed) and isinstance(value.token, str):
                yield name, value.token

    def messages(self, known: Known) -> list[pb.Intervention]:
        positions = _positions.to_message(self.positions, f"{known.field}.positions", known.prompt)
        when = self.when.to_message(known) if self.when else None
        return [
            pb.Intervention(**{self.arm: op}, positions=positions, when=when, allow_never_fired=self.allow_never_fired)
            for op in self.ops(known)
        ]

    @abstractmethod
    def ops(self, known: Known) -> list[Any]:
        """What is done, as messages of the kind's own type."""

    def __repr__(self) -> str:
        shown = [_shown(getattr(self, field.name)) for field in fields(self) if not field.kw_only]
        for field in fields(self):
            if field.kw_only and _differs(field, getattr(self, field.name)):
                shown.append(f"{field.name}={_shown(getattr(self, field.name))}")
        return f"pc.{self.arm}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class SiteEdit(Edit):
    """An edit of hook points; `message` makes its own message. Empty `heads` and `neurons` mean all of them."""

    message: ClassVar[Callable[..., Any]]
    hooks: tuple[HookName, ...]
    _: KW_ONLY
    heads: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        return ", ".join(map(str, self.hooks))

    @property
    def count(self) -> int:
        return len(self.hooks)

    def ops(self, known: Known) -> list[Any]:
        details = self.details(known)
        return [
            self.message(
                target=pb.Target(hook_point=hook.to_message(), heads=self.heads, neurons=self.neurons), **details
            )
            for hook in self.hooks
        ]

    def details(self, known: Known) -> dict[str, Any]:
        """The fields of the operation besides its target."""
        return {}


def _differs(field: Field[Any], value: Any) -> bool:
    return field.default is MISSING or value != field.default


def _shown(value: Any) -> str:
    """An argument as a caller would write it."""
    if isinstance(value, tuple) and value and all(isinstance(item, HookName) for item in value):
        return repr(str(value[0])) if len(value) == 1 else repr([str(hook) for hook in value])
    if isinstance(value, tuple) and all(isinstance(item, int | tuple) for item in value):
        return repr(list(value) or None)
    return repr(value)
