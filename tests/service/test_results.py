"""What a Run's stream carries: results as their runs end, large tensors in chunks behind them, and a summary last."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from patchclamp.v1 import hook_point_pb2, logits_pb2, model_pb2, numerics_pb2, prompt_pb2, read_pb2, run_pb2, tensor_pb2
from patchclamp_server.engine.messages import Event, Job, RunFailed, RunFinished, RunOutput, RunSpec
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.interventions.receipts import Receipt
from patchclamp_server.service.capabilities import capabilities
from patchclamp_server.service.tensors import INLINE_BYTES, Outlet, chunks, memory
from service.build import edit, ids, indices, read, run, span, target, text
from service.calls import Caller
from service.conftest import Connect
from service.stub import DIMS, FACTS, StubWorker, make_tokenizer, ramp

DTYPES = {
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DTYPE_FLOAT16: torch.float16,
    tensor_pb2.DTYPE_INT32: torch.int32,
}


def values(wire: tensor_pb2.Tensor, data: bytes | None = None) -> torch.Tensor:
    """The tensor of a message, or of its chunks."""
    assert wire.byte_order == tensor_pb2.BYTE_ORDER_LITTLE_ENDIAN
    buffer = bytearray(wire.inline if data is None else data)
    return torch.frombuffer(buffer, dtype=DTYPES[wire.dtype]).reshape(*wire.shape)


def only_result(responses: Sequence[run_pb2.RunResponse]) -> run_pb2.RunResult:
    assert [response.WhichOneof("event") for response in responses] == ["result"]
    assert responses[0].HasField("summary")
    return responses[0].result


def between(wire: hook_point_pb2.PositionRange) -> tuple[int, int]:
    """Both ends of a range, both set."""
    assert wire.HasField("start") and wire.HasField("stop")
    return wire.start, wire.stop


async def test_positions_are_a_range_where_consecutive_else_a_list_and_nothing_without_their_axis(
    caller: Caller,
) -> None:
    chosen = {(1, 2, 3): (1, 4), (-1,): (4, 5), (0, 2, 4): None, (3, 2, 1): None, (0, 2, 1, 3): None}
    reads = [read("EMBED", positions=indices(*positions)) for positions in chosen]
    result = only_result(await caller.run(run(*reads)))
    for (positions, ends), one in zip(chosen.items(), result.reads, strict=True):
        assert one.HasField("position_range") == (ends is not None)
        assert ends is None or between(one.position_range) == ends
        assert tuple(one.positions) == (positions if ends is None else ())
    kinds = [read_pb2.Reduction(**{kind: {}}) for kind in ("last", "mean", "moments", "norm")]
    result = only_result(await caller.run(run(*[read("EMBED", reduction=kind) for kind in kinds])))
    assert [one.HasField("position_range") for one in result.reads] == [False, False, False, True]
    result = only_result(await caller.run(run(*[read("EMBED", positions=indices(0, 2), reduction=kinds[1])])))
    assert not result.reads[0].positions


async def test_a_small_run_is_one_message_with_the_summary(caller: Caller) -> None:
    tokenizer = caller.worker.tokenizer
    assert tokenizer is not None
    request = run(
        read(),
        read("ATTN_PATTERN", layer=1, positions=span("LAST"), dtype="DTYPE_BFLOAT16"),
        read("LN_FINAL"),
        prompt=text("w3 w4 hello"),
        logits=logits_pb2.LogitsRequest(values=True, top_k=2, logprob_tokens=[7, 8, 9]),
        loss=True,
    )
    responses = await caller.run(request)
    result = only_result(responses)
    assert [(token.id, token.start, token.end) for token in result.tokens] == [(3, 0, 2), (4, 3, 5), (49, 6, 11)]
    assert [token.text for token in result.tokens] == [tokenizer.piece(token_id) for token_id in (3, 4, 49)]
    assert [(one.read_index, one.name) for one in result.reads] == [
        (0, "blocks.0.resid_post"),
        (0, "blocks.1.resid_post"),
        (0, "blocks.2.resid_post"),
        (1, "blocks.1.attn.pattern"),
        (2, "ln_final"),
    ]
    assert [one.hook_point.HasField("layer") for one in result.reads] == [True] * 4 + [False]
    assert [between(one.position_range) for one in result.reads] == [(0, 3)] * 3 + [(2, 3), (0, 3)]
    assert not any(one.positions for one in result.reads)
    assert torch.equal(values(result.reads[0].values), ramp((3, DIMS.d_model)))
    assert torch.equal(values(result.reads[3].values), ramp((4, 1, 3), torch.bfloat16))
    assert not result.reads[0].HasField("indices")
    assert list(result.logits.positions) == [2]
    assert torch.equal(values(result.logits.values), ramp((1, DIMS.d_vocab)))
    assert [(top.id, top.logprob, top.logit) for top in result.logits.top] == [(0, 0, 0), (1, -1, 1)]
    assert [top.text for top in result.logits.top] == [tokenizer.piece(0), tokenizer.piece(1)]
    assert torch.equal(values(result.logits.logprobs), -ramp((1, 3)))
    assert torch.equal(values(result.loss), ramp((2,)))
    summary = responses[-1].summary
    assert (summary.prompt_tokens, summary.queue_seconds, summary.engine_seconds) == (3, 0.25, 0.5)
    assert summary.fingerprint == "stub-1"


async def test_what_was_not_asked_for_is_not_there(caller: Caller) -> None:
    result = only_result(await caller.run(run()))
    assert not (result.reads or result.HasField("logits") or result.HasField("loss") or result.HasField("failure"))


async def test_receipts_and_the_baseline_come_with_their_run(caller: Caller) -> None:
    request = run(
        interventions=[edit(zero={"target": target(layer=layer)}) for layer in (0, 1)],
        logits=logits_pb2.LogitsRequest(values=True, top_k=2),
        baseline=True,
    )
    result = only_result(await caller.run(request))
    assert [receipt.intervention_index for receipt in result.receipts] == [0, 1]
    receipt = result.receipts[1]
    assert (receipt.rows_selected, receipt.rows_fired, receipt.rows_changed, receipt.clipped) == (5, 4, 3, 2)
    assert (receipt.mean_delta, receipt.max_delta, receipt.no_effect, receipt.profile) == (0.5, 0.75, False, "")
    assert result.baseline_logits == result.logits
    assert torch.equal(values(result.baseline_logits.values), ramp((1, DIMS.d_vocab)))


async def test_an_edit_that_changed_nothing_says_so(connect: Connect) -> None:
    worker = StubWorker()

    def answer(job: Job, spec: RunSpec, index: int) -> Event:
        idle = RunOutput(receipts=(Receipt(0, 5, 5, 0, 0.0, 0.0, 0), Receipt(1, 5, 0, 0, 0.0, 0.0, 0)))
        return RunFinished(job.job_id, index, idle)

    worker.answer = answer
    request = run(interventions=[edit(zero={"target": target(layer=layer)}) for layer in (0, 1)])
    result = only_result(await (await connect(worker)).run(request))
    assert [receipt.no_effect for receipt in result.receipts] == [True, False]


async def test_large_tensors_follow_their_result_in_chunks_with_one_checksum(connect: Connect) -> None:
    worker = StubWorker()
    worker.scale = 10_000  # 5 positions x 160 000 entries x 4 bytes: 3 200 000 bytes a layer
    caller = await connect(worker)
    responses = await caller.run(run_pb2.RunRequest(runs=[run(read()).runs[0], run(read("EMBED")).runs[0]]))
    events = [response.WhichOneof("event") for response in responses]
    assert events == ["result", *["chunk"] * 12, "result", *["chunk"] * 4, None]
    assert [response.HasField("summary") for response in responses] == [*[False] * (len(responses) - 1), True]
    announced = [one.values for response in responses for one in response.result.reads]
    assert [wire.streamed.tensor_id for wire in announced] == [0, 1, 2, 3]
    for wire in announced:
        own = [r.chunk for r in responses if r.HasField("chunk") and r.chunk.tensor_id == wire.streamed.tensor_id]
        data = b"".join(chunk.data for chunk in own)
        assert len(data) == wire.streamed.total_bytes == 3_200_000
        assert [chunk.offset for chunk in own] == [0, 1 << 20, 2 << 20, 3 << 20]
        assert [chunk.HasField("crc32") for chunk in own] == [False, False, False, True]
        assert own[-1].crc32 == zlib.crc32(data)
        assert torch.equal(values(wire, data), ramp((5, 160_000)))


async def test_many_small_tensors_keep_the_message_below_what_receivers_take(connect: Connect) -> None:
    worker = StubWorker()
    worker.scale = 3_000  # 960 000 bytes a layer: each fits inline, all three do not
    responses = await (await connect(worker)).run(run(read()))
    assert max(response.ByteSize() for response in responses) < 1.1 * INLINE_BYTES
    wires = [one.values.WhichOneof("content") for one in responses[0].result.reads]
    assert wires == ["inline", "streamed", "streamed"]


@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES - 1, INLINE_BYTES, INLINE_BYTES + 1, 3 * INLINE_BYTES])
def test_a_tensor_is_inline_up_to_a_mebibyte(size: int) -> None:
    outlet, wire = Outlet(), tensor_pb2.Tensor()
    outlet.put(torch.zeros(size, dtype=torch.int32).view(torch.bfloat16)[:size].view(-1), wire)
    inline = 2 * size <= INLINE_BYTES
    assert wire.WhichOneof("content") == ("inline" if inline else "streamed")
    assert sum(len(chunk["data"]) for chunk in outlet.drain()) == (0 if inline else 2 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64])
def test_bytes_are_those_of_the_tensor_in_row_major_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    assert bytes(memory(tensor.t())) == bytes(memory(tensor.t().contiguous()))
    assert torch.equal(torch.frombuffer(bytearray(memory(tensor)), dtype=dtype).reshape(3, 4), tensor)


def test_chunks_are_cut_without_copying_the_tensor() -> None:
    tensor = torch.zeros(INLINE_BYTES, dtype=torch.float32)
    assert np.shares_memory(np.frombuffer(memory(tensor), np.uint8), tensor.numpy())
    assert [chunk["offset"] for chunk in chunks(7, tensor)] == [0, 1 << 20, 2 << 20, 3 << 20]


async def test_a_run_that_fails_does_so_alone(connect: Connect) -> None:
    worker = StubWorker(make_tokenizer())

    def answer(job: Job, spec: RunSpec, index: int) -> Event:
        reason = FailedPrecondition("no position was selected", reason="INTERVENTION_NEVER_FIRED", metadata={"a": "b"})
        return RunFailed(job.job_id, index, reason)

    worker.answer = answer
    responses = await (await connect(worker)).run(run())
    failure = only_result(responses).failure
    assert (failure.code, failure.reason, failure.message, dict(failure.metadata)) == (
        9,
        14 - 3,
        "no position was selected",
        {"a": "b"},
    )


async def test_the_request_reaches_the_worker_as_it_was_meant(caller: Caller) -> None:
    request = run(read("ATTN_Z", layer=2, head=3), read("ATTN_K", heads=[1, 0]))
    request.numerics = numerics_pb2.NUMERICS_SOLO
    await caller.run(request)
    (job,) = caller.worker.jobs.values()
    first, second = job.runs[0].reads
    assert job.solo
    assert job.runs[0].token_ids == (1, 2, 3, 4, 5)
    assert (first.layers, first.heads) == ((2,), (3,))
    assert (second.layers, second.heads) == ((0, 1, 2), (1, 0))


async def test_describe_tells_sizes_sites_limits_and_capabilities(connect: Connect) -> None:
    caller = await connect(
        max_runs=7,
        max_reads=8,
        max_tokens=9,
        max_result_bytes=10,
        max_message_bytes=1 << 20,
        max_prompt_characters=11,
        max_waiting_bytes=12,
    )
    told = await caller.model.Describe(model_pb2.DescribeRequest(model="stub"))
    assert (told.model.name, told.model.revision, told.model.architecture) == ("stub", "r1", "StubForCausalLM")
    assert (told.model.dtype, list(told.model.devices)) == (tensor_pb2.DTYPE_FLOAT32, ["cpu"])
    assert (told.model.parameters, told.model.layout) == (1234, model_pb2.BLOCK_LAYOUT_PARALLEL)
    assert told.model.has_chat_template
    assert (told.model.dims.n_layers, told.model.dims.n_kv_heads, told.model.dims.d_vocab) == (3, 2, 50)
    sites = {site.name: site for site in told.sites}
    assert [(axis.name, axis.size) for axis in sites["attn.pattern"].axes] == [("head", 4), ("query", 0), ("key", 0)]
    assert (sites["attn.pattern"].writable, sites["attn.pattern"].read_only_reason) == (False, "patterns are read only")
    assert (list(sites["mlp.post"].layers), list(sites["embed"].layers)) == ([0, 2], [])
    assert [(absent.name, list(absent.layers), absent.reason) for absent in told.absent_sites] == [
        ("resid_mid", [], "its blocks are parallel"),
        ("mlp.post", [1], "layer 1 has no MLP"),
    ]
    limits = told.limits
    assert (limits.max_runs, limits.max_reads, limits.max_tokens, limits.max_result_bytes) == (7, 8, 9, 10)
    assert (limits.max_message_bytes, limits.inline_bytes) == (1 << 20, INLINE_BYTES)
    assert (limits.max_prompt_characters, limits.max_waiting_bytes) == (11, 12)
    available = {capability.name for capability in told.capabilities if capability.available}
    assert {
        "runs",
        "reads",
        "generation",
        "generation.batched",
        "numerics.default",
        "numerics.solo",
        "interventions",
        "baseline",
    } <= available
    assert {"interventions.add", "interventions.patch", "interventions.freeze"} <= available
    unavailable = [capability for capability in told.capabilities if not capability.available]
    assert {"interventions.feature", "interventions.patch.handle", "handles"} <= {
        capability.name for capability in unavailable
    }
    assert all(capability.reason for capability in unavailable)


def test_describe_says_why_generations_share_no_cache() -> None:
    facts = replace(FACTS, no_slots_reason="its attention is its own")
    told = {one.name: one for one in capabilities(facts)}
    assert len(told) == len(capabilities(facts)) == len(capabilities(FACTS))
    assert told["generation"].available and not told["generation.batched"].available
    assert told["generation.batched"].reason == "generations of this model run one by one: its attention is its own"
    (batched,) = (one for one in capabilities(FACTS) if one.name == "generation.batched")
    assert (batched.available, batched.reason) == (True, "")


async def test_tokenize_gives_tokens_as_a_run_would(caller: Caller) -> None:
    said = [prompt_pb2.ChatMessage(role="user", content="w1")]
    chat = prompt_pb2.Prompt(chat=prompt_pb2.Chat(messages=said))
    closed = prompt_pb2.Prompt(chat=prompt_pb2.Chat(messages=said, omit_generation_prompt=True))
    prompts = [text("hello w2"), ids(1, 2), chat, closed]
    told = await caller.model.Tokenize(model_pb2.TokenizeRequest(prompts=prompts))
    assert [[token.id for token in prompt.tokens] for prompt in told.prompts] == [
        [49, 2],
        [1, 2],
        [46, 1, 47],
        [46, 1],
    ]
    assert told.prompts[2].text == "user w1 go"


async def test_a_large_request_is_read_beside_the_event_loop(caller: Caller) -> None:
    many = run_pb2.RunRequest(runs=[run(*[read()] * 100).runs[0]] * 100)
    responses = await caller.run(many)
    assert sum(response.HasField("result") for response in responses) == 100
