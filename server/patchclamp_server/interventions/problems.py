"""Problems: what a run's edits are refused for, and the positions that they name, as far as they lie in the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp_server.interventions.ops import Intervention, RowEdits


@dataclass(frozen=True)
class Problem:
    """One invalid field of one intervention, such as `clamp.min` of the second."""

    index: int
    field: str
    text: str


class InvalidInterventions(ValueError):
    """Edits that cannot be carried out. `problems` lists all reasons."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"interventions[{p.index}].{p.field}: {p.text}" for p in problems))
        self.problems = tuple(problems)


def selected(intervention: Intervention, row: RowEdits) -> tuple[int, ...]:
    """The positions that an intervention selects. Raises IndexError for one outside the run."""
    return intervention.positions.resolve(row.prompt_length, row.max_length - row.prompt_length)


def absolute(edge: tuple[int, int], row: RowEdits) -> tuple[int, int]:
    """Query and key of an attention edge from the start of the run. Raises IndexError outside it."""
    ends = [position + row.prompt_length if position < 0 else position for position in edge]
    for given, position in zip(edge, ends, strict=True):
        if not 0 <= position < row.max_length:
            raise IndexError(f"position {given} is outside a run of {row.max_length} tokens")
    return ends[0], ends[1]
