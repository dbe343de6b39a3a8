"""Jobs in flight: what the worker's thread says of each reaches the call that waits for it, on the event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, Self

from patchclamp_server.engine.messages import Event, Job, JobDone, JobFailed, Report, RunFailed, RunFinished, RunSpec
from patchclamp_server.errors import Error, Overloaded

RETRY_AFTER = 1.0


class Worker(Protocol):
    """What the front needs of the worker: messages there and back. `submit` and `cancel` may come from any thread;
    `report` and `emit` are called on the worker's own."""

    @property
    def waiting(self) -> int:
        """Jobs not yet answered."""

    def start(self, report: Callable[[Report], None]) -> None:
        """Loads, then serves: reports Progress, then Loaded, or EngineFailed, also when it fails later."""

    def submit(self, job: Job, emit: Callable[[Event], None]) -> None:
        """Emits an event per run, then JobDone; or JobFailed."""

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
        self._open: dict[int, asyncio.Queue[Event]] = {}

    @contextmanager
    def submitted(
        self, runs: Sequence[RunSpec], *, seconds: float | None, solo: bool, result_bytes: int
    ) -> Iterator[RunningJob]:
        """A job that is cancelled when the block is left before its end: by an error, or by the caller's going.

        `seconds` are left until the deadline. `result_bytes` count as waiting until the block is left: a caller that
        reads slowly, or not at all, has the server hold them. Raises Overloaded when too much waits already.
        """
        self._admit(result_bytes)
        job_id = next(self._ids)
        deadline = None if seconds is None else time.monotonic() + seconds
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            # A loop that is closed has nobody left who would want to know.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        self._open[job_id] = events
        self._waiting_bytes += result_bytes
        running = RunningJob(events)
        try:
            self._worker.submit(Job(job_id, tuple(runs), deadline, solo), emit)
            yield running
        finally:
            del self._open[job_id]
            self._waiting_bytes -= result_bytes
            if not running.ended:
                self._worker.cancel(job_id)

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
        for job_id, events in self._open.items():
            events.put_nowait(JobFailed(job_id, error))


class RunningJob:
    """The events of one job, run by run; `done` holds its last."""

    def __init__(self, events: asyncio.Queue[Event]) -> None:
        self._events = events
        self._done: JobDone | None = None
        self.ended = False

    @property
    def done(self) -> JobDone:
        assert self._done is not None, "asked before the job was done"
        return self._done

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RunFinished | RunFailed:
        """The next run that ended. Raises the job's error when the job as a whole failed."""
        event = await self._events.get()
        match event:
            case JobDone():
                self._done, self.ended = event, True
                raise StopAsyncIteration
            case JobFailed(error=error):
                self.ended = True
                raise error
            case _:
                return event
