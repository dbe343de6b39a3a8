"""Calling a front in tests: over real gRPC on a unix socket, with failures taken apart."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status

from patchclamp.v1 import generation_pb2, model_pb2_grpc, run_pb2, run_pb2_grpc
from patchclamp_server.config import ServerConfig
from patchclamp_server.service.server import Front, Ready
from service.stub import StubWorker


@dataclass(frozen=True)
class Caller:
    """A channel to a front, with its stubs."""

    front: Front
    worker: StubWorker
    channel: grpc.aio.Channel
    ready: Ready | None

    @property
    def model(self) -> model_pb2_grpc.ModelServiceStub:
        return model_pb2_grpc.ModelServiceStub(self.channel)

    @property
    def runs(self) -> run_pb2_grpc.RunServiceStub:
        return run_pb2_grpc.RunServiceStub(self.channel)

    async def run(self, request: run_pb2.RunRequest) -> list[run_pb2.RunResponse]:
        """Every message of one Run."""
        return [response async for response in self.runs.Run(request, timeout=30)]

    async def generate(self, request: generation_pb2.GenerateRequest) -> list[generation_pb2.GenerateResponse]:
        """Every message of one Generate."""
        return [response async for response in self.runs.Generate(request, timeout=30)]


@asynccontextmanager
async def serving(worker: Any, *, ready: bool = True, **settings: Any) -> AsyncIterator[Caller]:
    """A front over a worker, a stub or the engine's, on a socket of its own; `ready` waits until it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        host = f"unix:{Path(folder) / 'socket'}"
        given = {"model": "stub", "host": host, "metrics_port": "off", "grace": 5.0} | settings
        front = Front(ServerConfig.model_validate(given), worker)
        await front.start()
        announced = await front.ready() if ready else None
        async with grpc.aio.insecure_channel(front.address) as channel:
            yield Caller(front, worker, channel, announced)
        hurry = asyncio.Event()
        hurry.set()
        await front.stop(hurry)


@dataclass(frozen=True)
class Failed:
    """How a call failed, with its details by type."""

    code: grpc.StatusCode
    message: str
    info: ErrorInfo
    trailers: dict[str, str | bytes]
    status: Status

    def detail(self, kind: type[Message]) -> Message:
        for packed in self.status.details:
            if packed.Is(kind.DESCRIPTOR):
                found = kind()
                packed.Unpack(found)
                return found
        raise AssertionError(f"no {kind.__name__}")

    @property
    def violations(self) -> dict[str, str]:
        found = self.detail(BadRequest)
        assert isinstance(found, BadRequest)
        return {violation.field: violation.description for violation in found.field_violations}

    @property
    def resource(self) -> ResourceInfo:
        found = self.detail(ResourceInfo)
        assert isinstance(found, ResourceInfo)
        return found

    @property
    def retry_seconds(self) -> float:
        found = self.detail(RetryInfo)
        assert isinstance(found, RetryInfo)
        return found.retry_delay.ToTimedelta().total_seconds()


def failed(error: grpc.aio.AioRpcError) -> Failed:
    """Takes a failure apart; every one has an ErrorInfo."""
    trailers: dict[str, str | bytes] = dict(error.trailing_metadata())
    raw = trailers["grpc-status-details-bin"]
    assert isinstance(raw, bytes)
    status = Status.FromString(raw)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "patchclamp"
    return Failed(error.code(), error.details() or "", info, trailers, status)


async def failure_of(call: Awaitable[object]) -> Failed:
    """How a call failed that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return failed(caught.value)
