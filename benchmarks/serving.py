"""A server of its own for a benchmark: a child process on a free loopback port, ended by SIGTERM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[str]:
    """The address of a fresh server with these options."""
    command = [sys.executable, "-m", "patchclamp_server", *arguments, "--port", "0", "--metrics-port", "off"]
    child = subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        ready = child.stdout.readline()
        if " ready on " not in ready:
            raise RuntimeError(f"the server did not start: {ready!r}")
        yield ready.split(" ready on ")[1].split()[0]
    finally:
        child.terminate()
        child.wait(30)
