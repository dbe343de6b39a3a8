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
# How long a caller of a generation may take nothing, while a place in the cache is kept for it.
STALLED_SECONDS = 60.0

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

    def pause(self, job_id: int, *, paused: bool) -> None:
        """Withholds tokens from a generation, or goes on with it."""

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
        """A generation, like `submitted`. One whose caller is `backlog` events behind gets no more tokens until half of
        them are taken; it keeps its place in the cache, so a caller that takes none for long ends as Overloaded."""
        deadline, running = _deadline(seconds), RunningJob[SampleEvent](most=backlog)
        with self._admitted(running, result_bytes) as job_id:
            running.hold = lambda held: self._worker.pause(job_id, paused=held)
            running.give_up = lambda: self._worker.cancel(job_id)
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
    """The events of one job, one by one; `done` holds its last.

    `hold` is told when `most` events wait to be taken (None: it never is), and again when half of them are. What was
    under way then still comes. `give_up` is called when then none is taken for long.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._events: deque[E | JobDone | JobFailed] = deque()
        self._news = asyncio.Event()
        self._done: JobDone | None = None
        self._closed = False
        self._patience: asyncio.TimerHandle | None = None
        self.hold: Callable[[bool], None] = lambda held: None
        self.give_up: Callable[[], None] = lambda: None
        self.ended = False

    @property
    def done(self) -> JobDone:
        assert self._done is not None, "asked before the job was done"
        return self._done

    def put(self, event: E | JobDone | JobFailed) -> None:
        """Takes the next event."""
        if self._closed:
            return
        self._closed = isinstance(event, JobDone | JobFailed)
        self._events.append(event)
        self._news.set()
        if self._most is not None and len(self._events) >= self._most and self._patience is None and not self._closed:
            self.hold(True)
            self._patience = asyncio.get_running_loop().call_later(STALLED_SECONDS, self._give_up)

    def _give_up(self) -> None:
        """Ends the job of a caller that takes nothing, and drops what waits for it."""
        self._events.clear()
        # The call itself may be stuck in sending to that caller.
        self.give_up()
        text = (
            f"the caller is {self._most} messages behind and took none for {STALLED_SECONDS:.0f} s: read as they come"
        )
        self.put(JobFailed(0, Overloaded(text, retry_after=RETRY_AFTER)))

    def _taken(self) -> None:
        """Goes on with a job that was held, or is more patient with it: an event was taken."""
        if self._patience is None or self._most is None:
            return
        self._patience.cancel()
        self._patience = None
        if len(self._events) <= self._most // 2:
            self.hold(False)
        else:
            self._patience = asyncio.get_running_loop().call_later(STALLED_SECONDS, self._give_up)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        """The next event of a part of the job. Raises the job's error when the job as a whole failed."""
        while not self._events:
            self._news.clear()
            await self._news.wait()
        event = self._events.popleft()
        self._taken()
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
