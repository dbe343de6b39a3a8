"""A stand-in server and clients of it."""

from collections.abc import AsyncIterator, Iterator

import pytest

import patchclamp as pc
from client.stand_in import StandIn, start


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TARGET", "TOKEN", "TIMEOUT"):
        monkeypatch.delenv(f"PATCHCLAMP_{name}", raising=False)


@pytest.fixture
def server() -> Iterator[StandIn]:
    state = StandIn()
    running = start(state)
    yield state
    running.stop(None).wait()


@pytest.fixture
def client(server: StandIn) -> Iterator[pc.Client]:
    with pc.connect(server.target, timeout=10) as connected:
        yield connected


@pytest.fixture
async def async_client(server: StandIn) -> AsyncIterator[pc.AsyncClient]:
    async with pc.aio.connect(server.target, timeout=10) as connected:
        yield connected
