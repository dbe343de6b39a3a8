"""Which rows form a batch: of one bucket, within the limits, in fair turns."""

from __future__ import annotations

import pytest

from engine.jobs import job
from patchclamp_server.engine.messages import Job
from patchclamp_server.engine.scheduler import BatchLimits, Row, Scheduler

Batch = list[tuple[int, int]]


def scheduler(*jobs: Job, tokens: int = 8192, rows: int = 64) -> Scheduler:
    waiting = Scheduler(BatchLimits(tokens, rows))
    for one in jobs:
        waiting.add(one, lambda event: None)
    return waiting


def named(rows: tuple[Row, ...]) -> Batch:
    """(job, run) of every row."""
    return [(row.state.job.job_id, row.run_index) for row in rows]


def batches(waiting: Scheduler) -> list[Batch]:
    """All batches, one after the other."""
    found = []
    while rows := waiting.next_batch():
        found.append(named(rows))
    return found


def test_rows_of_different_callers_share_a_batch() -> None:
    one, two = job([5]), job([7, 6])
    assert batches(scheduler(one, two)) == [[(one.job_id, 0), (two.job_id, 0), (two.job_id, 1)]]


def test_callers_take_turns_row_by_row() -> None:
    one, two = job([5] * 4), job([5] * 2)
    first, *_ = batches(scheduler(one, two, rows=4))
    assert first == [(one.job_id, 0), (two.job_id, 0), (one.job_id, 1), (two.job_id, 1)]


@pytest.mark.parametrize(("length", "other", "together"), [
    (1, 8, True), (8, 9, False), (9, 16, True), (16, 17, False), (33, 64, True), (64, 65, False), (5, 500, False),
])  # fmt: skip
def test_rows_share_a_batch_when_their_lengths_round_up_to_the_same_power_of_two(
    length: int, other: int, together: bool
) -> None:
    assert len(batches(scheduler(job([length]), job([other])))) == (1 if together else 2)


def test_a_batch_is_bounded_in_rows() -> None:
    assert [len(batch) for batch in batches(scheduler(job([5] * 10), rows=4))] == [4, 4, 2]


def test_a_batch_is_bounded_in_padded_tokens() -> None:
    assert [len(batch) for batch in batches(scheduler(job([9, 9, 9, 16, 9]), tokens=40))] == [3, 2]


def test_a_row_beyond_the_limit_runs_alone_rather_than_never() -> None:
    assert [len(batch) for batch in batches(scheduler(job([100, 100]), tokens=40))] == [1, 1]


def test_rows_passed_over_come_first_next_time() -> None:
    short, long = job([5, 5]), job([20])
    waiting = scheduler(short, long, rows=1)
    assert named(waiting.next_batch()) == [(short.job_id, 0)]
    assert named(waiting.next_batch()) == [(long.job_id, 0)]


def test_a_solo_run_has_a_batch_of_its_own() -> None:
    solo, other = job([5, 5], solo=True), job([5])
    found = batches(scheduler(solo, other))
    assert sorted(map(len, found)) == [1, 1, 1]


def test_a_solo_run_does_not_stop_others_from_sharing() -> None:
    found = batches(scheduler(job([5]), job([5], solo=True), job([5])))
    assert sorted(map(len, found)) == [1, 2]


@pytest.mark.parametrize("length", [5, 20])
def test_a_job_of_many_runs_delays_a_job_of_one_by_one_batch_at_most(length: int) -> None:
    """Whether it can share the batch (5) or not (20), and whenever it comes."""
    for served_before in range(5):
        large, small = job([5] * 256), job([length])
        waiting = scheduler(large, rows=8)
        for _ in range(served_before):
            waiting.next_batch()
        waiting.add(small, lambda event: None)
        found = batches(waiting)
        assert (small.job_id, 0) in [row for batch in found[:2] for row in batch]


def test_many_large_jobs_advance_together() -> None:
    jobs = [job([5] * 12) for _ in range(3)]
    found = batches(scheduler(*jobs, rows=6))
    for number, batch in enumerate(found):
        assert {one: sum(1 for owner, _ in batch if owner == one) for one in {owner for owner, _ in batch}} == {
            one.job_id: 2 for one in jobs
        }, number


def test_a_removed_job_is_not_served() -> None:
    gone, stays = job([5]), job([5])
    waiting = scheduler(gone, stays)
    waiting.remove(gone.job_id)
    waiting.remove(gone.job_id)
    assert batches(waiting) == [[(stays.job_id, 0)]]


def test_nothing_waits_at_first() -> None:
    assert scheduler().next_batch() == ()
