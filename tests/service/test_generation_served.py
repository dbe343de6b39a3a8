"""Generations through a running server: tokens, texts, edits and reads as callers get them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.models import plain_model, resident
from families import family_named
from patchclamp.v1 import generation_pb2, intervention_pb2, model_pb2, read_pb2, run_pb2, tensor_pb2
from patchclamp_server import demo
from patchclamp_server.adapters.load import ModelSource
from patchclamp_server.engine.loading import Resident, load_resident
from patchclamp_server.engine.worker import Worker
from service.build import edit, generation, ids, read, span, target, text, vector
from service.calls import Caller, failure_of, serving
from service.test_calls import eventually

PROMPT = (5, 17, 3, 40, 11)
D_MODEL = 32
ALONG = np.linspace(-1, 2, D_MODEL, dtype="f4")
STREAM = {"target": target(layer=1)}
# Float32 on the CPU: a step computes the same sums as a whole run, in another order.
ROUNDING = 2e-5


@cache
def bundled() -> Resident:
    return load_resident(ModelSource(str(demo.model_dir()), "demo"), lambda _: None)


@pytest.fixture
async def caller() -> AsyncIterator[Caller]:
    """A caller of the engine itself, with a tiny model that has no tokenizer."""
    async with serving(Worker(lambda _: resident(family_named("llama")))) as found:
        yield found


@pytest.fixture
async def reader() -> AsyncIterator[Caller]:
    """A caller of the engine with the bundled model, which has one."""
    async with serving(Worker(lambda _: bundled())) as found:
        yield found


@dataclass
class Sample:
    """What came of one sample."""

    tokens: list[generation_pb2.GeneratedToken] = field(default_factory=list)
    end: generation_pb2.SampleEnd | None = None

    @property
    def ids(self) -> list[int]:
        return [token.token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def finish(self) -> int:
        assert self.end is not None
        return self.end.finish_reason


@dataclass(frozen=True)
class Stream:
    """One stream taken apart; its order is checked."""

    start: generation_pb2.GenerationStart
    samples: list[Sample]
    summary: generation_pb2.GenerationSummary

    @classmethod
    def of(cls, responses: Sequence[generation_pb2.GenerateResponse]) -> Stream:
        first, *rest, last = responses
        assert (first.WhichOneof("event"), last.WhichOneof("event")) == ("start", "summary")
        found: dict[int, Sample] = {}
        for response in rest:
            match response.WhichOneof("event"):
                case "token":
                    sample = found.setdefault(response.token.sample_index, Sample())
                    assert sample.end is None
                    sample.tokens.append(response.token)
                case "sample_end":
                    sample = found.setdefault(response.sample_end.sample_index, Sample())
                    assert sample.end is None
                    sample.end = response.sample_end
                case other:
                    assert other == "chunk"
        for sample in found.values():
            assert sample.end is not None
            first_index = sample.tokens[0].token_index if sample.tokens else 0
            expected = list(range(first_index, first_index + len(sample.tokens)))
            assert [token.token_index for token in sample.tokens] == expected
        assert last.summary.generated_tokens == sum(len(sample.tokens) for sample in found.values())
        return cls(first.start, [found[number] for number in sorted(found)], last.summary)

    @property
    def only(self) -> Sample:
        (sample,) = self.samples
        return sample


async def stream(caller: Caller, new: int = 8, **fields: Any) -> Stream:
    given = {"prompt": ids(*PROMPT)} | fields
    return Stream.of(await caller.generate(generation(new, **given)))


def array(wire: tensor_pb2.Tensor) -> npt.NDArray[np.float32]:
    return np.frombuffer(wire.inline, "<f4").reshape(*wire.shape)


def add(strength: float, **fields: Any) -> intervention_pb2.Intervention:
    return edit(add=STREAM | {"vector": vector(ALONG), "strength": strength}, **fields)


def greedy(model: Any, prompt: Sequence[int], new: int, eos: int | None = None) -> list[int]:
    given = torch.tensor([list(prompt)])
    whole = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, eos_token_id=eos,
        pad_token_id=0,
    )  # fmt: skip
    return whole[0, len(prompt) :].tolist()


async def test_greedy_tokens_are_those_of_transformers(caller: Caller) -> None:
    found = await stream(caller, 12)
    assert found.only.ids == greedy(plain_model(family_named("llama")), PROMPT, 12)
    assert found.only.finish == generation_pb2.FINISH_REASON_LENGTH
    assert [token.id for token in found.start.prompt] == list(PROMPT)
    summary = found.summary
    assert (summary.prompt_tokens, summary.generated_tokens) == (5, 12)
    assert 0 < summary.engine_seconds < 30 and 0 < summary.first_token_seconds < 30
    assert "r0" in summary.fingerprint


async def test_the_context_ends_a_sample(caller: Caller) -> None:
    found = await stream(caller, 50, prompt=ids(*[3] * 60))
    assert (len(found.only.tokens), found.only.finish) == (4, generation_pb2.FINISH_REASON_CONTEXT)


async def test_steering_generated_tokens_leaves_the_first_alone(caller: Caller) -> None:
    plain = await stream(caller)
    steered = await stream(caller, interventions=[add(20.0, positions=span("GENERATED"))])
    everywhere = await stream(caller, interventions=[add(20.0)])
    # The last prompt token's forward yields the first: it is no generated position.
    assert steered.only.ids[0] == plain.only.ids[0]
    assert steered.only.tokens[0].logprob == pytest.approx(plain.only.tokens[0].logprob, abs=1e-5)
    assert steered.only.ids[1:] != plain.only.ids[1:]
    assert everywhere.only.tokens[0].logprob != pytest.approx(plain.only.tokens[0].logprob, abs=1e-3)
    assert steered.only.end is not None and everywhere.only.end is not None
    (receipt,) = steered.only.end.receipts
    assert (receipt.rows_selected, receipt.rows_fired, receipt.rows_changed) == (7, 7, 7)
    assert everywhere.only.end.receipts[0].rows_fired == 12
    assert not plain.only.end or not plain.only.end.receipts


async def test_reads_come_with_their_tokens_and_are_those_of_a_run_over_all(caller: Caller) -> None:
    watch = [read(), read("ATTN_PATTERN", layer=1, positions=span("GENERATED"))]
    steered = [add(2.0)]
    found = await stream(caller, reads=watch, interventions=steered)
    whole = (*PROMPT, *found.only.ids)[:-1]
    spec = run_pb2.RunSpec(prompt=ids(*whole), reads=[read(), read("ATTN_PATTERN", layer=1)], interventions=steered)
    result = (await caller.run(run_pb2.RunRequest(runs=[spec])))[0].result
    assert not result.HasField("failure")
    for layer in (0, 1):
        parts = [
            one for token in found.only.tokens for one in token.reads
            if one.read_index == 0 and one.hook_point.layer == layer
        ]  # fmt: skip
        ranges = [(one.position_range.start, one.position_range.stop) for one in parts]
        assert ranges == [(0, 5), *((place, place + 1) for place in range(5, 12))]
        got = np.concatenate([array(one.values) for one in parts])
        np.testing.assert_allclose(got, array(result.reads[layer].values), rtol=0, atol=ROUNDING)
    for index, token in enumerate(found.only.tokens):
        patterns = [one for one in token.reads if one.read_index == 1]
        assert len(patterns) == (index > 0)
        for one in patterns:
            place = len(PROMPT) + index - 1
            want = array(result.reads[2].values)[:, place : place + 1, : place + 1]
            np.testing.assert_allclose(array(one.values), want, rtol=0, atol=ROUNDING)


async def test_large_reads_come_in_chunks_behind_their_token(caller: Caller) -> None:
    # All projections of a long prompt: more than a message holds.
    onto = vector(np.ones((256, D_MODEL)))
    many = [read(reduction=read_pb2.Reduction(project=read_pb2.ProjectReduction(onto=[onto])))] * 12
    responses = await caller.generate(generation(2, prompt=ids(*[3] * 60), reads=many))
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds[:2] == ["start", "token"] and "chunk" in kinds
    assert kinds.index("sample_end") > max(place for place, kind in enumerate(kinds) if kind == "chunk")
    streamed = [one.values.streamed for one in responses[1].token.reads if one.values.HasField("streamed")]
    sent = sum(len(response.chunk.data) for response in responses if response.HasField("chunk"))
    assert sent == sum(tensor.total_bytes for tensor in streamed) > 0


async def test_log_probabilities_of_the_most_probable_come_when_asked_for(caller: Caller) -> None:
    found = await stream(caller, 3, top_logprobs=4)
    for token in found.only.tokens:
        assert len(token.top) == 4
        assert token.top[0].id == token.token.id
        assert token.top[0].logprob == pytest.approx(token.logprob, abs=1e-5)
    assert not (await stream(caller, 1)).only.tokens[0].top


async def test_samples_differ_and_a_seed_repeats_them(caller: Caller) -> None:
    sampling = {"temperature": 1.5, "samples": 3}
    once = await stream(caller, sampling=sampling)
    assert len({tuple(sample.ids) for sample in once.samples}) == 3
    again = await stream(caller, sampling=sampling | {"seed": once.start.seed})
    assert [sample.ids for sample in again.samples] == [sample.ids for sample in once.samples]
    assert again.start.seed == once.start.seed
    other = await stream(caller, sampling=sampling)
    assert other.start.seed != once.start.seed
    assert [sample.ids for sample in other.samples] != [sample.ids for sample in once.samples]


async def test_callers_with_different_edits_do_not_disturb_each_other(caller: Caller) -> None:
    requests: list[dict[str, Any]] = [
        {"interventions": [add(4.0)]},
        {"interventions": [edit(zero={"target": target("MLP_OUT", layer=0)}, positions=span("GENERATED"))]},
        {"sampling": {"temperature": 1.2, "seed": 4, "samples": 2}, "prompt": ids(9, 33, 21)},
        {},
    ]
    alone = [await stream(caller, 16, **fields) for fields in requests]
    together = await asyncio.gather(*(stream(caller, 16, **fields) for fields in requests))
    for one, other in zip(alone, together, strict=True):
        assert [sample.ids for sample in one.samples] == [sample.ids for sample in other.samples]
    assert len({tuple(one.samples[0].ids) for one in alone}) == 4


async def test_a_generation_beside_runs_changes_neither(caller: Caller) -> None:
    request = run_pb2.RunRequest(runs=[run_pb2.RunSpec(prompt=ids(*PROMPT), reads=[read()])])
    (before,) = await caller.run(request)
    alone = await stream(caller, 30, interventions=[add(4.0)])
    beside, (after,) = await asyncio.gather(stream(caller, 30, interventions=[add(4.0)]), caller.run(request))
    assert beside.only.ids == alone.only.ids
    np.testing.assert_allclose(
        array(after.result.reads[1].values), array(before.result.reads[1].values), rtol=0, atol=ROUNDING
    )


async def test_a_broken_stream_goes_on_where_it_was(caller: Caller) -> None:
    fields: dict[str, Any] = {
        "sampling": {"temperature": 1.5, "repetition_penalty": 1.2, "samples": 2},
        "interventions": [add(2.0, positions=span("GENERATED"))],
    }
    call = caller.runs.Generate(generation(20, prompt=ids(*PROMPT), **fields))
    received: dict[int, list[int]] = {0: [], 1: []}
    seed = 0
    async for response in call:
        if response.HasField("start"):
            seed = response.start.seed
        elif response.HasField("token"):
            received[response.token.sample_index].append(response.token.token.id)
            if len(received[0]) == 7:
                break
    call.cancel()
    whole = await stream(caller, 20, **fields | {"sampling": fields["sampling"] | {"seed": seed}})
    given = [{"sample_index": number, "token_ids": tokens} for number, tokens in received.items()]
    rest = await stream(caller, 20, resume={"received": given, "seed": seed}, **fields)
    assert rest.start.seed == seed
    for number, tokens in received.items():
        assert rest.samples[number].tokens[0].token_index == len(tokens)
        assert [*tokens, *rest.samples[number].ids] == whole.samples[number].ids


async def test_a_sample_that_had_ended_is_told_as_ended(caller: Caller) -> None:
    sampling = {"temperature": 1.5, "seed": 3, "samples": 2}
    whole = await stream(caller, 6, sampling=sampling)
    given = [
        {"sample_index": 0, "token_ids": whole.samples[0].ids},
        {"sample_index": 1, "token_ids": whole.samples[1].ids[:2]},
    ]
    rest = await stream(caller, 6, sampling=sampling, resume={"received": given, "seed": 3})
    assert (rest.samples[0].tokens, rest.samples[0].finish) == ([], generation_pb2.FINISH_REASON_LENGTH)
    assert rest.samples[1].ids == whole.samples[1].ids[2:]


async def test_a_cancelled_call_frees_the_engine(caller: Caller) -> None:
    calls = [caller.runs.Generate(generation(55, sampling={"samples": 16})) for _ in range(2)]
    for call in calls:
        assert (await call.read()).HasField("start")
        assert (await call.read()).HasField("token")
        call.cancel()
    await eventually(lambda: caller.worker.waiting == 0)
    assert len((await stream(caller)).only.ids) == 8


async def test_the_deadline_ends_a_generation(caller: Caller) -> None:
    async def late() -> None:
        async for _ in caller.runs.Generate(generation(4000, sampling={"samples": 64}, prompt=ids(1)), timeout=0.05):
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await late()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: caller.worker.waiting == 0)
    assert len((await stream(caller)).only.ids) == 8


async def test_an_edit_that_never_fires_fails_the_call_unless_it_may(caller: Caller) -> None:
    nothing = span("GENERATED")
    failure = await failure_of(stream(caller, 1, interventions=[add(1.0), add(1.0, positions=nothing)]))
    assert failure.code == grpc.StatusCode.FAILED_PRECONDITION
    assert failure.info.reason == "INTERVENTION_NEVER_FIRED"
    assert "interventions[1]" in failure.message
    assert "max_new_tokens=1" in failure.message
    allowed = await stream(caller, 1, interventions=[add(1.0, positions=nothing, allow_never_fired=True)])
    assert allowed.only.end is not None
    assert allowed.only.end.receipts[0].rows_selected == 0


async def test_bad_input_names_every_field_over_the_wire(caller: Caller) -> None:
    request = generation(0, sampling={"top_p": 3.0}, stop={"texts": [""]}, reads=[read(layer=7)])
    failure = await failure_of(caller.generate(request))
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(failure.violations) == {
        "sampling.top_p",
        "stop.texts",
        "stop.texts[0]",
        "stop.max_new_tokens",
        "reads[0].hook_point.layer",
    }
    assert caller.worker.waiting == 0


async def test_solo_and_default_agree(caller: Caller) -> None:
    solo = await stream(caller, numerics="NUMERICS_SOLO")
    assert solo.only.ids == (await stream(caller)).only.ids


TEXT = "the"


async def test_the_bundled_model_writes_what_transformers_writes(reader: Caller) -> None:
    tokenizer = bundled().tokenizer
    assert tokenizer is not None
    (end,) = tokenizer.end_ids
    found = await stream(reader, 30, prompt=text(TEXT))
    prompt = [token.id for token in found.start.prompt]
    with torch.no_grad():
        expected = greedy(demo_model(), prompt, 30, end)
    assert found.only.ids == expected
    assert found.only.text == tokenizer.decode([*prompt, *expected]).removeprefix(tokenizer.decode(prompt))
    stopped = expected[-1] == end
    reason = generation_pb2.FINISH_REASON_STOP if stopped else generation_pb2.FINISH_REASON_LENGTH
    assert found.only.finish == reason


@cache
def demo_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo.model_dir()).eval()


async def test_tokens_tell_where_they_stand_in_the_text(reader: Caller) -> None:
    found = await stream(reader, 30, prompt=text(TEXT), stop={"ignore_eos": True})
    place = 0
    for token in found.only.tokens:
        assert token.token.start == place
        place = token.token.end
        piece = found.only.text[token.token.start : token.token.end]
        assert piece in (token.token.text, "")
    assert place == len(found.only.text)


async def test_a_stop_text_never_appears_though_it_spans_tokens(reader: Caller) -> None:
    free = (await stream(reader, 30, prompt=text(TEXT))).only
    for start in range(0, len(free.text) - 5, 3):
        stop = free.text[start : start + 5]
        stopped = (await stream(reader, 30, prompt=text(TEXT), stop={"texts": ["\x00", stop]})).only
        assert stopped.text == free.text[: free.text.index(stop)]
        assert stopped.finish == generation_pb2.FINISH_REASON_STOP
        assert stopped.ids == free.ids[: len(stopped.ids)]


async def test_what_looked_like_a_stop_text_comes_with_the_last_token(reader: Caller) -> None:
    free = (await stream(reader, 12, prompt=text(TEXT))).only
    almost = free.text[-2:] + "\x00"
    held = (await stream(reader, 12, prompt=text(TEXT), stop={"texts": [almost]})).only
    assert (held.text, held.ids) == (free.text, free.ids)
    assert held.tokens[-1].text.endswith(free.text[-1])
    # Also where a token ends it that is no text.
    stopped = await stream(reader, 30, prompt=text(TEXT), stop={"texts": [almost], "token_ids": [free.ids[-1]]})
    first = free.ids.index(free.ids[-1])
    assert stopped.only.ids == free.ids[: first + 1]
    before = (await stream(reader, first, prompt=text(TEXT))).only.text if first else ""
    assert stopped.only.text == before


async def test_texts_of_a_broken_stream_and_of_what_goes_on_join(reader: Caller) -> None:
    free = (await stream(reader, 16, prompt=text(TEXT))).only
    # Held back for a while, wherever the stream breaks.
    stop = {"texts": [free.text[7:20] + "\x00", free.text[-4:]]}
    whole = (await stream(reader, 16, prompt=text(TEXT), stop=stop)).only
    assert whole.text == free.text[: free.text.index(free.text[-4:])]
    for count in range(1, len(whole.tokens)):
        given = [{"token_ids": whole.ids[:count]}]
        fields = {"prompt": text(TEXT), "stop": stop, "sampling": {"seed": 5}}
        rest = (await stream(reader, 16, resume={"received": given, "seed": 5}, **fields)).only
        assert [*whole.tokens[:count], *rest.tokens][-1].token == whole.tokens[-1].token
        assert "".join(token.text for token in whole.tokens[:count]) + rest.text == whole.text


async def test_describe_lists_generation(reader: Caller) -> None:
    told = await reader.model.Describe(model_pb2.DescribeRequest())
    assert {one.name: one.available for one in told.capabilities}["generation"]
