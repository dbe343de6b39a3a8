"""Jobs in flight: what the worker's thread says of each reaches the call that waits for it, on the event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, Self, TypeVar

from patchclamp_server.engine.messages import (
    Event,
    GenerationEvent,
    GenerationJob,
    GenerationSpec,
    Job,
    JobDone,
    JobFailed,
    Report,
    RunFailed,
    RunFinished,
    RunSpec,
    SampleEnded,
    SampleFailed,
    TokenGenerated,
)
from patchclamp_server.errors import Error, Overloaded

RETRY_AFTER = 1.0

RunEvent = RunFinished | RunFailed
SampleEvent = TokenGenerated | SampleEnded | SampleFailed
E = TypeVar("E", RunEvent, SampleEvent)


class Worker(Protocol):
    """What the front needs of the worker: messages there and back. `submit`, `generate` and `cancel` may come from any
    thread; `report` and `emit` are called on the worker's own."""

    @property
    def waiting(self) -> int:
        """Jobs not yet answered."""

    def start(self, report: Callable[[Report], None]) -> None:
        """Loads, then serves: reports Progress, then Loaded, or EngineFailed, also when it fails later."""

    def submit(self, job: Job, emit: Callable[[Event], None]) -> None:
        """Emits an event per run, then JobDone; or JobFailed."""

    def generate(self, job: GenerationJob, emit: Callable[[GenerationEvent], None]) -> None:
        """Emits tokens and the end of each sample, then JobDone; or JobFailed at any time."""

    def cancel(self, job_id: int) -> None:
        """Ends a job with JobFailed; nothing happens when it has ended already."""

    def stop(self, timeout: float) -> None:
        """Ends the worker's thread."""


class Jobs:
    """Submits jobs to the worker and routes its events back. Belongs to one event loop."""

    def __init__(self, worker: Worker, max_waiting: int, max_waiting_bytes: int) -> None:
        self._worker = worker
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._ids = itertools.count(1)
        self._open: dict[int, RunningJob[Any]] = {}

    @contextmanager
    def submitted(
        self, runs: Sequence[RunSpec], *, seconds: float | None, solo: bool, result_bytes: int
    ) -> Iterator[RunningJob[RunEvent]]:
        """A job that is cancelled when the block is left before its end: by an error, or by the caller's going.

        `seconds` are left until the deadline. `result_bytes` count as waiting until the block is left: a caller that
        reads slowly, or not at all, has the server hold them. Raises Overloaded when too much waits already.
        """
        deadline, running = _deadline(seconds), RunningJob[RunEvent](most=None)
        with self._admitted(running, result_bytes) as job_id:
            self._worker.submit(Job(job_id, tuple(runs), deadline, solo), self._emit_to(running))
            yield running

    @contextmanager
    def generating(
        self, spec: GenerationSpec, *, seconds: float | None, solo: bool, result_bytes: int, backlog: int
    ) -> Iterator[RunningJob[SampleEvent]]:
        """A generation, like `submitted`. One whose caller is more than `backlog` events behind ends as Overloaded:
        the engine does not wait for anybody, and what nobody takes has to be held."""
        deadline, running = _deadline(seconds), RunningJob[SampleEvent](most=backlog)
        with self._admitted(running, result_bytes) as job_id:
            running.on_excess = lambda: self._worker.cancel(job_id)
            self._worker.generate(GenerationJob(job_id, spec, deadline, solo), self._emit_to(running))
            yield running

    @contextmanager
    def _admitted(self, running: RunningJob[Any], result_bytes: int) -> Iterator[int]:
        """The id of a job, for as long as it is in flight."""
        self._admit(result_bytes)
        job_id = next(self._ids)
        self._open[job_id] = running
        self._waiting_bytes += result_bytes
        try:
            yield job_id
        finally:
            del self._open[job_id]
            self._waiting_bytes -= result_bytes
            if not running.ended:
                self._worker.cancel(job_id)

    def _emit_to(self, running: RunningJob[Any]) -> Callable[[Any], None]:
        """Takes events on the worker's thread."""
        loop = asyncio.get_running_loop()

        def emit(event: Any) -> None:
            # A loop that is closed has nobody left who would want to know.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(running.put, event)

        return emit

    def _admit(self, result_bytes: int) -> None:
        if self._worker.waiting >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} requests are waiting already", retry_after=RETRY_AFTER)
        # Without others to wait for, a request would be told to retry for ever.
        # Nor does one that brings no bytes have anything to wait for.
        full = self._waiting_bytes + result_bytes > self._max_waiting_bytes
        if full and self._waiting_bytes and result_bytes:
            text = f"{self._waiting_bytes:,} bytes of results are waiting to be sent already"
            raise Overloaded(text, retry_after=RETRY_AFTER)

    def fail(self, error: Error) -> None:
        """Ends every job in flight: the worker will not answer any more."""
        for job_id, running in self._open.items():
            running.put(JobFailed(job_id, error))


class RunningJob(Generic[E]):
    """The events of one job, one by one; `done` holds its last. At most `most` wait to be taken, None: any number."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._events: deque[E | JobDone | JobFailed] = deque()
        self._news = asyncio.Event()
        self._done: JobDone | None = None
        self._closed = False
        self.on_excess: Callable[[], None] = lambda: None
        self.ended = False

    @property
    def done(self) -> JobDone:
        assert self._done is not None, "asked before the job was done"
        return self._done

    def put(self, event: E | JobDone | JobFailed) -> None:
        """Takes the next event. With too many that nobody has taken, the job ends and these are dropped."""
        if self._closed:
            return
        if isinstance(event, JobDone | JobFailed):
            self._closed = True
        elif self._most is not None and len(self._events) >= self._most:
            self._closed = True
            self._events.clear()
            text = f"the caller is more than {self._most} messages behind: read them as they come, or ask for less"
            event = JobFailed(0, Overloaded(text, retry_after=RETRY_AFTER))
            self.on_excess()
        self._events.append(event)
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        """The next event of a part of the job. Raises the job's error when the job as a whole failed."""
        while not self._events:
            self._news.clear()
            await self._news.wait()
        event = self._events.popleft()
        match event:
            case JobDone():
                self._done, self.ended = event, True
                raise StopAsyncIteration
            case JobFailed(error=error):
                self.ended = True
                raise error
            case _:
                return event


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds
