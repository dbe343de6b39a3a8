"""A server with the bundled model, in a process of its own."""

from __future__ import annotations

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import IO

from patchclamp._config import environment_of_a_server

COMMAND = (sys.executable, "-m", "patchclamp_server", "--demo", "--port", "0", "--metrics-port", "off")
READY_WITHIN = 300.0
STOP_WITHIN = 40.0

_READY = re.compile(r"patchclamp-server ready on (\S+) \(model (.+)\)")
_NEEDED = ("patchclamp_server", "torch", "transformers", "pydantic", "grpc_health", "prometheus_client")


class DemoServerError(Exception):
    """The server cannot be started; the message says why and what to do."""


@contextmanager
def demo_server(progress: Callable[[float, str], None]) -> Iterator[str]:
    """The address of a server that lives as long as the block. `progress` gets seconds waited and the latest news."""
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise DemoServerError(
            f"the server is not installed here ({', '.join(missing)} missing): pip install 'patchclamp[server]'"
        )
    with _signals_end_the_block():
        process = subprocess.Popen(  # noqa: S603 (a constant command)
            COMMAND,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment_of_a_server(),
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        with process:  # closes its pipes
            try:
                yield _address(process, progress)
            finally:
                _stop(process)


def _address(process: subprocess.Popen[str], progress: Callable[[float, str], None]) -> str:
    """Waits for the line that says where the server listens."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    log: deque[str] = deque(maxlen=20)
    assert process.stdout is not None and process.stderr is not None
    logging = _follow(process.stderr, log.append)
    _follow(process.stdout, lines.put, at_end=lambda: lines.put(None))
    start = time.monotonic()
    while (waited := time.monotonic() - start) < READY_WITHIN:
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            progress(waited, log[-1] if log else "")
            continue
        if line is None:
            logging.join(timeout=5)
            raise DemoServerError("\n".join(["the server ended before it was ready:", *list(log)[-8:]]))
        if ready := _READY.match(line):
            return ready[1]
    raise DemoServerError(f"the server was not ready within {READY_WITHIN:.0f} seconds")


def _follow(
    stream: IO[str], take: Callable[[str], None], at_end: Callable[[], None] = lambda: None
) -> threading.Thread:
    """Reads a stream to its end beside everything else, so that its writer never blocks."""

    def read() -> None:
        for line in stream:
            take(line.rstrip("\n"))
        at_end()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _signals_end_the_block() -> Iterator[None]:
    """A signal that would end this process in an instant leaves the block instead, so that the server goes too."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)
