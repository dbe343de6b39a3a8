"""Jobs for the scheduler and the worker, and a mailbox for what comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from torch import nn

from patchclamp_server.engine.messages import Event, Job, JobDone, JobFailed, RunFailed, RunFinished, RunSpec

PATIENCE = 30.0  # seconds; nothing here takes one
_ids = count(1)


def job(
    lengths: Sequence[int] = (5,),
    *,
    runs: Sequence[RunSpec] = (),
    deadline: float | None = None,
    solo: bool = False,
) -> Job:
    """A job of runs of these lengths, or of these runs."""
    specs = tuple(runs) or tuple(RunSpec(tuple(range(1, length + 1))) for length in lengths)
    return Job(next(_ids), specs, deadline, solo)


class Mailbox:
    """Takes the events of one job; the test waits for its end."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, JobDone | JobFailed):
            self._ended.set()

    def wait(self) -> list[Event]:
        """All events, once the job has ended."""
        assert self._ended.wait(PATIENCE), "the job did not end"
        return self.events

    @property
    def end(self) -> Event:
        return self.wait()[-1]

    @property
    def finished(self) -> dict[int, RunFinished]:
        """The runs that were answered."""
        return {event.run_index: event for event in self.wait() if isinstance(event, RunFinished)}

    @property
    def failed(self) -> dict[int, RunFailed]:
        return {event.run_index: event for event in self.wait() if isinstance(event, RunFailed)}


class Gate:
    """Holds every forward at a module until the test lets it go on."""

    def __init__(self) -> None:
        self._arrived = threading.Semaphore(0)
        self._open = threading.Semaphore(0)

    def await_arrival(self) -> None:
        assert self._arrived.acquire(timeout=PATIENCE), "no forward arrived"

    def let_go(self) -> None:
        self._open.release()

    def hold(self, *_: object) -> None:
        self._arrived.release()
        assert self._open.acquire(timeout=PATIENCE), "nobody opened the gate"


@contextmanager
def gated(module: nn.Module) -> Iterator[Gate]:
    """A gate before a module. The runner's own hooks come after it."""
    gate = Gate()
    handle = module.register_forward_pre_hook(gate.hold)
    try:
        yield gate
    finally:
        handle.remove()
        for _ in range(1000):  # whatever still waits there goes on
            gate.let_go()
