"""The worker over a real tiny model: events in order, faults and cancellations that stay where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import nn

from engine.jobs import PATIENCE, Gate, Mailbox, gated, job
from engine.models import counted, hooks_on, plain_logits, plain_model, resident
from families import family_named
from patchclamp_server.adapters.adapter import Adapter
from patchclamp_server.engine.execution import PreparedRun, execute_prepared
from patchclamp_server.engine.loading import Resident
from patchclamp_server.engine.messages import (
    EngineFailed,
    Event,
    Job,
    JobDone,
    JobFailed,
    Loaded,
    LogitsSpec,
    Progress,
    Project,
    ReadSpec,
    Report,
    RunFailed,
    RunFinished,
    RunOutput,
    RunSpec,
)
from patchclamp_server.engine.runner import Runner
from patchclamp_server.engine.scheduler import BatchLimits
from patchclamp_server.engine.worker import Worker
from patchclamp_server.errors import Cancelled, DeadlineExceeded, Error, FailedPrecondition, TooLarge, Unavailable
from patchclamp_server.hookpoints import Site

GPT2 = family_named("gpt2")
LOGITS = LogitsSpec()
GOOD = RunSpec((5, 17, 3, 40), logits=LOGITS)
OTHER = RunSpec((9, 33, 21), logits=LOGITS)
# The vector is one entry too long for the site; the front would have refused it.
BAD = RunSpec((8, 7, 6), reads=(ReadSpec(Site.RESID_POST, (1,), reduction=Project((torch.ones(1, 33),))),))


class Reports:
    """Takes the worker's reports."""

    def __init__(self) -> None:
        self.all: list[Report] = []
        self._settled = threading.Event()

    def __call__(self, report: Report) -> None:
        self.all.append(report)
        if not isinstance(report, Progress):
            self._settled.set()

    def settled(self) -> Report:
        """Loaded or EngineFailed."""
        assert self._settled.wait(PATIENCE)
        return next(report for report in self.all if not isinstance(report, Progress))


def model() -> Resident:
    return resident(GPT2)


def adapter() -> Adapter:
    return model().runner.adapter


def block(layer: int) -> nn.Module:
    return adapter().layout.blocks[layer].module


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker that serves."""
    one, reports = Worker(lambda progress: model(), BatchLimits(max_tokens=1024, max_rows=16)), Reports()
    one.start(reports)
    assert isinstance(reports.settled(), Loaded)
    yield one
    one.stop(PATIENCE)
    assert hooks_on(model().runner) == 0
    assert one.waiting == 0


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Holds every forward before block 0; the worker looks at its inbox right after."""
    with gated(block(0)) as one:
        yield one


def submit(worker: Worker, *runs: RunSpec, deadline: float | None = None) -> tuple[Job, Mailbox]:
    one, mailbox = job(runs=runs, deadline=deadline), Mailbox()
    worker.submit(one, mailbox)
    return one, mailbox


def hold(worker: Worker, gate: Gate) -> Mailbox:
    """Occupies the worker with a job of its own, until the gate is opened."""
    _, mailbox = submit(worker, GOOD)
    gate.await_arrival()
    return mailbox


def assert_logits(event: RunFinished, run: RunSpec) -> None:
    assert event.output.logits is not None
    assert event.output.logits.values is not None
    expected = plain_logits(plain_model(GPT2), run.token_ids)[-1:]
    torch.testing.assert_close(event.output.logits.values, expected, rtol=0, atol=2e-5)  # float32, alone or batched


def error_of(event: Event) -> Error:
    assert isinstance(event, JobFailed | RunFailed)
    return event.error


def settles(claim: Callable[[], bool]) -> bool:
    """Whether a claim about the worker's own bookkeeping comes true shortly after its last event."""
    limit = time.monotonic() + PATIENCE
    while not claim() and time.monotonic() < limit:
        time.sleep(0.001)
    return claim()


def test_a_job_ends_after_an_answer_to_each_run(worker: Worker) -> None:
    one, mailbox = submit(worker, GOOD, OTHER, GOOD)
    *answers, end = mailbox.wait()
    assert [type(answer) for answer in answers] == [RunFinished] * 3
    assert sorted(mailbox.finished) == [0, 1, 2]
    assert {event.job_id for event in answers} == {one.job_id}
    for index, run in enumerate((GOOD, OTHER, GOOD)):
        assert_logits(mailbox.finished[index], run)
    assert isinstance(end, JobDone)
    assert end.fingerprint == model().fingerprint
    assert end.queue_seconds >= 0 < end.engine_seconds
    assert settles(lambda: worker.waiting == 0)


def test_loading_is_told_before_serving() -> None:
    def load(progress: Callable[[Progress], None]) -> Resident:
        progress(Progress("loading weights", 0.5))
        return model()

    one, reports = Worker(load), Reports()
    one.start(reports)
    loaded = reports.settled()
    assert [type(report) for report in reports.all] == [Progress, Loaded]
    assert isinstance(loaded, Loaded)
    assert loaded.facts is model().facts
    one.stop(PATIENCE)


def test_jobs_submitted_while_loading_are_served_after_it() -> None:
    may_load = threading.Event()

    def load(_: Callable[[Progress], None]) -> Resident:
        assert may_load.wait(PATIENCE)
        return model()

    one = Worker(load)
    one.start(Reports())
    _, mailbox = submit(one, GOOD)
    assert one.waiting == 1
    may_load.set()
    assert isinstance(mailbox.end, JobDone)
    one.stop(PATIENCE)


def test_waiting_jobs_share_a_batch(worker: Worker, gate: Gate) -> None:
    hold(worker, gate)
    mailboxes = [submit(worker, run)[1] for run in (GOOD, OTHER, GOOD)]
    assert worker.waiting == 4
    with counted(block(1)) as batches:
        for _ in range(2):
            gate.let_go()
        for mailbox, run in zip(mailboxes, (GOOD, OTHER, GOOD), strict=True):
            assert_logits(mailbox.finished[0], run)
    assert [call.shape[0] for call in batches] == [1, 3]


def test_a_job_of_many_runs_does_not_hold_up_a_job_of_one(worker: Worker, gate: Gate) -> None:
    hold(worker, gate)
    order: list[int] = []
    _, large = submit(worker, *[GOOD] * 64)
    small = job(runs=[OTHER])
    worker.submit(small, lambda event: order.append(len(large.events)))
    for _ in range(1 + 5):  # the job that holds, and sixty-five rows by sixteen
        gate.let_go()
    large.wait()
    assert order[0] < 16, "answered with the first batch"


def test_a_queued_job_is_cancelled_without_running(worker: Worker, gate: Gate) -> None:
    first = hold(worker, gate)
    one, mailbox = submit(worker, OTHER)
    worker.cancel(one.job_id)
    with counted(block(1)) as batches:
        gate.let_go()
        assert isinstance(error_of(mailbox.end), Cancelled)
        assert mailbox.events == [mailbox.end]
        assert_logits(first.finished[0], GOOD)
    assert [call.shape[0] for call in batches] == [1]


def test_a_running_job_is_cancelled_between_blocks(worker: Worker, gate: Gate) -> None:
    one, mailbox = submit(worker, GOOD)
    gate.await_arrival()
    worker.cancel(one.job_id)
    with counted(block(1)) as batches:
        gate.let_go()
        assert isinstance(error_of(mailbox.end), Cancelled)
    assert not batches
    assert settles(lambda: worker.waiting == 0)


def test_the_next_job_is_right_after_a_cancelled_one(worker: Worker, gate: Gate) -> None:
    one, mailbox = submit(worker, GOOD)
    gate.await_arrival()
    worker.cancel(one.job_id)
    gate.let_go()
    mailbox.wait()
    _, after = submit(worker, OTHER)
    gate.let_go()
    assert_logits(after.finished[0], OTHER)


def test_a_cancelled_row_leaves_its_neighbours_in_the_batch_alone(worker: Worker, gate: Gate) -> None:
    hold(worker, gate)
    one, cancelled = submit(worker, GOOD)
    _, neighbour = submit(worker, OTHER)
    gate.let_go()
    gate.await_arrival()  # both are in the batch that runs now
    worker.cancel(one.job_id)
    gate.let_go()
    assert isinstance(error_of(cancelled.end), Cancelled)
    assert cancelled.events == [cancelled.end]
    assert_logits(neighbour.finished[0], OTHER)
    assert isinstance(neighbour.end, JobDone)


def test_cancelling_an_unknown_job_does_nothing(worker: Worker) -> None:
    worker.cancel(10**9)
    _, mailbox = submit(worker, GOOD)
    assert isinstance(mailbox.end, JobDone)


def test_cancelling_a_job_that_is_done_does_nothing(worker: Worker) -> None:
    one, mailbox = submit(worker, GOOD)
    mailbox.wait()
    worker.cancel(one.job_id)
    _, after = submit(worker, OTHER)
    assert isinstance(after.end, JobDone)
    assert [type(event) for event in mailbox.events] == [RunFinished, JobDone]


def test_a_job_whose_deadline_has_passed_does_not_run(worker: Worker) -> None:
    with counted(block(0)) as batches:
        _, mailbox = submit(worker, GOOD, deadline=time.monotonic() - 1)
        assert isinstance(error_of(mailbox.end), DeadlineExceeded)
    assert not batches


def test_a_running_job_ends_at_its_deadline_and_its_neighbour_goes_on(worker: Worker, gate: Gate) -> None:
    hold(worker, gate)
    deadline = time.monotonic() + PATIENCE
    one, late = submit(worker, GOOD, deadline=deadline)
    _, neighbour = submit(worker, OTHER)
    gate.let_go()
    gate.await_arrival()  # both run
    object.__setattr__(one, "deadline", time.monotonic() - 1)  # rather than sleep until it comes
    gate.let_go()
    assert isinstance(error_of(late.end), DeadlineExceeded)
    assert late.events == [late.end]
    assert_logits(neighbour.finished[0], OTHER)


def test_a_job_that_is_late_alone_frees_the_model_between_blocks(worker: Worker, gate: Gate) -> None:
    one, mailbox = submit(worker, GOOD, deadline=time.monotonic() + PATIENCE)
    gate.await_arrival()
    object.__setattr__(one, "deadline", time.monotonic() - 1)
    with counted(block(1)) as batches:
        gate.let_go()
        assert isinstance(error_of(mailbox.end), DeadlineExceeded)
    assert not batches


def test_a_run_that_fails_does_so_alone(worker: Worker, gate: Gate) -> None:
    """Beside runs of its own job and of others, in one batch."""
    hold(worker, gate)
    _, mixed = submit(worker, GOOD, BAD, OTHER)
    _, neighbour = submit(worker, OTHER)
    for _ in range(1 + 1 + 4):  # the job that holds, the batch, its four rows one by one
        gate.let_go()
    assert sorted(mixed.finished) == [0, 2]
    assert_logits(mixed.finished[0], GOOD)
    assert_logits(mixed.finished[2], OTHER)
    assert list(mixed.failed) == [1]
    assert isinstance(mixed.end, JobDone)
    assert_logits(neighbour.finished[0], OTHER)
    assert settles(lambda: worker.waiting == 0)


def test_a_failed_runs_error_tells_nothing_of_the_inside(worker: Worker) -> None:
    _, mailbox = submit(worker, BAD)
    error = mailbox.failed[0].error
    assert (type(error), error.reason, error.message) == (Error, "INTERNAL", "the engine failed on this run")


EXECUTE = "patchclamp_server.engine.worker.execute_prepared"


def raising(
    fault: Exception, when: Callable[[int], bool] = lambda rows: True
) -> Callable[..., tuple[RunOutput | Error, ...]]:
    """An `execute` that fails for batches of certain sizes."""

    def failing(
        runner: Runner, runs: Sequence[PreparedRun], check: Callable[[], None]
    ) -> tuple[RunOutput | Error, ...]:
        if when(len(runs)):
            raise fault
        return execute_prepared(runner, runs, check)

    return failing


def test_a_domain_error_reaches_the_caller_as_it_is(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FailedPrecondition("not with this model")
    monkeypatch.setattr(EXECUTE, raising(fault))
    _, mailbox = submit(worker, GOOD)
    assert mailbox.failed[0].error is fault


def test_a_batch_too_large_for_the_memory_runs_row_by_row(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXECUTE, raising(torch.OutOfMemoryError("full"), lambda rows: rows > 1))
    _, mailbox = submit(worker, GOOD, OTHER)
    assert_logits(mailbox.finished[0], GOOD)
    assert_logits(mailbox.finished[1], OTHER)


def test_a_run_too_large_for_the_memory_is_told_so(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXECUTE, raising(torch.OutOfMemoryError("full")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 1000))
    _, mailbox = submit(worker, GOOD)
    error = mailbox.failed[0].error
    assert isinstance(error, TooLarge)
    assert error.reason == "DEVICE_OUT_OF_MEMORY"
    assert error.metadata == {"limit": "1000", "demand": "900"}


def test_a_device_that_failed_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXECUTE, raising(RuntimeError("CUDA error: device-side assert triggered")))
    one, reports = Worker(lambda progress: model()), Reports()
    one.start(reports)
    reports.settled()
    for _ in range(2):
        _, mailbox = submit(one, GOOD, OTHER)
        error = error_of(mailbox.end)
        assert isinstance(error, Unavailable)
        assert error.reason == "ENGINE_FAILED"
    assert settles(lambda: one.waiting == 0)
    assert [type(report) for report in reports.all] == [Loaded, EngineFailed]
    one.stop(PATIENCE)


def test_a_model_that_cannot_be_loaded_fails_what_waits_and_what_comes() -> None:
    fault, may_fail = FailedPrecondition("no such model"), threading.Event()

    def load(_: Callable[[Progress], None]) -> Resident:
        assert may_fail.wait(PATIENCE)
        raise fault

    one, reports = Worker(load), Reports()
    one.start(reports)
    _, waits = submit(one, GOOD)
    may_fail.set()
    failed = reports.settled()
    assert isinstance(failed, EngineFailed)
    assert failed.error is fault
    _, comes = submit(one, GOOD)
    for mailbox in (waits, comes):
        error = error_of(mailbox.end)
        assert isinstance(error, Unavailable)
        assert error.reason == "ENGINE_FAILED"
    assert settles(lambda: one.waiting == 0)
    one.stop(PATIENCE)


def test_stop_ends_after_the_batch_that_runs_and_refuses_what_waits(gate: Gate) -> None:
    one, reports = Worker(lambda progress: model()), Reports()
    one.start(reports)
    reports.settled()
    running = hold(one, gate)
    _, waits = submit(one, OTHER)
    one.stop(0)
    gate.let_go()
    assert_logits(running.finished[0], GOOD)
    error = error_of(waits.end)
    assert isinstance(error, Unavailable)
    assert error.reason == "NOT_SERVING"
    assert settles(lambda: one.waiting == 0)


def test_stop_while_loading_refuses_what_waits() -> None:
    may_load = threading.Event()

    def load(_: Callable[[Progress], None]) -> Resident:
        assert may_load.wait(PATIENCE)
        return model()

    one = Worker(load)
    one.start(Reports())
    _, mailbox = submit(one, GOOD)
    one.stop(0)
    may_load.set()
    error = error_of(mailbox.end)
    assert isinstance(error, Unavailable)
    assert error.reason == "NOT_SERVING"
    one.stop(PATIENCE)


def test_a_job_that_comes_after_the_end_is_refused_at_once(worker: Worker) -> None:
    worker.stop(PATIENCE)
    _, late = submit(worker, OTHER)
    assert isinstance(late.end, JobFailed) and isinstance(late.end.error, Unavailable)
    assert worker.waiting == 0
