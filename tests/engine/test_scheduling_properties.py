"""Whatever comes in, and whenever: every run is served once, within the limits, and nobody waits for long."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.jobs import job
from patchclamp_server.engine.messages import Job
from patchclamp_server.engine.scheduler import BatchLimits, Row, Scheduler

jobs = st.builds(job, st.lists(st.integers(1, 40), min_size=1, max_size=12), solo=st.booleans())
limits = st.builds(BatchLimits, st.integers(1, 120), st.integers(1, 9))
# What happens: a job comes in, or (None) a batch is formed.
histories = st.lists(st.none() | jobs, max_size=25)


@dataclass
class Served:
    """A scheduler under watch."""

    limits: BatchLimits
    scheduler: Scheduler = field(init=False)
    batches: list[tuple[Row, ...]] = field(default_factory=list)
    patience: dict[int, int] = field(default_factory=dict)  # batches that a job may still wait for its first run

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)

    def add(self, one: Job) -> None:
        ahead = sum(1 for state in self.scheduler.jobs.values() if state.pending)
        self.patience[one.job_id] = ahead
        self.scheduler.add(one, lambda event: None)

    def step(self) -> bool:
        rows = self.scheduler.next_batch()
        if not rows:
            return False
        self.batches.append(rows)
        for row in rows:
            self.patience.pop(row.state.job.job_id, None)
        for waiting in self.patience:
            self.patience[waiting] -= 1
        return True


@given(limits, histories)
@settings(deadline=None)
def test_every_run_is_served_once_within_the_limits_and_in_its_turn(
    bounds: BatchLimits, history: list[Job | None]
) -> None:
    served = Served(bounds)
    for event in history:
        if event is None:
            served.step()
        else:
            served.add(event)
        # Everyone ahead is served before, once each, and nobody who came later.
        assert all(left >= 0 for left in served.patience.values())
    while served.step():
        assert all(left >= 0 for left in served.patience.values())

    wanted = Counter((one.job_id, run) for one in history if one is not None for run in range(len(one.runs)))
    found = Counter((row.state.job.job_id, row.run_index) for rows in served.batches for row in rows)
    assert found == wanted
    for rows in served.batches:
        lengths = [len(row.run.token_ids) for row in rows]
        assert len(rows) <= bounds.max_rows
        assert len(rows) == 1 or len(rows) * max(lengths) <= bounds.max_tokens
        assert len(rows) == 1 or not any(row.state.job.solo for row in rows)
        assert max(lengths) <= 8 or max(lengths) < 2 * min(lengths), "padding wastes less than half"
