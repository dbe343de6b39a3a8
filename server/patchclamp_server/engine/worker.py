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
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from patchclamp_server.engine.decoding import Decoder, DecodingLimits
from patchclamp_server.engine.execution import PreparedRun, execute_prepared, prepare
from patchclamp_server.engine.faults import Abandoned, as_error, make_room, raise_if_fatal
from patchclamp_server.engine.generations import Generation, Generations
from patchclamp_server.engine.loading import Resident
from patchclamp_server.engine.messages import (
    EngineFailed,
    Event,
    GenerationEvent,
    GenerationJob,
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
from patchclamp_server.errors import Cancelled, DeadlineExceeded, Error, FailedPrecondition, Unavailable

_log = logging.getLogger(__name__)

# How often paused generations are looked after, when nothing else is to be done.
_PAUSED_SECONDS = 0.1

Load = Callable[[Callable[[Progress], None]], Resident]


@dataclass(frozen=True, eq=False)
class _Submit:
    job: Job
    emit: Callable[[Event], None]


@dataclass(frozen=True, eq=False)
class _Generate:
    job: GenerationJob
    emit: Callable[[GenerationEvent], None]


@dataclass(frozen=True)
class _Cancel:
    job_id: int


@dataclass(frozen=True)
class _Pause:
    job_id: int
    paused: bool


@dataclass(frozen=True)
class _Stop:
    pass


_Message = _Submit | _Generate | _Cancel | _Pause | _Stop


class Worker:
    """Runs jobs on one model. `submit` and `cancel` may be called from any thread and return at once.

    `load` gives the resident model, telling its progress. Events of a job and reports are handed over on the worker's
    own thread and must not block it.
    """

    def __init__(self, load: Load, limits: BatchLimits | None = None, decoding: DecodingLimits | None = None) -> None:
        self._load = load
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._scheduler = Scheduler(limits or BatchLimits())
        self._decoding = decoding or DecodingLimits()
        self._generations: Generations | None = None
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

    def generate(self, job: GenerationJob, emit: Callable[[GenerationEvent], None]) -> None:
        """Hands over a generation. Ends in JobDone after the end of each sample, or in JobFailed."""
        if not self._post(_Generate(job, emit)):
            emit(JobFailed(job.job_id, self._refusal()))

    def pause(self, job_id: int, *, paused: bool) -> None:
        """Withholds tokens from a generation whose caller does not keep up, or goes on with it."""
        self._post(_Pause(job_id, paused))

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
        return len(self._scheduler.jobs) + len(self._open) + self._inbox.qsize()

    @property
    def _open(self) -> dict[int, Generation]:
        return self._generations.open if self._generations is not None else {}

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
        decoder = Decoder(resident.runner, self._decoding, shared=not resident.facts.no_slots_reason)
        self._generations = Generations(resident.runner, resident.tokenizer, decoder, resident.fingerprint)
        report(Loaded(resident.facts, resident.tokenizer))
        try:
            while not self._stopping:
                self._take_messages(block=not self._busy)
                if not self._stopping:
                    self._step(resident)
        except Exception as fault:
            _log.exception("the engine cannot go on")
            self._fail(fault, report)

    def _fail(self, fault: BaseException, report: Callable[[Report], None]) -> None:
        self._failed = fault
        try:
            self._refuse_all()
        finally:
            report(EngineFailed(fault))
        while not self._stopping:
            self._take_messages(block=True)
            self._refuse_all()

    def _refuse_all(self) -> None:
        for state in list(self._scheduler.jobs.values()):
            self._end(state, self._refusal())
        if self._generations is not None:
            self._generations.refuse_all(self._refusal())

    def _refusal(self) -> Unavailable:
        reason = "ENGINE_FAILED" if self._failed else "NOT_SERVING"
        return Unavailable("the engine stopped before this request was done", reason=reason)

    @property
    def _busy(self) -> bool:
        return bool(self._scheduler.jobs) or (self._generations is not None and self._generations.busy)

    def _take_messages(self, *, block: bool) -> None:
        """What came in. `block` waits for a message; not for long where paused generations may die meanwhile."""
        while block or self._inbox.qsize():
            try:
                message = self._inbox.get(timeout=_PAUSED_SECONDS if self._open else None)
            except Empty:
                return
            block = False
            match message:
                case _Submit(job, emit):
                    self._scheduler.add(job, emit)
                case _Generate(job, emit):
                    if self._generations is None:
                        emit(JobFailed(job.job_id, self._refusal()))
                    else:
                        self._generations.add(job, emit)
                case _Cancel(job_id):
                    state = self._scheduler.jobs.get(job_id) or self._open.get(job_id)
                    if state is not None:
                        state.cancelled = True
                case _Pause(job_id, paused):
                    if job_id in self._open:
                        self._open[job_id].paused = paused
                case _Stop():
                    self._stopping = True

    def _step(self, resident: Resident) -> None:
        """One forward for those that generate and one batch of runs, of each if anything waits."""
        self._bury()
        decoding = self._generations is not None and self._generations.busy
        if decoding:
            self._advance()
        # A batch of runs is as long as a chunk of prompts while others wait for their tokens.
        rows = self._scheduler.next_batch(self._decoding.chunk_tokens if decoding else None)
        if rows:
            self._run(resident, rows)
            self._bury()

    def _bury(self) -> None:
        """Ends the jobs that nobody waits for any more."""
        for state in [state for state in self._scheduler.jobs.values() if state.dead]:
            self._end(state, _gone(cancelled=state.cancelled))
        for generation in [generation for generation in self._open.values() if generation.dead]:
            self._end_generation(generation, _gone(cancelled=generation.cancelled))

    def _advance(self) -> None:
        assert self._generations is not None
        with suppress(Abandoned):
            self._generations.advance(self._check_generations)

    def _check_generations(self) -> None:
        """Called between blocks."""
        if self._inbox.qsize():
            self._take_messages(block=False)
        if all(generation.dead for generation in self._open.values()):
            raise Abandoned

    def _run(self, resident: Resident, rows: Sequence[Row]) -> None:
        began = time.monotonic()
        states = {id(row.state): row.state for row in rows}.values()
        for state in states:
            state.started = state.started or began
        prepared = self._prepare(resident, rows)
        rows = tuple(prepared)
        if not rows:
            return
        try:
            outputs = execute_prepared(resident.runner, [*prepared.values()], lambda: self._check(rows))
        except Abandoned:
            return
        except Exception as fault:
            raise_if_fatal(fault)
            self._recover(resident, rows, fault)
            return
        seconds = time.monotonic() - began
        for state in states:
            state.engine_seconds += seconds
        for row, output in zip(rows, outputs, strict=True):
            self._answer(resident, row, output)

    def _prepare(self, resident: Resident, rows: Sequence[Row]) -> dict[Row, PreparedRun]:
        """The rows that can run. Those whose edits cannot be compiled are answered, and concern no other."""
        prepared = {}
        for row in rows:
            try:
                prepared[row] = prepare(resident.runner, row.run, row.state.exchange, row.run_index)
            except Exception as fault:
                raise_if_fatal(fault)
                self._answer(resident, row, as_error(fault, _named(row)))
        return prepared

    def _check(self, rows: Sequence[Row]) -> None:
        """Called between blocks."""
        if self._inbox.qsize():
            self._take_messages(block=False)
        if all(row.state.dead for row in rows):
            raise Abandoned

    def _recover(self, resident: Resident, rows: Sequence[Row], fault: Exception) -> None:
        """After a failed batch: empties the cache and runs its rows one by one, so that the faulty one fails alone."""
        make_room(fault)
        if len(rows) == 1:
            self._answer(resident, rows[0], as_error(fault, _named(rows[0])))
            return
        for row in rows:
            if not row.state.dead:
                self._run(resident, [row])

    def _answer(self, resident: Resident, row: Row, result: RunOutput | Error) -> None:
        state, job_id = row.state, row.state.job.job_id
        if state.dead:
            return
        if isinstance(result, Error):
            self._fail_run(row, result)
        else:
            state.emit(RunFinished(job_id, row.run_index, result))
            state.unanswered -= 1
            state.pending.extend(state.exchange.finish(row.run_index))
        if not state.unanswered:
            self._scheduler.remove(job_id)
            queued = (state.started or state.submitted) - state.submitted
            state.emit(JobDone(job_id, queued, state.engine_seconds, resident.fingerprint))

    def _fail_run(self, row: Row, error: Error) -> None:
        """Answers a failed run, and those that wait for its values."""
        state, job_id = row.state, row.state.job.job_id
        dependants = state.exchange.fail(row.run_index)
        state.emit(RunFailed(job_id, row.run_index, error))
        for index in dependants:
            text = f"it takes values from runs[{row.run_index}], which failed: {error.message}"
            metadata = {"source_run": str(row.run_index)}
            unmet = FailedPrecondition(text, reason="SOURCE_RUN_FAILED", metadata=metadata)
            state.emit(RunFailed(job_id, index, unmet))
        state.unanswered -= 1 + len(dependants)

    def _end_generation(self, generation: Generation, error: Error) -> None:
        assert self._generations is not None
        self._generations.end(generation, error)

    def _end(self, state: JobState, error: Error) -> None:
        self._scheduler.remove(state.job.job_id)
        state.emit(JobFailed(state.job.job_id, error))


def _named(row: Row) -> str:
    return f"run {row.run_index} of job {row.state.job.job_id}"


def _gone(*, cancelled: bool) -> Error:
    """Why nobody waits any more."""
    late = DeadlineExceeded("the deadline passed before the request was done")
    return Cancelled("cancelled by the caller") if cancelled else late
