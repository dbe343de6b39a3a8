"""What the front makes of a generation's events: messages in order, texts that join, callers that are slow or gone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from patchclamp.v1 import failure_pb2, generation_pb2
from patchclamp_server.engine.messages import (
    EngineFailed,
    Finish,
    JobDone,
    JobFailed,
    ReadOutput,
    SampleEnded,
    SampleFailed,
    TokenGenerated,
)
from patchclamp_server.errors import DeadlineExceeded, Error, FailedPrecondition, Overloaded
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.receipts import Receipt
from patchclamp_server.service import jobs
from patchclamp_server.service.generated_text import GeneratedText
from patchclamp_server.service.jobs import RunningJob, SampleEvent
from service.build import generation, read, run
from service.calls import Caller, failure_of
from service.conftest import Connect
from service.stub import StubWorker, make_tokenizer
from service.test_calls import eventually
from service.test_life import fetch

DONE = JobDone(1, 0.25, 0.5, "stub-1")
Responses = Sequence[generation_pb2.GenerateResponse]


def token(index: int, said: str = "", sample: int = 0, **fields: Any) -> TokenGenerated:
    return TokenGenerated(1, sample, index, 1 + index % 40, said, -0.5, **fields)


def ended(said: str = "", finish: Finish = Finish.LENGTH, sample: int = 0, *receipts: Receipt) -> SampleEnded:
    return SampleEnded(1, sample, finish, said, receipts)


async def started(caller: Caller) -> None:
    """Waits until the worker has the request."""
    assert await asyncio.to_thread(caller.worker.seen.wait, 2)


async def drained(call: Any) -> Responses:
    """Reads a stream to its end."""
    found = []
    while (response := await call.read()) is not grpc.aio.EOF:
        found.append(response)
    return found


async def told(caller: Caller, request: generation_pb2.GenerateRequest, *events: Any) -> Responses:
    """The messages that some events become."""
    call = asyncio.create_task(caller.generate(request))
    await started(caller)
    caller.worker.tell(1, *events)
    return await call


def kinds(responses: Responses) -> list[str | None]:
    return [response.WhichOneof("event") for response in responses]


async def test_a_stream_is_start_tokens_ends_and_summary(caller: Caller) -> None:
    receipt = Receipt(0, 5, 4, 3, 0.5, 0.75, 2)
    events = [
        token(0, "a", top_ids=(3, 4), top_logprobs=(-0.5, -1.0)), token(0, "b", sample=1), token(1, "c"),
        ended("", Finish.LENGTH, 0, receipt), token(1, "d", sample=1), ended("", Finish.CONTEXT, 1), DONE,
    ]  # fmt: skip
    request = generation(2, sampling={"samples": 2, "seed": 9, "temperature": 1})
    responses = await told(caller, request, *events)
    assert kinds(responses) == ["start", "token", "token", "token", "sample_end", "token", "sample_end", "summary"]
    start, first, other, _, end, _, full, last = responses
    assert (start.start.seed, [one.id for one in start.start.prompt]) == (9, [1, 2, 3, 4, 5])
    assert (first.token.token.id, first.token.token.text, first.token.logprob) == (1, " w1", -0.5)
    assert [(one.id, one.text, one.logprob) for one in first.token.top] == [(3, " w3", -0.5), (4, " w4", -1.0)]
    assert (other.token.sample_index, other.token.text) == (1, "b")
    assert (end.sample_end.sample_index, end.sample_end.finish_reason) == (0, generation_pb2.FINISH_REASON_LENGTH)
    (wire,) = end.sample_end.receipts
    assert (wire.rows_selected, wire.rows_fired, wire.rows_changed, wire.clipped) == (5, 4, 3, 2)
    assert full.sample_end.finish_reason == generation_pb2.FINISH_REASON_CONTEXT
    summary = last.summary
    assert (summary.prompt_tokens, summary.generated_tokens, summary.engine_seconds) == (5, 4, 0.5)
    assert (summary.fingerprint, summary.first_token_seconds > 0) == ("stub-1", True)


@pytest.mark.parametrize(
    ("request_", "events", "texts"),
    [
        # The last by number takes what was held back.
        (generation(2), [token(0, "a"), token(1, ""), ended("bc")], ["a", "bc"]),
        (generation(2), [token(0, "a"), token(1, "b"), ended("")], ["a", "b"]),
        # So does one whose id ends the sample, though others might have come.
        (
            generation(9, stop={"token_ids": [2]}),
            [token(0, ""), token(1, ""), ended("held", Finish.STOP)],
            ["", "held"],
        ),
        # A stop text leaves nothing to come.
        (generation(9, stop={"texts": ["x"]}), [token(0, "a"), token(1, "b"), ended("", Finish.STOP)], ["a", "b"]),
    ],
)
async def test_what_was_held_back_is_the_text_of_the_last_token(
    caller: Caller, request_: generation_pb2.GenerateRequest, events: list[Any], texts: list[str]
) -> None:
    responses = await told(caller, request_, *events, DONE)
    assert kinds(responses) == ["start", "token", "token", "sample_end", "summary"]
    assert [response.token.text for response in responses if response.HasField("token")] == texts


async def test_a_token_that_is_not_the_last_waits_for_no_other(caller: Caller) -> None:
    call = caller.runs.Generate(generation(9))
    await started(caller)
    caller.worker.tell(1, token(0, "a"))
    assert (await call.read()).HasField("start")
    assert (await asyncio.wait_for(call.read(), 2)).token.text == "a"
    call.cancel()
    await eventually(lambda: caller.worker.cancelled == [1])
    assert caller.worker.waiting == 0


async def test_a_sample_that_fails_does_so_alone(caller: Caller) -> None:
    fault = FailedPrecondition("no", metadata={"why": "so"})
    events = [token(0, "a"), SampleFailed(1, 0, fault), token(0, "b", sample=1), ended("", Finish.LENGTH, 1), DONE]
    responses = await told(caller, generation(1, sampling={"samples": 2}), *events)
    assert kinds(responses) == ["start", "token", "sample_end", "token", "sample_end", "summary"]
    end = responses[2].sample_end
    assert (end.sample_index, end.finish_reason) == (0, generation_pb2.FINISH_REASON_ERROR)
    assert end.failure.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert (end.failure.message, dict(end.failure.metadata)) == ("no", {"why": "so"})
    assert end.failure.reason == failure_pb2.RunFailure(reason="ERROR_REASON_UNSUPPORTED_BY_MODEL").reason
    assert not responses[4].sample_end.HasField("failure")


async def test_reads_that_are_too_large_follow_their_token_in_chunks(caller: Caller) -> None:
    values = torch.arange(400_000, dtype=torch.float32).view(1, -1)
    output = ReadOutput(0, HookPoint(Site.EMBED), values, None, (5,))
    events = [token(0, reads=(output,)), token(1), ended(), DONE]
    responses = await told(caller, generation(2, reads=[read("EMBED")]), *events)
    assert kinds(responses) == ["start", "token", "chunk", "chunk", "token", "sample_end", "summary"]
    data = b"".join(response.chunk.data for response in responses if response.HasField("chunk"))
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), values[0])


async def test_the_engines_refusal_ends_the_call(caller: Caller) -> None:
    call = asyncio.create_task(failure_of(caller.generate(generation())))
    await started(caller)
    caller.worker.tell(1, token(0), JobFailed(1, DeadlineExceeded("too late")))
    assert (await call).code == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_engine_that_fails_ends_generations_with_the_reason(caller: Caller) -> None:
    call = asyncio.create_task(failure_of(caller.generate(generation())))
    await started(caller)
    broken = asyncio.create_task(caller.front.broken())
    caller.worker.report(EngineFailed(RuntimeError("CUDA error")))
    await broken
    assert (await call).info.reason == "ENGINE_FAILED"


async def test_the_deadline_and_solo_reach_the_worker(caller: Caller) -> None:
    call = caller.runs.Generate(generation(numerics="NUMERICS_SOLO"), timeout=60)
    await started(caller)
    job = caller.worker.generations[1]
    assert job.solo and job.deadline is not None
    call.cancel()
    await eventually(lambda: caller.worker.cancelled == [1])


async def test_a_deadline_cancels_the_job(caller: Caller) -> None:
    call = caller.runs.Generate(generation(), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(call)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: caller.worker.cancelled == [1])


async def test_a_slow_reader_is_paused_and_gets_everything_in_the_end(caller: Caller) -> None:
    def large(index: int) -> TokenGenerated:
        values = torch.zeros(1, 50_000)
        return token(index, reads=(ReadOutput(0, HookPoint(Site.EMBED), values, None, (5 + index,)),))

    call = caller.runs.Generate(generation(4000, reads=[read("EMBED")]))
    await started(caller)
    # More than the connection takes in while nobody reads.
    for index in range(700):
        caller.worker.tell(1, large(index % 20))
        if index % 20 == 0:
            await asyncio.sleep(0)
    await eventually(lambda: caller.worker.paused == [(1, True)])
    caller.worker.tell(1, ended(), DONE)
    found = kinds(await drained(call))
    assert found.count("token") == 700
    assert found[-2:] == ["sample_end", "summary"]
    assert caller.worker.paused == [(1, True), (1, False)]
    assert not caller.worker.cancelled


async def test_a_caller_that_takes_nothing_for_long_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "STALLED_SECONDS", 0.05)
    job = RunningJob[SampleEvent](most=3)
    held: list[bool] = []
    given_up: list[bool] = []
    job.hold, job.give_up = held.append, lambda: given_up.append(True)
    for index in range(5):
        job.put(token(index))
    assert held == [True]
    await eventually(lambda: bool(given_up))
    job.put(DONE)
    with pytest.raises(Overloaded, match="3 messages behind"):
        await anext(job)
    assert job.ended


async def test_a_held_job_goes_on_when_half_is_taken() -> None:
    job = RunningJob[SampleEvent](most=4)
    held: list[bool] = []
    job.hold = held.append
    for index in range(5):
        job.put(token(index))
    taken = [await anext(job) for _ in range(2)]
    assert held == [True]
    taken.append(await anext(job))
    assert held == [True, False]
    assert [event.index for event in taken if isinstance(event, TokenGenerated)] == [0, 1, 2]


async def test_a_backlog_that_is_read_in_time_is_kept_in_order() -> None:
    job = RunningJob[SampleEvent](most=3)
    for index in range(3):
        job.put(token(index))
    # The end of a job is no message more to hold.
    job.put(DONE)
    found = [event async for event in job]
    assert [event.index for event in found if isinstance(event, TokenGenerated)] == [0, 1, 2]
    assert job.done is DONE


async def test_results_that_wait_count_for_generations_and_runs_alike(connect: Connect) -> None:
    caller = await connect(StubWorker(make_tokenizer(), hold=True), max_waiting_bytes=3000)
    # Ten positions of an embedding: 640 bytes each sample, and four samples.
    call = caller.runs.Generate(generation(reads=[read("EMBED")], sampling={"samples": 4}))
    await started(caller)
    for other in (caller.generate(generation(reads=[read("EMBED")])), caller.run(run(read()))):
        failure = await failure_of(other)
        assert failure.info.reason == "OVERLOADED"
        assert "2,560 bytes" in failure.message
    call.cancel()
    await eventually(lambda: caller.worker.cancelled == [1])


async def test_metrics_count_generated_tokens_and_the_first_ones_time(connect: Connect) -> None:
    caller = await connect(metrics_port=0)
    await told(caller, generation(2), token(0, "a"), token(1, "b"), ended(), DONE)
    assert caller.ready is not None
    assert caller.ready.metrics is not None
    text = await asyncio.to_thread(fetch, caller.ready.metrics)
    assert "patchclamp_generated_tokens_total 2.0" in text
    assert "patchclamp_first_token_seconds_count 1.0" in text
    assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="Generate"' in text


async def test_a_fault_while_rendering_leaks_nothing_and_cancels_the_job(caller: Caller) -> None:
    call = asyncio.create_task(failure_of(caller.generate(generation())))
    await started(caller)
    caller.worker.tell(1, token(0, sample=3))
    failure = await call
    assert (failure.code, failure.info.reason) == (grpc.StatusCode.INTERNAL, Error.reason)
    assert caller.worker.cancelled == [1]


class Bytes:
    """Stands for a tokenizer whose tokens are bytes; 0 is special."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token_id for token_id in ids if token_id).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str:
        return self.decode([token_id]) or "<end>"


def test_a_character_stands_where_its_last_token_does() -> None:
    tokenizer: Any = Bytes()
    text = GeneratedText(tokenizer)
    places = [text.append(token_id) for token_id in [*"aé😀b".encode(), 0, *b"\xff!"]]
    broken = "\ufffd"
    assert places == [
        ("a", 0, 1),
        (broken, 1, 1), (broken, 1, 2),
        (broken, 2, 2), (broken, 2, 2), (broken, 2, 2), (broken, 2, 3),
        ("b", 3, 4),
        ("<end>", 4, 4),
        (broken, 4, 4), ("!", 4, 6),
    ]  # fmt: skip
    assert GeneratedText(None).append(7) == ("", 0, 0)
