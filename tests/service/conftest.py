"""A running front over a stub worker, and a channel to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from service.calls import Caller, serving
from service.stub import StubWorker, make_tokenizer

Connect = Callable[..., Awaitable[Caller]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Starts a server over a worker, with settings, and connects to it."""
    async with AsyncExitStack() as stack:

        async def start(worker: StubWorker | None = None, **settings: Any) -> Caller:
            return await stack.enter_async_context(serving(worker or StubWorker(make_tokenizer()), **settings))

        yield start


@pytest.fixture
async def caller(connect: Connect) -> Caller:
    """A caller of a server with the default settings."""
    return await connect()
