"""Positions: selectors of tokens on the logical, unpadded sequence of one run.

Negative positions count from the prompt's end. A selection is resolved against the length of the prompt and the number
of generated tokens, never against a padded batch, so the same request gives the same rows batched or alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Span(StrEnum):
    """A family of positions that is known without counting."""

    ALL = "all"
    PROMPT = "prompt"
    GENERATED = "generated"
    LAST = "last"


@dataclass(frozen=True)
class Range:
    """A half-open range; either end may be left out, negative ends count from the prompt's end."""

    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class Positions:
    """A selection: a span, explicit indices (in the order of the result's rows) or a range, less the excluded ones."""

    selector: Span | Range | tuple[int, ...] = Span.ALL
    exclude: tuple[int, ...] = ()

    def resolve(self, prompt_length: int, generated: int = 0) -> tuple[int, ...]:
        """Absolute positions, all within the run. Raises IndexError that names the first one that is not."""
        length = prompt_length + generated
        chosen = self._chosen(prompt_length, length)
        excluded = {_absolute(position, prompt_length, length) for position in self.exclude}
        return tuple(position for position in chosen if position not in excluded)

    def _chosen(self, prompt_length: int, length: int) -> tuple[int, ...]:
        match self.selector:
            case Span.ALL:
                return tuple(range(length))
            case Span.PROMPT:
                return tuple(range(prompt_length))
            case Span.GENERATED:
                return tuple(range(prompt_length, length))
            case Span.LAST:
                return (prompt_length - 1,)
            case Range(start, stop):
                first = 0 if start is None else _absolute(start, prompt_length, length + 1)
                last = length if stop is None else _absolute(stop, prompt_length, length + 1)
                return tuple(range(first, last))
            case indices:
                return tuple(_absolute(position, prompt_length, length) for position in indices)


ALL = Positions()
LAST = Positions(Span.LAST)


def _absolute(position: int, prompt_length: int, stop: int) -> int:
    """The position from the start. Raises IndexError outside [0, stop)."""
    absolute = position + prompt_length if position < 0 else position
    if not 0 <= absolute < stop:
        raise IndexError(f"position {position} is outside a run of {stop} tokens with a prompt of {prompt_length}")
    return absolute
