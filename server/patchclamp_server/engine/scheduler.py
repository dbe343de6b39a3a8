"""The scheduler: which waiting runs form the next batch.

Everything is rows: the runs of all callers wait together, and rows of similar length share a batch, whoever asked for
them. Lengths are similar when they fall into the same power of two, so that padding wastes less than half. A batch is
bounded in padded tokens and rows. Callers take turns, row by row, and the job that was served goes behind the others:
a request of many runs cannot hold up a short one for longer than one batch.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from patchclamp_server.engine.exchange import Exchange
from patchclamp_server.engine.messages import Event, Job, RunSpec


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of one batch: padded tokens and rows."""

    max_tokens: int = 8192
    max_rows: int = 64


@dataclass(eq=False)
class JobState:
    """A job in the engine: what waits, what is left to answer, and when it was served. Times on time.monotonic.

    `pending` are the runs that may run now; those that take values from others join them when these are done.
    """

    job: Job
    emit: Callable[[Event], None]
    submitted: float
    pending: deque[int]
    unanswered: int
    exchange: Exchange = field(default_factory=Exchange)
    cancelled: bool = False
    started: float | None = None
    engine_seconds: float = 0.0

    @property
    def dead(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled or self.late

    @property
    def late(self) -> bool:
        return self.job.deadline is not None and time.monotonic() > self.job.deadline


@dataclass(frozen=True, eq=False)
class Row:
    """One run of one job."""

    state: JobState
    run_index: int

    @property
    def run(self) -> RunSpec:
        return self.state.job.runs[self.run_index]

    @property
    def width(self) -> int:
        """Rows of the batch that it takes: another for its baseline."""
        return 2 if self.run.baseline else 1


@dataclass(eq=False)
class Scheduler:
    """The jobs that wait, in the order in which they get their turn."""

    limits: BatchLimits = field(default_factory=BatchLimits)
    jobs: OrderedDict[int, JobState] = field(default_factory=OrderedDict)

    def add(self, job: Job, emit: Callable[[Event], None]) -> None:
        exchange = Exchange.of(job.runs)
        ready = deque(index for index in range(len(job.runs)) if index not in exchange.awaited)
        self.jobs[job.job_id] = JobState(job, emit, time.monotonic(), ready, len(job.runs), exchange)

    def remove(self, job_id: int) -> None:
        self.jobs.pop(job_id, None)

    def next_batch(self, max_tokens: int | None = None) -> tuple[Row, ...]:
        """The rows that run next; none when nothing waits. They are no longer pending.

        `max_tokens` makes a batch smaller than its limit; one row always runs.
        """
        limit = min(self.limits.max_tokens, max_tokens or self.limits.max_tokens)
        first = next(self._turns(), None)
        if first is None:
            return ()
        bucket = _bucket(first)
        rows: list[Row] = []
        for row in self._turns():
            if row.state.job.solo != first.state.job.solo or _bucket(row) != bucket:
                continue
            if rows and (first.state.job.solo or not self._fits(rows, row, limit)):
                break
            rows.append(row)
        for row in rows:
            row.state.pending.remove(row.run_index)
            self.jobs.move_to_end(row.state.job.job_id)
        return tuple(rows)

    def _turns(self) -> Iterator[Row]:
        """Waiting rows, one of each job in turn."""
        waiting = [(state, iter(tuple(state.pending))) for state in self.jobs.values() if state.pending]
        while waiting:
            still = []
            for state, indices in waiting:
                index = next(indices, None)
                if index is not None:
                    yield Row(state, index)
                    still.append((state, indices))
            waiting = still

    def _fits(self, rows: list[Row], row: Row, max_tokens: int) -> bool:
        longest = max(len(member.run.token_ids) for member in (*rows, row))
        width = sum(member.width for member in (*rows, row))
        return width <= self.limits.max_rows and longest * width <= max_tokens


def _bucket(row: Row) -> int:
    """The power of two that a row's length is rounded up to."""
    return max(len(row.run.token_ids) - 1, 7).bit_length()
