"""Exchange: values that runs of a job take from other runs of it, to patch, resample or freeze.

A run waits until those it takes from have run. What they had at the hook points in question stays on the device, whole
and in the model's own dtype, until the last run that takes it has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from patchclamp_server.engine.messages import RunSpec
from patchclamp_server.hookpoints import HookPoint


@dataclass(eq=False)
class Exchange:
    """Who of one job's runs waits for whom, and the values in between.

    `takers` are the runs still to take a value, by the run that has it and the hook point. `awaited` are the runs that
    each run still waits for.
    """

    takers: dict[tuple[int, HookPoint], set[int]] = field(default_factory=dict)
    awaited: dict[int, set[int]] = field(default_factory=dict)
    values: dict[tuple[int, HookPoint], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[RunSpec]) -> Exchange:
        """The exchange before anything has run."""
        exchange = cls()
        for index, run in enumerate(runs):
            if run.sources:
                exchange.awaited[index] = {source for source, _ in run.sources}
            for source in run.sources:
                exchange.takers.setdefault(source, set()).add(index)
        return exchange

    def wanted(self, run: int) -> frozenset[HookPoint]:
        """Hook points whose values other runs take from this one."""
        return frozenset(point for source, point in self.takers if source == run)

    def put(self, run: int, point: HookPoint, value: torch.Tensor) -> None:
        """Keeps the value `[*axes]` of a run, without padding."""
        self.values[run, point] = value

    def take(self, run: int, point: HookPoint) -> torch.Tensor:
        """The value `[*axes]` that a run had."""
        return self.values[run, point]

    def finish(self, run: int) -> tuple[int, ...]:
        """Notes that a run is done, frees what nobody takes any more, and gives the runs that waited for it alone."""
        for source, takers in self.takers.items():
            takers.discard(run)
            if not takers:
                self.values.pop(source, None)
        ready = []
        for waiting, sources in self.awaited.items():
            if run in sources:
                sources.discard(run)
                if not sources:
                    ready.append(waiting)
        return tuple(ready)

    def fail(self, run: int) -> tuple[int, ...]:
        """Every run that waits for this one, directly or through others, ascending: none of them can run any more."""
        found: set[int] = set()
        reached = [run]
        while reached:
            source = reached.pop()
            new = {waiting for waiting, sources in self.awaited.items() if source in sources} - found
            found |= new
            reached += new
        for gone in (run, *found):
            self.awaited.pop(gone, None)
            self.finish(gone)
        return tuple(sorted(found))
