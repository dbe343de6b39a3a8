"""Measuring on a noisy machine: interleaved repeats, process CPU time, and the ratio of the fastest of each side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, the figure, the target (empty where there is none), and whether it
    holds (None without a target)."""

    name: str
    figure: str
    target: str = ""
    holds: bool | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds of each repeat."""

    seconds: tuple[float, ...]

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    def quantile(self, share: float) -> float:
        """The value below which a share of the repeats lies."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    in_a_row: int = 1,
) -> dict[str, Timings]:
    """Times each side in turn, again and again, after one unmeasured round. The order is reversed every other round,
    so that what one side leaves behind (in caches, in the allocator) does not always meet the same other. Each turn of
    a side is several calls in a row where one would find another process asleep."""
    for side in sides.values():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(repeats):
        for name in names if turn % 2 else reversed(names):
            found[name] += [_seconds(sides[name], clock) for _ in range(in_a_row)]
    return {name: Timings(tuple(seconds)) for name, seconds in found.items()}


def _seconds(side: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    side()
    return clock() - began


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    verdict = {None: "", True: "holds", False: "missed"}
    lines = ["| measured | figure | target | |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.figure} | {row.target} | {verdict[row.holds]} |" for row in rows]
    return "\n".join(lines)
