"""What every call has in common: request ids, errors that leak nothing, cancellation, deadlines, and neighbours."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from patchclamp.v1 import model_pb2, run_pb2
from patchclamp_server.engine.messages import Event, Job, RunSpec
from patchclamp_server.errors import Overloaded
from patchclamp_server.service import interceptors
from patchclamp_server.service.process import hush_departed_callers
from patchclamp_server.service.run_service import RunServicer
from service.build import read, run, text
from service.calls import Caller, failed, failure_of
from service.conftest import Connect
from service.stub import StubWorker, make_tokenizer

METHODS = ("/patchclamp.v1.ModelService/Describe", "/patchclamp.v1.ModelService/Tokenize")
RUN = "/patchclamp.v1.RunService/Run"


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits until something holds, for two seconds at most."""
    async with asyncio.timeout(2):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def id_of_describe(caller: Caller, request_id: str | None) -> str | bytes:
    """The request id that a call comes back with."""
    metadata = () if request_id is None else (("x-request-id", request_id),)
    call = caller.model.Describe(model_pb2.DescribeRequest(), metadata=metadata)
    await call
    trailers: dict[str, str | bytes] = dict(await call.trailing_metadata())
    return trailers["x-request-id"]


async def test_a_callers_request_id_is_echoed(caller: Caller) -> None:
    assert await id_of_describe(caller, "notebook-7.cell:3") == "notebook-7.cell:3"


@pytest.mark.parametrize("strange", [None, "", "a b", "x" * 65, "line;drop"])
async def test_a_call_without_a_sane_id_gets_one(caller: Caller, strange: str | None) -> None:
    request_id = await id_of_describe(caller, strange)
    assert isinstance(request_id, str)
    assert re.fullmatch("[0-9a-f]{32}", request_id)


async def test_a_failure_carries_the_request_id_in_trailers_and_details(caller: Caller) -> None:
    call = caller.runs.Run(run_pb2.RunRequest(), metadata=(("x-request-id", "mine"),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    failure = failed(caught.value)
    assert failure.trailers["x-request-id"] == "mine"
    assert failure.info.metadata["request_id"] == "mine"


async def raw(caller: Caller, path: str, data: bytes) -> None:
    """Calls a method with bytes that need not be a message."""
    channel: Any = caller.channel
    if path == RUN:
        await channel.unary_stream(path)(data).read()
    else:
        await channel.unary_unary(path)(data)


@pytest.mark.parametrize("path", [*METHODS, RUN])
async def test_bytes_that_are_no_message_are_malformed(caller: Caller, path: str) -> None:
    failure = await failure_of(raw(caller, path, b"\xff\xff\xff"))
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
    assert failure.info.reason == "MALFORMED_MESSAGE"


async def test_text_that_is_not_unicode_is_malformed(caller: Caller) -> None:
    named = b"\x0a\x02\xff\xfe"
    failure = await failure_of(raw(caller, METHODS[0], named))
    assert failure.info.reason == "MALFORMED_MESSAGE"


@pytest.mark.parametrize("path", [METHODS[1], RUN])
async def test_a_message_beyond_the_limit_is_too_large(connect: Connect, path: str) -> None:
    caller = await connect(max_message_bytes=1000)
    failure = await failure_of(raw(caller, path, b" " * 1001))
    assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.info.reason == "REQUEST_TOO_LARGE"
    assert (failure.info.metadata["limit"], failure.info.metadata["demand"]) == ("1000", "1001")


async def test_a_method_that_is_not_there_is_not_served(caller: Caller) -> None:
    failure = await failure_of(raw(caller, "/patchclamp.v1.RunService/Imagine", b""))
    assert failure.code == grpc.StatusCode.UNIMPLEMENTED
    assert failure.info.reason == "NOT_SERVED"


async def test_a_fault_of_the_server_leaks_nothing(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(StubWorker):
        def submit(self, job: Job, emit: Callable[[Event], None]) -> None:
            raise RuntimeError("secret at /srv/models/private.bin")

    caller = await connect(Faulty(make_tokenizer()))
    failure = await failure_of(caller.run(run(prompt=text("hello"))))
    assert failure.code == grpc.StatusCode.INTERNAL
    assert failure.info.reason == "INTERNAL"
    request_id = failure.info.metadata["request_id"]
    assert failure.message == f"a fault of the server; its log has the details under the request id {request_id}"
    assert b"secret" not in failure.status.SerializeToString()
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert request_id in record.getMessage()
    assert record.exc_info is not None and "secret" in str(record.exc_info[1])


async def test_a_fault_while_answering_leaks_nothing_and_cancels_the_job(connect: Connect) -> None:
    def answer(job: Job, spec: RunSpec, index: int) -> Event:
        return "no event"  # type: ignore[return-value]

    worker = StubWorker(make_tokenizer())
    worker.answer = answer
    failure = await failure_of((await connect(worker)).run(run()))
    assert failure.code == grpc.StatusCode.INTERNAL
    assert worker.cancelled == [1]


async def test_every_call_is_one_line_in_the_log_without_its_prompt(
    caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await caller.run(run(prompt=text("hello w1")))
    await failure_of(caller.run(run(prompt=text(""))))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("patchclamp_server")]
    assert len(lines) == 2
    assert re.fullmatch(r"[0-9a-f]{32} patchclamp.v1.RunService/Run OK \d+\.\d{4} s", lines[0])
    assert "INVALID_ARGUMENT" in lines[1]
    assert not any("hello" in line for line in lines)


async def test_a_cancelled_call_cancels_its_job(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True))
    call = caller.runs.Run(run())
    await asyncio.to_thread(caller.worker.seen.wait, 2)
    call.cancel()
    await eventually(lambda: caller.worker.cancelled == [1])


async def test_a_caller_that_leaves_while_chunks_flow_cancels_its_job(connect: Connect) -> None:
    worker = StubWorker(hold=True)
    worker.scale = 100_000  # 96 MB: more than any buffer on the way holds
    caller = await connect(worker)
    call = caller.runs.Run(run(read(layer=0), read(layer=0), read(layer=0)))
    await asyncio.to_thread(worker.seen.wait, 2)
    worker.answer_first_run(1)
    await call.read()
    call.cancel()
    await eventually(lambda: worker.cancelled == [1])


async def test_a_finished_job_is_not_cancelled(caller: Caller) -> None:
    await caller.run(run())
    assert caller.worker.cancelled == []


async def test_the_deadline_reaches_the_worker_and_ends_the_call(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True))
    before = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.runs.Run(run(), timeout=0.3).read()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    deadline = caller.worker.jobs[1].deadline
    assert deadline is not None and before < deadline < before + 0.5
    await eventually(lambda: caller.worker.cancelled == [1])


async def test_no_deadline_is_none(caller: Caller) -> None:
    async for _ in caller.runs.Run(run()):
        pass
    assert caller.worker.jobs[1].deadline is None


async def test_two_callers_at_once_get_their_own_results(connect: Connect) -> None:
    caller = await connect(StubWorker(make_tokenizer(), hold=True))
    calls = [asyncio.create_task(caller.run(run(prompt=text(prompt)))) for prompt in ("w1 w2", "w3 w4 w5")]
    await eventually(lambda: caller.worker.waiting == 2)
    caller.worker.release()
    first, second = await asyncio.gather(*calls)
    assert [token.id for token in first[0].result.tokens] == [1, 2]
    assert [token.id for token in second[0].result.tokens] == [3, 4, 5]


async def test_one_callers_bad_request_harms_no_neighbour(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True))
    good = asyncio.create_task(caller.run(run()))
    await eventually(lambda: caller.worker.waiting == 1)
    await failure_of(caller.run(run_pb2.RunRequest()))
    await failure_of(raw(caller, RUN, b"\xff"))
    caller.worker.release()
    assert (await good)[-1].HasField("summary")


async def test_too_much_waiting_work_is_told_to_come_back(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True), max_waiting=1)
    waiting = asyncio.create_task(caller.run(run()))
    await eventually(lambda: caller.worker.waiting == 1)
    failure = await failure_of(caller.run(run()))
    assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.info.reason == "OVERLOADED"
    assert failure.retry_seconds == 1
    caller.worker.release()
    await waiting


async def test_results_that_wait_beyond_the_budget_have_others_come_back(connect: Connect) -> None:
    large = run(read())  # 960 bytes
    caller = await connect(StubWorker(hold=True), max_waiting_bytes=959)
    alone = asyncio.create_task(caller.run(large))
    await eventually(lambda: caller.worker.waiting == 1)
    failure = await failure_of(caller.run(run(loss=True)))
    assert (failure.code, failure.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert failure.retry_seconds == 1
    assert "960 bytes of results" in failure.message
    caller.worker.release()
    await alone
    again = asyncio.create_task(caller.run(large))
    await eventually(lambda: caller.worker.waiting == 1)
    caller.worker.release()
    await again


async def test_a_run_that_brings_no_bytes_has_no_budget_to_wait_for(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True), max_waiting_bytes=959)
    large = asyncio.create_task(caller.run(run(read())))  # 960 bytes
    await eventually(lambda: caller.worker.waiting == 1)
    nothing = asyncio.create_task(caller.run(run()))
    await eventually(lambda: caller.worker.waiting == 2)
    caller.worker.release()
    await asyncio.gather(large, nothing)


async def test_results_within_the_budget_wait_together(connect: Connect) -> None:
    caller = await connect(StubWorker(hold=True), max_waiting_bytes=2 * 960)
    calls = [asyncio.create_task(caller.run(run(read()))) for _ in range(2)]
    await eventually(lambda: caller.worker.waiting == 2)
    caller.worker.release()
    await asyncio.gather(*calls)


async def test_a_caller_that_departs_before_a_message_leaves_no_traceback(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def depart(self: RunServicer, request: run_pb2.RunRequest, context: Any) -> None:
        raise grpc.aio.InternalError("Failed grpc_call_start_batch")

    monkeypatch.setattr(RunServicer, "Run", depart)
    caller = await connect()
    with pytest.raises(grpc.aio.AioRpcError):
        await caller.runs.Run(run(), timeout=2).read()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_caller_that_departs_before_its_status_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    own = logging.getLogger("grpc._cython.cygrpc")
    hush_departed_callers()
    try:
        own.error("ExecuteBatchError raised in core by servicer method [/patchclamp.v1.RunService/Run]")
        own.error("Unexpected [ValueError] raised by servicer method [/patchclamp.v1.RunService/Run]")
    finally:
        own.filters.clear()
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["Unexpected"]


async def test_a_caller_that_departs_before_its_error_ends_the_call_all_the_same() -> None:
    class Departed:
        async def abort(self, *_: object) -> None:
            raise grpc.aio.InternalError("Failed grpc_call_start_batch")

    context: Any = Departed()
    with pytest.raises(asyncio.CancelledError):
        await interceptors._abort(context, Overloaded("later", retry_after=1), "id")


@pytest.fixture(autouse=True)
async def no_task_is_left_behind() -> AsyncIterator[None]:
    yield
    left = [task for task in asyncio.all_tasks() if task.get_name().startswith("HandleExceptions")]
    assert left == []
