"""The life of a server: loading, serving, draining, and an engine that fails."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from patchclamp.v1 import model_pb2
from patchclamp_server.config import ConfigError, ServerConfig
from patchclamp_server.engine.messages import EngineFailed, Loaded, Progress
from patchclamp_server.service.server import Front
from service.build import run
from service.calls import Caller, Failed, failure_of
from service.conftest import Connect
from service.stub import FACTS, StubWorker

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", "patchclamp.v1.ModelService", "patchclamp.v1.RunService", "stub")


async def health(caller: Caller) -> set[int]:
    """What health checks say, under every name."""
    stub: Any = health_pb2_grpc.HealthStub(caller.channel)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in NAMES}


async def describe_fails(caller: Caller) -> Failed:
    return await failure_of(caller.model.Describe(model_pb2.DescribeRequest()))


async def test_until_the_model_is_loaded_nothing_is_served(connect: Connect) -> None:
    caller = await connect(StubWorker(loads=False), ready=False)
    loading = asyncio.create_task(caller.front.ready())
    assert await health(caller) == {NOT_SERVING}
    caller.worker.report(Progress("loading weights", 0.5))
    await asyncio.sleep(0)
    for failure in (await describe_fails(caller), await failure_of(caller.run(run()))):
        assert failure.code == grpc.StatusCode.UNAVAILABLE
        assert failure.info.reason == "NOT_SERVING"
        assert "loading weights, 50%" in failure.message
    caller.worker.report(Loaded(FACTS, None))
    assert (await loading).model == "stub"
    assert await health(caller) == {SERVING}
    assert (await caller.model.Describe(model_pb2.DescribeRequest())).model.name == "stub"


async def test_loading_that_fails_is_raised(connect: Connect) -> None:
    caller = await connect(StubWorker(loads=False), ready=False)
    caller.worker.report(EngineFailed(ValueError("no such file")))
    with pytest.raises(ValueError, match="no such file"):
        await caller.front.ready()


async def test_a_server_that_leaves_finishes_what_is_in_flight_and_takes_nothing_new(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True), drain_delay=0.2)
    stub: Any = health_pb2_grpc.HealthStub(caller.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    call = asyncio.create_task(caller.run(run()))
    await asyncio.to_thread(caller.worker.seen.wait, 2)
    leaving = asyncio.create_task(caller.front.stop(asyncio.Event()))
    assert (await watch.read()).status == NOT_SERVING
    assert (await caller.model.Describe(model_pb2.DescribeRequest())).model.name == "stub", "balancers need a moment"
    await asyncio.sleep(0.3)
    failure = await describe_fails(caller)
    assert failure.code == grpc.StatusCode.UNAVAILABLE
    assert failure.info.reason == "NOT_SERVING"
    assert not leaving.done()
    caller.worker.release()
    assert [(one.WhichOneof("event"), one.HasField("summary")) for one in await call] == [("result", True)]
    await leaving
    assert caller.worker.stopped


async def test_a_call_that_outlives_the_grace_is_ended_and_its_job_cancelled(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True), grace=0.1)
    call = asyncio.create_task(caller.run(run()))
    await asyncio.to_thread(caller.worker.seen.wait, 2)
    await caller.front.stop(asyncio.Event())
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    assert caller.worker.cancelled == [1]


async def test_hurry_ends_the_grace(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True), grace=60.0, drain_delay=60.0)
    call = asyncio.create_task(caller.run(run()))
    await asyncio.to_thread(caller.worker.seen.wait, 2)
    hurry = asyncio.Event()
    leaving = asyncio.create_task(caller.front.stop(hurry))
    await asyncio.sleep(0.05)
    hurry.set()
    await asyncio.wait_for(leaving, 3)
    with pytest.raises(grpc.aio.AioRpcError):
        await call


async def test_an_engine_that_fails_ends_every_call_with_the_reason(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True))
    call = asyncio.create_task(failure_of(caller.run(run())))
    await asyncio.to_thread(caller.worker.seen.wait, 2)
    broken = asyncio.create_task(caller.front.broken())
    caller.worker.report(EngineFailed(RuntimeError("CUDA error")))
    assert str(await broken) == "CUDA error"
    for failure in (await call, await describe_fails(caller)):
        assert failure.code == grpc.StatusCode.UNAVAILABLE
        assert failure.info.reason == "ENGINE_FAILED"
        assert "CUDA" not in failure.message
    assert await health(caller) == {NOT_SERVING}
    await caller.front.stop(asyncio.Event())


async def test_reflection_lists_the_services_where_it_is_on(connect: Connect) -> None:
    async def listed(caller: Caller) -> set[str]:
        channel: Any = caller.channel
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        return {service.name for service in answer.list_services_response.service}

    assert {*NAMES[1:3], "grpc.health.v1.Health"} <= await listed(await connect())
    with pytest.raises(grpc.aio.AioRpcError):
        await listed(await connect(reflection="off"))


def fetch(url: str) -> str:
    with urllib.request.urlopen(url) as answer:  # noqa: S310
        text: str = answer.read().decode()
        return text


async def test_metrics_count_calls_and_tell_the_model(connect: Connect) -> None:
    caller = await connect(metrics_port=0)
    await caller.run(run())
    await failure_of(caller.run(run(prompt=None)))
    await caller.model.Describe(model_pb2.DescribeRequest())
    assert caller.ready is not None
    assert caller.ready.metrics is not None
    text = await asyncio.to_thread(fetch, caller.ready.metrics)
    service = 'grpc_service="patchclamp.v1.RunService",grpc_type="server_stream"'
    run_labels = f'grpc_method="Run",{service}'
    assert f"grpc_server_started_total{{{run_labels}}} 2.0" in text
    assert f'grpc_server_handled_total{{grpc_code="OK",{run_labels}}} 1.0' in text
    assert f'grpc_server_handled_total{{grpc_code="INVALID_ARGUMENT",{run_labels}}} 1.0' in text
    assert f"grpc_server_handling_seconds_count{{{run_labels}}} 2.0" in text
    assert 'grpc_method="Describe",grpc_service="patchclamp.v1.ModelService",grpc_type="unary"' in text
    assert 'patchclamp_model_info{architecture="StubForCausalLM",dtype="float32",model="stub"' in text
    assert "patchclamp_queue_depth 0.0" in text


async def test_two_servers_share_no_port(connect: Connect) -> None:
    first = await connect(host="127.0.0.1", port=0)
    port = int(first.front.address.rpartition(":")[2])
    config = ServerConfig(model="stub", port=port, metrics_port="off")
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        await Front(config, StubWorker()).start()
