"""Positions: which tokens of a run are meant.

They count on the run's own, unpadded sequence; negative ones count from the prompt's end. An int, a list, a slice of
step one, `pc.ALL`, `pc.LAST`, `pc.PROMPT`, `pc.GENERATED`, or `pc.at("Dallas")`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias

import numpy as np

from patchclamp.errors import invalid_field
from patchclamp.v1 import hook_point_pb2 as pb
from patchclamp.v1 import model_pb2

_INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True)
class Span:
    """A family of positions that is known without counting."""

    name: str

    def __repr__(self) -> str:
        return f"pc.{self.name.upper()}"


ALL = Span("all")
PROMPT = Span("prompt")
GENERATED = Span("generated")
LAST = Span("last")

_SPANS: dict[str, pb.PositionSpan] = {
    "all": pb.POSITION_SPAN_ALL,
    "prompt": pb.POSITION_SPAN_PROMPT,
    "generated": pb.POSITION_SPAN_GENERATED,
    "last": pb.POSITION_SPAN_LAST,
}


@dataclass(frozen=True)
class At:
    """The tokens that overlap a piece of the prompt's text. See `at`."""

    text: str
    occurrence: int | None = None

    def __repr__(self) -> str:
        return f"pc.at({self.text!r}{'' if self.occurrence is None else f', occurrence={self.occurrence}'})"


Positions: TypeAlias = "SupportsIndex | Sequence[SupportsIndex] | slice | Span | At | str"


def at(text: str, *, occurrence: int | None = None) -> At:
    """The positions of the tokens that overlap `text` in the prompt, found by the server's tokenizer.

    Text that occurs more than once needs `occurrence`: 0 for the first, -1 for the last.
    """
    if not isinstance(text, str):
        raise TypeError(f"at() takes text, not {type(text).__name__}")
    if not text:
        raise invalid_field("at", "empty text is nowhere")
    return At(text, None if occurrence is None else operator.index(occurrence))


def to_message(
    positions: Positions | None, field: str, tokenized: model_pb2.TokenizedPrompt | None = None
) -> pb.Positions | None:
    """The selector as it travels; None leaves it to the server's default. `tokenized` is what `at` is looked up in."""
    match positions:
        case None:
            return None
        case Span(name):
            return pb.Positions(span=_SPANS[name])
        case At():
            if tokenized is None:
                raise ValueError(f"{positions} is looked up in a prompt")
            return _indices(locate(positions, tokenized, field), field)
        case str():
            if positions not in _SPANS:
                raise invalid_field(field, f"{positions!r} is no span of positions; did you mean pc.at({positions!r})?")
            return pb.Positions(span=_SPANS[positions])
        case slice():
            return _range(positions, field)
        case _:
            return _indices(_whole_numbers(positions, field), field)


def settled(positions: Any, field: str) -> Positions:
    """Positions as a value that stays as it is: lists and arrays become tuples, names of spans spans.

    Fails now, not when the run is sent, for positions that cannot be meant.
    """
    match positions:
        case None:
            return ALL
        case Span() | At():
            return positions
        case str():
            to_message(positions, field)
            return Span(positions)
        case slice():
            found = _range(positions, field).range
            return slice(
                found.start if found.HasField("start") else None, found.stop if found.HasField("stop") else None
            )
        case _:
            numbers = _whole_numbers(positions, field)
            _indices(numbers, field)
            return numbers[0] if is_whole_number(positions) else tuple(numbers)


def locate(where: At, tokenized: model_pb2.TokenizedPrompt, field: str) -> list[int]:
    """Positions of the tokens that overlap one occurrence of a text."""
    if tokenized.tokens and not any(token.text for token in tokenized.tokens):
        raise invalid_field(
            field, f"{where} cannot be looked up: this model came without a tokenizer; give positions as numbers"
        )
    starts = _occurrences(where.text, tokenized.text)
    if not starts:
        raise invalid_field(field, f"{where.text!r} does not occur in {_shortened(tokenized.text)!r}")
    if where.occurrence is None and len(starts) > 1:
        raise invalid_field(
            field,
            f"{where.text!r} occurs {len(starts)} times in {_shortened(tokenized.text)!r}; "
            f"say which: pc.at({where.text!r}, occurrence=0) is the first, occurrence=-1 the last",
        )
    try:
        start = starts[where.occurrence or 0]
    except IndexError:
        times = "once" if len(starts) == 1 else f"{len(starts)} times"
        raise invalid_field(field, f"{where} is out of range: the text occurs {times}") from None
    end = start + len(where.text)
    # A token without text of its own (start = end) overlaps nothing.
    found = [i for i, token in enumerate(tokenized.tokens) if max(token.start, start) < min(token.end, end)]
    if not found:
        raise invalid_field(field, f"no token covers {where.text!r} in {_shortened(tokenized.text)!r}")
    return found


def _occurrences(text: str, whole: str) -> list[int]:
    """Where a text starts, overlapping occurrences included."""
    return [start for start in range(len(whole) - len(text) + 1) if whole.startswith(text, start)]


def _range(positions: slice, field: str) -> pb.Positions:
    if positions.step not in (None, 1):
        raise invalid_field(
            field, f"a slice of step {positions.step}; only step 1 is known, list the positions instead"
        )
    start, stop = (
        None if end is None else _int32(operator.index(end), field) for end in (positions.start, positions.stop)
    )
    return pb.Positions(range=pb.PositionRange(start=start, stop=stop))


def _indices(indices: Sequence[int], field: str) -> pb.Positions:
    if not indices:
        raise invalid_field(field, "an empty list selects nothing; leave positions out for all of them")
    if len(set(indices)) < len(indices):
        raise invalid_field(field, f"position {Counter(indices).most_common(1)[0][0]} is there twice")
    return pb.Positions(indices=pb.PositionIndices(indices=[_int32(index, field) for index in indices]))


def is_whole_number(item: object) -> bool:
    """Whether this is one number: arrays have `__index__` too, and True is no position."""
    return hasattr(item, "__index__") and not isinstance(item, bool) and not getattr(item, "shape", ())


def _whole_numbers(positions: Any, field: str) -> list[int]:
    if getattr(positions, "dtype", None) == np.bool_:
        raise TypeError(f"{field} is a boolean mask; give the positions themselves, for instance np.flatnonzero(mask)")
    items = [positions] if is_whole_number(positions) else positions
    if not isinstance(items, Iterable) or not all(map(is_whole_number, items)):
        raise TypeError(
            f"{field} is an int, a list of ints, a slice, pc.ALL, pc.LAST, pc.PROMPT, pc.GENERATED or pc.at('text'), "
            f"not {positions!r}"
        )
    return [operator.index(item) for item in items]


def _int32(position: int, field: str) -> int:
    if position not in _INT32:
        raise invalid_field(field, f"position {position} is beyond any context")
    return position


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]} … {text[-15:]}"
