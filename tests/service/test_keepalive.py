"""Callers that wait for a long run ping in the meantime, and keep their connections."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import grpc.aio
import pytest

from patchclamp.v1 import run_pb2_grpc
from patchclamp_server.config import ServerConfig
from patchclamp_server.service import server
from service.build import run
from service.conftest import Connect
from service.stub import StubWorker, make_tokenizer

CONFIG = ServerConfig(model="stub")


def test_the_core_knows_every_option_by_name() -> None:
    found = importlib.util.find_spec("grpc._cython.cygrpc")
    assert found is not None and found.origin is not None
    core = Path(found.origin).read_bytes()
    # It says nothing of an option that it does not know.
    assert not [name for name, _ in server._options(CONFIG) if name.encode() + b"\0" not in core]


@pytest.mark.slow
async def test_a_stream_without_data_outlives_its_callers_pings(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A hundred times faster, with a single strike allowed; the core sends one ping a second at most.
    fast = [(name, n // 100 if name.endswith("_ms") else n) for name, n in server._options(CONFIG)]
    monkeypatch.setattr(server, "_options", lambda _: [*fast, ("grpc.http2.max_ping_strikes", 1)])
    caller = await connect(StubWorker(make_tokenizer(), hold=True))
    pings = [("grpc.keepalive_time_ms", 200), ("grpc.http2.max_pings_without_data", 0)]
    async with grpc.aio.insecure_channel(caller.front.address, options=pings) as channel:
        call = run_pb2_grpc.RunServiceStub(channel).Run(run(), timeout=10)
        reading = asyncio.create_task(call.read())
        await asyncio.to_thread(caller.worker.seen.wait, 2)
        await asyncio.wait([reading], timeout=4)
        assert not reading.done()
        caller.worker.release()
        assert (await reading).HasField("result")
