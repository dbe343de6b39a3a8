"""The worker: one thread that owns the model and its device. Everybody else talks to it by messages.

It loads and proves the model, then serves: takes what came in, forms a batch, runs it, answers each run. Between the
blocks of a forward it looks at its inbox again, so a cancellation or a passed deadline frees the device within one
block; a forward is abandoned only when every row in it is dead, a dead row among live ones ends with the batch.

A run that fails does so alone: when a batch of several fails, its rows run again one by one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from patchclamp_server.engine.execution import execute
from patchclamp_server.engine.loading import Resident
from patchclamp_server.engine.messages import (
    EngineFailed,
    Event,
    Job,
    JobDone,
    JobFailed,
    Loaded,
    Progress,
    Report,
    RunFailed,
    RunFinished,
    RunOutput,
)
from patchclamp_server.engine.scheduler import BatchLimits, JobState, Row, Scheduler
from patchclamp_server.errors import Cancelled, DeadlineExceeded, Error, TooLarge, Unavailable

_log = logging.getLogger(__name__)

Load = Callable[[Callable[[Progress], None]], Resident]


class _Abandoned(Exception):
    """Every row of the running batch is dead."""


@dataclass(frozen=True, eq=False)
class _Submit:
    job: Job
    emit: Callable[[Event], None]


@dataclass(frozen=True)
class _Cancel:
    job_id: int


@dataclass(frozen=True)
class _Stop:
    pass


_Message = _Submit | _Cancel | _Stop


class Worker:
    """Runs jobs on one model. `submit` and `cancel` may be called from any thread and return at once.

    `load` gives the resident model, telling its progress. Events of a job and reports are handed over on the worker's
    own thread and must not block it.
    """

    def __init__(self, load: Load, limits: BatchLimits | None = None) -> None:
        self._load = load
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._scheduler = Scheduler(limits or BatchLimits())
        self._stopping = False
        # Held while a message goes in, so that none does after the thread has looked for the last time.
        self._gate = threading.Lock()
        self._closed = False
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, report: Callable[[Report], None]) -> None:
        """Loads the model and begins to serve; `report` gets Progress, then Loaded, or EngineFailed at any time."""
        self._thread = threading.Thread(target=self._main, args=(report,), name="patchclamp-worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job, emit: Callable[[Event], None]) -> None:
        """Hands over a job. Ends in JobDone after an answer to each run, or in JobFailed."""
        if not self._post(_Submit(job, emit)):
            emit(JobFailed(job.job_id, self._refusal()))

    def cancel(self, job_id: int) -> None:
        """Ends a job early: JobFailed follows once the engine has let go of it. Unknown jobs are ignored."""
        self._post(_Cancel(job_id))

    def stop(self, timeout: float) -> None:
        """Ends the thread after the batch that runs; whatever still waits fails as unavailable."""
        self._post(_Stop())
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def waiting(self) -> int:
        """Jobs not yet answered."""
        return len(self._scheduler.jobs) + self._inbox.qsize()

    def _post(self, message: _Message) -> bool:
        """Whether the thread will still read it."""
        with self._gate:
            if not self._closed:
                self._inbox.put(message)
            return not self._closed

    def _main(self, report: Callable[[Report], None]) -> None:
        self._serve(report)
        with self._gate:
            self._closed = True
        self._take_messages(block=False)
        self._refuse_all()

    def _serve(self, report: Callable[[Report], None]) -> None:
        try:
            resident = self._load(report)
        except Exception as fault:
            self._fail(fault, report)
            return
        report(Loaded(resident.facts, resident.tokenizer))
        try:
            while not self._stopping:
                self._take_messages(block=not self._scheduler.jobs)
                if not self._stopping:
                    self._step(resident)
        except Exception as fault:
            _log.exception("the engine cannot go on")
            self._fail(fault, report)

    def _fail(self, fault: BaseException, report: Callable[[Report], None]) -> None:
        self._failed = fault
        self._refuse_all()
        report(EngineFailed(fault))
        while not self._stopping:
            self._take_messages(block=True)
            self._refuse_all()

    def _refuse_all(self) -> None:
        for state in list(self._scheduler.jobs.values()):
            self._end(state, self._refusal())

    def _refusal(self) -> Unavailable:
        reason = "ENGINE_FAILED" if self._failed else "NOT_SERVING"
        return Unavailable("the engine stopped before this request was done", reason=reason)

    def _take_messages(self, *, block: bool) -> None:
        while block or self._inbox.qsize():
            block = False
            match self._inbox.get():
                case _Submit(job, emit):
                    self._scheduler.add(job, emit)
                case _Cancel(job_id):
                    state = self._scheduler.jobs.get(job_id)
                    if state is not None:
                        state.cancelled = True
                case _Stop():
                    self._stopping = True

    def _step(self, resident: Resident) -> None:
        """One batch, if anything waits."""
        self._bury()
        rows = self._scheduler.next_batch()
        if rows:
            self._run(resident, rows)
            self._bury()

    def _bury(self) -> None:
        """Ends the jobs that nobody waits for any more."""
        for state in [state for state in self._scheduler.jobs.values() if state.dead]:
            late = DeadlineExceeded("the deadline passed before the request was done")
            self._end(state, Cancelled("cancelled by the caller") if state.cancelled else late)

    def _run(self, resident: Resident, rows: Sequence[Row]) -> None:
        began = time.monotonic()
        states = {id(row.state): row.state for row in rows}.values()
        for state in states:
            state.started = state.started or began
        try:
            outputs = execute(resident.runner, [row.run for row in rows], lambda: self._check(rows))
        except _Abandoned:
            return
        except Exception as fault:
            _raise_if_fatal(fault)
            self._recover(resident, rows, fault)
            return
        seconds = time.monotonic() - began
        for state in states:
            state.engine_seconds += seconds
        for row, output in zip(rows, outputs, strict=True):
            self._answer(resident, row, output)

    def _check(self, rows: Sequence[Row]) -> None:
        """Called between blocks."""
        if self._inbox.qsize():
            self._take_messages(block=False)
        if all(row.state.dead for row in rows):
            raise _Abandoned

    def _recover(self, resident: Resident, rows: Sequence[Row], fault: Exception) -> None:
        """After a failed batch: empties the cache and runs its rows one by one, so that the faulty one fails alone."""
        if isinstance(fault, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        if len(rows) == 1:
            self._answer(resident, rows[0], _as_error(fault, rows[0]))
            return
        for row in rows:
            if not row.state.dead:
                self._run(resident, [row])

    def _answer(self, resident: Resident, row: Row, result: RunOutput | Error) -> None:
        state, job_id = row.state, row.state.job.job_id
        if state.dead:
            return
        if isinstance(result, Error):
            state.emit(RunFailed(job_id, row.run_index, result))
        else:
            state.emit(RunFinished(job_id, row.run_index, result))
        state.unanswered -= 1
        if not state.unanswered:
            self._scheduler.remove(job_id)
            queued = (state.started or state.submitted) - state.submitted
            state.emit(JobDone(job_id, queued, state.engine_seconds, resident.fingerprint))

    def _end(self, state: JobState, error: Error) -> None:
        self._scheduler.remove(state.job.job_id)
        state.emit(JobFailed(state.job.job_id, error))


def _as_error(fault: Exception, row: Row) -> Error:
    if isinstance(fault, Error):
        return fault
    if isinstance(fault, torch.OutOfMemoryError):
        free, total = torch.cuda.mem_get_info()
        return TooLarge(
            "device memory ran out: bytes in use", limit=total, demand=total - free, reason="DEVICE_OUT_OF_MEMORY"
        )
    _log.error("run %d of job %d failed", row.run_index, row.state.job.job_id, exc_info=fault)
    return Error("the engine failed on this run")


def _raise_if_fatal(fault: Exception) -> None:
    """A CUDA context that reported an error other than lack of memory answers nothing any more."""
    if isinstance(fault, RuntimeError) and not isinstance(fault, torch.OutOfMemoryError) and "CUDA error" in str(fault):
        raise fault
