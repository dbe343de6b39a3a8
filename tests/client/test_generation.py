"""Generation: what travels, what comes back token by token and at the end, and how streams are left and taken up."""

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2 as rpc
from google.rpc import status_pb2

import patchclamp as pc
from client.stand_in import (
    STORY,
    VOCABULARY,
    Failure,
    StandIn,
    ends,
    inline,
    receipt,
    sample_end,
    started,
    story,
    streamed,
    tokenized,
    word,
)
from patchclamp._generation import joined
from patchclamp._results import Activation
from patchclamp.v1 import error_pb2, failure_pb2, hook_point_pb2, model_pb2, numerics_pb2, tensor_pb2
from patchclamp.v1 import generation_pb2 as pb

PROMPT = "Fact: the capital of Texas is"
SITE = "blocks.1.resid_post"
GONE = Failure(grpc.StatusCode.UNAVAILABLE, "connection lost")


def sent(server: StandIn) -> list[pb.GenerateRequest]:
    return server.seen(pb.GenerateRequest)


def words(count: int, ahead: int = 0) -> str:
    return "".join(VOCABULARY[STORY[(i + ahead) % len(STORY)]] for i in range(count))


def a_token(message: pb.GeneratedToken) -> pb.GenerateResponse:
    return pb.GenerateResponse(token=message)


def break_after(server: StandIn, *counts: int, failure: Failure = GONE) -> None:
    """Breaks the first streams, each after so many messages; the rest is told in full."""
    left = list(counts)

    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        count = left.pop(0) if left else None
        for number, response in enumerate(story(request)):
            if number == count:
                raise failure
            yield response

    server.on_generate = answer


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken streams are taken up without a pause."""
    monkeypatch.setattr("patchclamp._generation_stream._FIRST_PAUSE", 0.001)


def test_a_generation(server: StandIn, client: pc.Client) -> None:
    made = client.generate(PROMPT, max_new_tokens=5, top_logprobs=2)
    assert isinstance(made, pc.Generation)
    assert made.text == words(5)
    assert made.tokens == tuple(STORY[:5])
    assert all(type(token) is int for token in made.tokens)
    assert made.strings[0] == " capital"
    assert made.prompt_tokens.strings == ("<bos>", "Fact", ":", " the", " capital", " of", " Texas", " is")
    assert made.prompt_tokens.text == PROMPT
    assert made.logprobs.dtype == np.float32
    assert made.logprobs.tolist() == [-0.5, -1.0, -1.5, -2.0, -2.5]
    assert [[top.id for top in row] for row in made.top] == [[0, 1]] * 5
    assert made.top[0][0].probability == pytest.approx(np.exp(-1.0))
    assert (made.finish_reason, made.seed, made.receipts) == ("length", 99, ())
    assert made.summary == pc.GenerationSummary(8, 5, 0.02, 0.1, "f0")
    assert len(made.samples) == 1 and made.samples[0].text == made.text
    assert repr(made) == "Generation(' capital of Texas is Austin', tokens=5, finish_reason='length', seed=99)"
    assert list(made.reads) == [] and made.top is not None


def test_what_travels(server: StandIn, client: pc.Client) -> None:
    client.generate(
        [2, 3],
        max_new_tokens=7,
        temperature=0.7,
        top_k=40,
        top_p=0.95,
        repetition_penalty=1.1,
        seed=2**64 - 1,
        samples=2,
        stop=["\n", 9, "END", np.int64(4)],
        ignore_eos=True,
        top_logprobs=3,
        numerics="deterministic",
        read=SITE,
    )
    (request,) = sent(server)
    assert request.prompt.token_ids.ids == [2, 3]
    assert request.sampling == pb.Sampling(
        temperature=0.7, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=2**64 - 1, samples=2
    )
    assert request.stop == pb.StopRules(max_new_tokens=7, texts=["\n", "END"], token_ids=[9, 4], ignore_eos=True)
    assert (request.top_logprobs, request.numerics) == (3, numerics_pb2.NUMERICS_DETERMINISTIC)
    assert request.reads[0].hook_point == hook_point_pb2.HookPoint(site=hook_point_pb2.SITE_RESID_POST, layer=1)
    assert not request.HasField("resume")


def test_defaults(server: StandIn, client: pc.Client) -> None:
    assert len(client.generate(PROMPT).tokens) == 64
    (request,) = sent(server)
    assert request.sampling == pb.Sampling(temperature=0, top_p=1, repetition_penalty=1, samples=1)
    assert not request.sampling.HasField("seed")
    assert request.stop == pb.StopRules(max_new_tokens=64)
    assert request.numerics == numerics_pb2.NUMERICS_DEFAULT
    assert not server.seen(model_pb2.TokenizeRequest)


def test_one_stop_needs_no_list(server: StandIn, client: pc.Client) -> None:
    client.generate(PROMPT, stop="\n")
    client.generate(PROMPT, stop=3)
    assert [(list(r.stop.texts), list(r.stop.token_ids)) for r in sent(server)] == [(["\n"], []), ([], [3])]


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"max_new_tokens": 0}, pc.InvalidArgument, "^max_new_tokens: 0 is not in 1"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens is a whole number"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens is a whole number"),
        ({"temperature": "hot"}, TypeError, "temperature is a number"),
        ({"temperature": float("nan")}, pc.InvalidArgument, "^temperature: nan is not finite"),
        ({"top_k": -1}, pc.InvalidArgument, "^top_k"),
        ({"top_p": None}, TypeError, "top_p"),
        ({"repetition_penalty": float("inf")}, pc.InvalidArgument, "^repetition_penalty"),
        ({"seed": -1}, pc.InvalidArgument, "^seed"),
        ({"seed": 2**64}, pc.InvalidArgument, "^seed"),
        ({"samples": 0}, pc.InvalidArgument, "^samples"),
        ({"stop": ["a", ""]}, pc.InvalidArgument, "^stop: an empty text"),
        ({"stop": [1.5]}, TypeError, "stop is a list of texts and token ids"),
        ({"stop": 1.5}, TypeError, "stop is a list of texts and token ids"),
        ({"stop": [-1]}, pc.InvalidArgument, "^stop"),
        ({"stop": "\ud800"}, pc.InvalidArgument, "^stop"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos is True or False"),
        ({"top_logprobs": -1}, pc.InvalidArgument, "^top_logprobs"),
        ({"numerics": "exact"}, pc.InvalidArgument, "^numerics"),
        ({"read": "blocks.0.resid_pots"}, pc.InvalidArgument, "^read"),
        ({"interventions": ["zero"]}, TypeError, r"interventions\[0\] is pc.add"),
    ],
)
def test_arguments_that_are_none(
    server: StandIn, client: pc.Client, arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    for verb in (client.generate, client.stream):
        with pytest.raises(kind, match=words):
            verb(PROMPT, **arguments)
    assert server.calls == []


def test_prompts_that_are_none_say_which(server: StandIn, client: pc.Client) -> None:
    with pytest.raises(pc.InvalidArgument, match=r"^prompt\[1\]: an empty list"):
        client.generate([[2], []])
    with pytest.raises(pc.InvalidArgument, match=r"^prompt: a list of prompts"):
        client.stream(["Fact", "Fact"])  # type: ignore[arg-type]
    assert server.calls == []


def test_tokens_come_one_by_one(server: StandIn, client: pc.Client) -> None:
    go_on = threading.Event()

    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        for number, response in enumerate(story(request)):
            if number == 3:
                assert go_on.wait(10)
            yield response

    server.on_generate = answer
    stream = client.stream(PROMPT, max_new_tokens=4, top_logprobs=1)
    assert repr(stream) == "GenerationStream(not begun)"
    first, second = next(stream), next(stream)
    assert (first.text, first.id, first.index, first.sample, first.logprob) == (" capital", 5, 0, 0, -0.5)
    assert (first.string, first.start, first.end) == (" capital", 0, 8)
    assert (second.index, second.top[0].text) == (1, "<bos>")
    assert repr(second) == "GeneratedToken(' of', index=1, sample=0)"
    with pytest.raises(RuntimeError, match="has not ended"):
        stream.result  # noqa: B018
    assert stream.so_far.tokens == (5, 6)
    assert (stream.so_far.finish_reason, stream.so_far.summary) == (None, None)
    go_on.set()
    assert [token.index for token in stream] == [2, 3]
    assert stream.result.text == words(4)
    assert "ended" in repr(stream)
    assert list(stream) == []


def test_text_that_is_held_back(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        for index, text in enumerate(["", "é", " and", ""]):
            message = word(request, 0, index)
            message.text = text
            yield a_token(message)
        end = sample_end(request)
        end.finish_reason = pb.FINISH_REASON_STOP
        yield pb.GenerateResponse(sample_end=end)
        yield list(ends(request))[-1]

    server.on_generate = answer
    made = client.generate(PROMPT, stop="\n")
    assert (made.text, len(made.tokens), made.finish_reason) == ("é and", 4, "stop")


def test_several_samples_come_mixed(server: StandIn, client: pc.Client) -> None:
    stream = client.stream(PROMPT, max_new_tokens=3, samples=2, read=SITE)
    assert [(token.sample, token.index) for token in stream] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    made = stream.result
    assert [sample.text for sample in made.samples] == [words(3), words(3, 1)]
    assert [sample[SITE].shape for sample in made.samples] == [(10, 4)] * 2
    assert repr(made) == "Generation(2 samples, seed=99)"
    with pytest.raises(AttributeError, match="2 samples: take one of"):
        made.text  # noqa: B018
    assert "Sample(' capital of Texas', tokens=3, finish_reason='length', reads=1)" in repr(made.samples)


def test_reads_are_those_of_all_forwards(server: StandIn, client: pc.Client) -> None:
    stream = client.stream(PROMPT, max_new_tokens=4, read=[SITE, "blocks.0.resid_pre"])
    assert [token.reads[SITE].positions for token in stream] == [tuple(range(8)), (8,), (9,), (10,)]
    made = stream.result
    assert list(made) == [SITE, "blocks.0.resid_pre"]
    assert SITE in made and "embed" not in made
    read = made[SITE]
    assert read.shape == (8 + 4 - 1, 4)
    assert read.positions == tuple(range(11))
    np.testing.assert_array_equal(read[:, 0], np.arange(11))
    assert (read.hook_point, read.reduce) == (SITE, None)
    assert made.reads is made.reads
    with pytest.raises(KeyError, match="was not read"):
        made["embed"]


def part(name: str, values: Any, positions: Any = (), reduce: str | None = None, indices: Any = None) -> Activation:
    return Activation.of(np.asarray(values, np.float32), name, positions=positions, reduce=reduce, indices=indices)


def test_patterns_are_as_wide_as_the_longest_sequence() -> None:
    pattern = joined(
        [
            part("blocks.0.attn.pattern", np.ones((2, 3, 3)), (0, 1, 2)),
            part("blocks.0.attn.pattern", np.ones((2, 1, 4)), (3,)),
        ]
    )
    assert pattern.shape == (2, 4, 4)
    assert pattern[0, :, 3].tolist() == [0, 0, 0, 1]
    assert pattern.positions == (0, 1, 2, 3)
    scores = joined(
        [part("blocks.0.attn.scores", np.ones((2, 1, 1)), (0,)), part("blocks.0.attn.scores", np.ones((2, 1, 2)), (1,))]
    )
    assert scores[1].tolist() == [[1, -np.inf], [1, 1]]


@pytest.mark.parametrize(("site", "empty"), [("pattern", 0), ("scores", -np.inf)])
@pytest.mark.parametrize("reduce", ["last", "mean", "moments"])
def test_reductions_over_queries_are_as_wide_as_the_longest_sequence(site: str, empty: float, reduce: str) -> None:
    before = (2, 2) if reduce == "moments" else (2,)
    widths = (3, 4, 5)
    read = joined([part(f"blocks.0.attn.{site}", np.ones((*before, width)), (), reduce) for width in widths])
    assert (read.shape, read.reduce, read.positions) == ((3, *before, 5), reduce, ())
    for row, width in zip(np.asarray(read), widths, strict=True):
        assert (row[..., :width] == 1).all() and (row[..., width:] == empty).all()


def test_reductions_of_several_forwards() -> None:
    ids = [np.ones((3, 2), np.int32), np.zeros((1, 2), np.int32)]
    top = joined(
        [part(SITE, np.ones((3, 2)), (0, 1, 2), "topk", ids[0]), part(SITE, np.ones((1, 2)), (3,), "topk", ids[1])]
    )
    assert top.shape == (4, 2) and top.indices is not None and top.indices.shape == (4, 2)
    last = joined([part(SITE, np.ones(4), (), "last"), part(SITE, np.zeros(4), (), "last")])
    assert (last.shape, last.reduce, last.positions) == ((2, 4), "last", ())
    moments = joined([part(SITE, np.ones((2, 4)), (), "moments")] * 3)
    assert moments.shape == (3, 2, 4)
    norms = joined(
        [
            part("blocks.0.attn.pattern", np.ones((2, 3)), (0, 1, 2), "norm"),
            part("blocks.0.attn.pattern", np.ones((2, 1)), (3,), "norm"),
        ]
    )
    assert norms.shape == (2, 4)


def test_large_reads_come_in_chunks_behind_their_token(server: StandIn, client: pc.Client) -> None:
    values = np.random.default_rng(0).standard_normal((8, 50_000), np.float32)

    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        header, chunks = streamed(values, 3, 1 << 20)
        yield started(request)
        first = word(request, 0, 0)
        first.reads[0].values.CopyFrom(header)
        yield a_token(first)
        for chunk in chunks:
            yield pb.GenerateResponse(chunk=chunk)
        yield from ends(request)

    server.on_generate = answer
    stream = client.stream(PROMPT, max_new_tokens=1, read=SITE)
    np.testing.assert_array_equal(next(stream).reads[SITE], values)
    assert list(stream) == []
    np.testing.assert_array_equal(stream.result[SITE], values)


def test_a_list_of_prompts_runs_at_the_same_time(server: StandIn, client: pc.Client) -> None:
    meet = threading.Barrier(3, timeout=20)

    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        meet.wait()
        yield from story(request)

    server.on_generate = answer
    made = client.generate(["Fact", PROMPT, "Fact :"], max_new_tokens=2)
    assert [len(one.prompt_tokens) for one in made] == [2, 8, 3]
    assert [one.text for one in made] == [words(2)] * 3
    assert len(client.generate(["Fact"] * 3, max_new_tokens=2)) == 3


def test_an_interrupted_list_of_prompts_leaves_at_once(server: StandIn, client: pc.Client) -> None:
    endless(server)
    code = (
        "import patchclamp as pc\n"
        f"with pc.connect({server.target!r}) as client:\n    client.generate(['Fact'] * 3, max_new_tokens=1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert server.began.wait(20)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=10)[1]
    assert server.ended.wait(5)


def test_more_prompts_than_run_at_the_same_time(
    server: StandIn, client: pc.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchclamp._token_streams.AT_ONCE", 2)
    prompts = ["Fact " * (1 + number) for number in range(7)]
    made = client.generate(prompts, max_new_tokens=2)
    assert [len(one.prompt_tokens) for one in made] == [2 + number for number in range(7)]


def test_one_prompt_that_fails_raises_when_all_are_in(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        if request.prompt.text == "Fact":
            raise invalid(("prompt.text", "not this one"))
        yield from story(request)

    server.on_generate = answer
    with pytest.raises(pc.InvalidArgument, match=r"^prompt\[1\]\.text: not this one") as caught:
        client.generate([PROMPT, "Fact"], max_new_tokens=2)
    fine, failed = caught.value.results
    assert isinstance(fine, pc.Generation) and fine.text == words(2)
    assert failed is caught.value
    with pytest.raises(pc.InvalidArgument, match=r"^prompt\.text: not this one") as caught:
        client.generate("Fact", max_new_tokens=2)
    assert caught.value.results == ()


def invalid(*violations: tuple[str, str]) -> Failure:
    """A refusal that names fields as the server does."""
    status = status_pb2.Status(code=3, message="; ".join(map(": ".join, violations)))
    details = rpc.BadRequest(
        field_violations=[rpc.BadRequest.FieldViolation(field=field, description=what) for field, what in violations]
    )
    for detail in (rpc.ErrorInfo(reason="INVALID_FIELD", domain="patchclamp"), details):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return Failure(
        grpc.StatusCode.INVALID_ARGUMENT, status.message, (("grpc-status-details-bin", status.SerializeToString()),)
    )


def test_violations_name_the_arguments(server: StandIn, client: pc.Client) -> None:
    server.fail = [
        invalid(
            ("sampling.top_p", "2 is not in (0, 1]"),
            ("stop.max_new_tokens", "beyond n_ctx"),
            ("stop.token_ids[0]", "this vocabulary has 12; see stop.texts[1]"),
            ("stop.texts", "too many"),
            ("reads[1].positions", "out of range"),
            ("interventions[2].zero", "not here"),
            ("top_logprobs", "too many"),
        )
    ]
    two = pc.zero(["blocks.0.resid_post", SITE])
    with pytest.raises(pc.InvalidArgument) as caught:
        client.generate(
            PROMPT, read=["embed", SITE], interventions=[two, pc.zero(SITE)], stop=["a", 99, "b"], top_p=0.5
        )
    assert [str(violation) for violation in caught.value.field_violations] == [
        "top_p: 2 is not in (0, 1]",
        "max_new_tokens: beyond n_ctx",
        "stop[1]: this vocabulary has 12; see stop[2]",
        "stop: too many",
        "read[1].positions: out of range",
        "interventions[1].zero: not here",
        "top_logprobs: too many",
    ]
    server.fail = [invalid(("reads[0].positions", "out of range"), ("stop.texts[0]", "too long"))]
    with pytest.raises(pc.InvalidArgument) as caught:
        client.generate(PROMPT, read=SITE, stop="a")
    assert [violation.field for violation in caught.value.field_violations] == ["read.positions", "stop"]


def test_receipts(server: StandIn, client: pc.Client) -> None:
    two = pc.ablate(["blocks.0.resid_post", SITE], "refusal", positions=pc.GENERATED)
    made = client.generate(PROMPT, max_new_tokens=3, interventions=[pc.zero(SITE), two])
    assert [item.WhichOneof("op") for item in sent(server)[0].interventions] == ["zero", "ablate", "ablate"]
    first, second = made.receipts
    assert (first.rows_selected, second.rows_selected, second.intervention) == (10, 20, two)
    assert "receipts=2" in repr(made)


def test_positions_and_tokens_are_looked_up(server: StandIn, client: pc.Client) -> None:
    edit = pc.add(SITE, pc.unembed(" Austin"), positions=pc.at("Texas"))
    client.generate(
        [PROMPT, "Fact: Texas"], max_new_tokens=1, interventions=edit, read=pc.read(SITE, positions=pc.at("Fact"))
    )
    (tokenize,) = server.seen(model_pb2.TokenizeRequest)
    assert len(tokenize.prompts) == 3
    found = {request.prompt.text: request for request in sent(server)}
    assert list(found[PROMPT].interventions[0].positions.indices.indices) == [6]
    assert list(found["Fact: Texas"].interventions[0].positions.indices.indices) == [3]
    assert found[PROMPT].interventions[0].add.vector.unembed_token == 9
    assert list(found[PROMPT].reads[0].positions.indices.indices) == [1]
    with pytest.raises(pc.InvalidArgument, match=r"^interventions\.positions: 'Paris' does not occur"):
        client.generate(PROMPT, interventions=pc.zero(SITE, positions=pc.at("Paris")))
    with pytest.raises(pc.InvalidArgument, match=r"^interventions\[0\]\.positions: 'Paris' does not occur"):
        client.generate(PROMPT, interventions=[pc.zero(SITE, positions=pc.at("Paris"))])
    stream = client.stream(PROMPT, interventions=pc.zero(SITE, positions=pc.at("Paris")))
    with pytest.raises(pc.InvalidArgument, match="does not occur"):
        next(stream)
    assert list(stream) == []
    with pytest.raises(pc.InvalidArgument, match="there is no run 0"):
        client.generate(PROMPT, interventions=pc.patch(SITE, source=0, source_positions=pc.at("Texas")))


def never_fired(sample: int = 0) -> pb.SampleEnd:
    return pb.SampleEnd(
        sample_index=sample,
        finish_reason=pb.FINISH_REASON_ERROR,
        failure=failure_pb2.RunFailure(
            code=grpc.StatusCode.FAILED_PRECONDITION.value[0],
            reason=error_pb2.ERROR_REASON_INTERVENTION_NEVER_FIRED,
            message="interventions[2] selects no row",
            metadata={"intervention": "2"},
        ),
    )


def test_the_only_sample_that_fails_raises(server: StandIn, client: pc.Client) -> None:
    server.on_generate = lambda request: [
        started(request),
        a_token(word(request, 0, 0)),
        pb.GenerateResponse(sample_end=never_fired()),
        list(ends(request))[-1],
    ]
    edits = [pc.zero(["blocks.0.resid_post", SITE]), pc.zero(SITE)]
    with pytest.raises(pc.InterventionNeverFired, match=r"^interventions\[1\] selects no row") as caught:
        client.generate(PROMPT, interventions=edits)
    assert caught.value.metadata == {"intervention": "1"}
    stream = client.stream(PROMPT, interventions=edits)
    assert next(stream).index == 0
    with pytest.raises(pc.InterventionNeverFired):
        next(stream)
    assert list(stream) == []
    with pytest.raises(pc.InterventionNeverFired):
        stream.result  # noqa: B018
    assert stream.so_far.tokens == (5,)


def test_a_call_where_nothing_was_selected_fails(server: StandIn, client: pc.Client) -> None:
    packed = any_pb2.Any()
    packed.Pack(rpc.ErrorInfo(reason="INTERVENTION_NEVER_FIRED", domain="patchclamp", metadata={"intervention": "2"}))
    status = status_pb2.Status(code=9, message="no", details=[packed])
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    server.fail = [Failure(grpc.StatusCode.FAILED_PRECONDITION, "interventions[2] selects no row", trailers)]
    with pytest.raises(pc.InterventionNeverFired, match=r"^interventions\[1\]") as caught:
        client.generate(PROMPT, interventions=[pc.zero(["blocks.0.resid_post", SITE]), pc.zero(SITE)])
    assert caught.value.metadata == {"intervention": "1"}


def test_a_sample_that_fails_leaves_the_others(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        yield pb.GenerateResponse(sample_end=never_fired(1))
        yield a_token(word(request, 0, 0))
        yield pb.GenerateResponse(sample_end=sample_end(request, 0))
        yield list(ends(request))[-1]

    server.on_generate = answer
    made = client.generate(PROMPT, samples=2, max_new_tokens=1, interventions=[pc.zero(SITE)] * 3)
    fine, failed = made.samples
    assert (fine.text, fine.error, len(fine.receipts)) == (" capital", None, 3)
    assert isinstance(failed.error, pc.InterventionNeverFired)
    assert (failed.finish_reason, failed.tokens, failed.receipts) == ("error", (), ())
    assert "error=InterventionNeverFired" in repr(failed)


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("failure", [GONE, Failure(grpc.StatusCode.CANCELLED, "the server stops")])
def test_a_broken_stream_is_taken_up_again(server: StandIn, client: pc.Client, failure: Failure) -> None:
    break_after(server, 3, 4, failure=failure)
    stream = client.stream(PROMPT, max_new_tokens=8, read=SITE, seed=7, interventions=pc.zero(SITE))
    assert [token.index for token in stream] == list(range(8))
    made = stream.result
    assert (made.text, made.seed, len(made.receipts)) == (words(8), 7, 1)
    assert made[SITE].positions == tuple(range(15))
    np.testing.assert_array_equal(made[SITE][:, 0], np.arange(15))
    first, second, third = sent(server)
    assert not first.HasField("resume")
    assert second.resume == pb.Resume(received=[pb.ReceivedSample(sample_index=0, token_ids=STORY[:2])], seed=7)
    assert list(third.resume.received[0].token_ids) == STORY[:5]
    for again in (second, third):
        again.ClearField("resume")
        assert again == first


@pytest.mark.usefixtures("_at_once")
def test_several_samples_are_taken_up_with_the_seed_that_the_server_chose(server: StandIn, client: pc.Client) -> None:
    break_after(server, 4)
    stream = client.stream(PROMPT, max_new_tokens=3, samples=3, temperature=1, read=SITE)
    told = [(token.sample, token.index) for token in stream]
    assert sorted(told) == [(sample, index) for sample in range(3) for index in range(3)]
    assert [sample.text for sample in stream.result.samples] == [words(3, ahead) for ahead in range(3)]
    assert [sample[SITE].positions for sample in stream.result.samples] == [tuple(range(10))] * 3
    resume = sent(server)[1].resume
    assert resume.seed == 99
    assert [(one.sample_index, list(one.token_ids)) for one in resume.received] == [(0, [5]), (1, [6]), (2, [7])]
    assert not sent(server)[1].sampling.HasField("seed")


@pytest.mark.usefixtures("_at_once")
def test_what_broke_off_before_the_first_token_starts_anew(server: StandIn, client: pc.Client) -> None:
    break_after(server, 1)
    assert client.generate(PROMPT, max_new_tokens=3).text == words(3)
    assert sent(server)[1].resume == pb.Resume(seed=99)


@pytest.mark.usefixtures("_at_once")
def test_a_token_whose_reads_broke_off_is_sent_again(server: StandIn, client: pc.Client) -> None:
    values = np.random.default_rng(0).standard_normal((8, 100_000), np.float32)

    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        header, chunks = streamed(values, 3, 1 << 20)
        yield started(request)
        first = word(request, 0, 0)
        first.reads[0].values.CopyFrom(header)
        yield a_token(first)
        for number, chunk in enumerate(chunks):
            if number == 1 and not request.HasField("resume"):
                raise GONE
            yield pb.GenerateResponse(chunk=chunk)
        yield from ends(request)

    server.on_generate = answer
    made = client.generate(PROMPT, max_new_tokens=1, read=SITE)
    assert made.tokens == (5,)
    np.testing.assert_array_equal(made[SITE], values)
    assert list(sent(server)[1].resume.received) == []


@pytest.mark.usefixtures("_at_once")
def test_rows_that_come_again_with_a_stream_taken_up_are_passed_over(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        received = len(request.resume.received[0].token_ids) if request.resume.received else 0
        for response in story(request):
            if response.WhichOneof("event") == "token" and received and response.token.token_index == received:
                stop = 8 + received
                values = np.repeat(np.arange(stop, dtype=np.float32)[:, None], 4, axis=1)
                response.token.reads[0].values.CopyFrom(inline(values))
                response.token.reads[0].position_range.start = 0
            yield response
            if not received and response.token.token_index == 2:
                raise GONE

    server.on_generate = answer
    stream = client.stream(PROMPT, max_new_tokens=5, read=SITE)
    assert [token.reads[SITE].positions for token in stream] == [tuple(range(8)), (8,), (9,), (10,), (11,)]
    np.testing.assert_array_equal(stream.result[SITE][:, 0], np.arange(12))


@pytest.mark.usefixtures("_at_once")
def test_a_sample_that_had_ended_stays_as_it_was(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        again = request.HasField("resume")
        if not again:
            yield a_token(word(request, 0, 0))
            yield a_token(word(request, 1, 0))
            yield pb.GenerateResponse(sample_end=sample_end(request, 0))
            yield pb.GenerateResponse(sample_end=never_fired(2))
            raise GONE
        yield pb.GenerateResponse(sample_end=sample_end(request, 0))
        yield a_token(word(request, 2, 0))
        yield from ends(request)

    server.on_generate = answer
    made = client.generate(PROMPT, max_new_tokens=2, samples=3, interventions=[pc.zero(SITE)] * 3)
    assert [sample.finish_reason for sample in made.samples] == ["length", "length", "error"]
    assert [len(sample.tokens) for sample in made.samples] == [1, 1, 0]
    resume = sent(server)[1].resume
    assert [list(sample.token_ids) for sample in resume.received] == [[5], [6]]


@pytest.mark.usefixtures("_at_once")
def test_what_broke_behind_the_last_end_is_complete(server: StandIn, client: pc.Client) -> None:
    break_after(server, 4)
    made = client.generate(PROMPT, max_new_tokens=2, interventions=pc.zero(SITE))
    assert (made.text, made.finish_reason, made.summary) == (words(2), "length", None)
    assert len(made.receipts) == len(sent(server)) == 1


@pytest.mark.usefixtures("_at_once")
def test_a_sample_whose_end_is_missing_goes_back_by_one_token(server: StandIn, client: pc.Client) -> None:
    break_after(server, 3)
    stream = client.stream(PROMPT, max_new_tokens=2, read=SITE, interventions=pc.zero(SITE))
    assert [token.index for token in stream] == [0, 1]
    made = stream.result
    assert (made.tokens, made.finish_reason, len(made.receipts)) == (tuple(STORY[:2]), "length", 1)
    assert made[SITE].positions == tuple(range(9))
    assert list(sent(server)[1].resume.received[0].token_ids) == STORY[:1]


@pytest.mark.usefixtures("_at_once")
def test_a_server_where_every_sample_had_ended_tells_the_end_again(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        if request.resume.received and len(request.resume.received[0].token_ids) == 3:
            raise invalid(("resume.received", "every sample had ended already"))
        yield started(request)
        for index in range(len(request.resume.received[0].token_ids) if request.resume.received else 0, 3):
            yield a_token(word(request, 0, index))
        if not request.HasField("resume"):
            raise GONE
        end = sample_end(request)
        end.finish_reason = pb.FINISH_REASON_STOP
        yield pb.GenerateResponse(sample_end=end)
        yield list(ends(request))[-1]

    server.on_generate = answer
    stream = client.stream(PROMPT, max_new_tokens=9, stop=7)
    assert [token.index for token in stream] == [0, 1, 2]
    assert stream.result.finish_reason == "stop"
    assert [len(one.resume.received[0].token_ids) for one in sent(server)[1:]] == [3, 2]


@pytest.mark.usefixtures("_at_once")
def test_a_token_that_comes_again_is_the_same(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        yield a_token(word(request, 0, 0))
        if not request.HasField("resume"):
            raise GONE
        yield from ends(request)

    server.on_generate = answer
    assert client.generate(PROMPT, max_new_tokens=1).tokens == (5,)

    def differs(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        for response in answer(request):
            if request.HasField("resume") and response.WhichOneof("event") == "token":
                response.token.token.id = 3
            yield response

    server.on_generate = differs
    with pytest.raises(pc.Internal, match="taken up with another token"):
        client.generate(PROMPT, max_new_tokens=1)


@pytest.mark.usefixtures("_at_once")
def test_a_sample_that_ended_as_the_stream_broke_has_no_receipts(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        if not request.HasField("resume"):
            yield a_token(word(request, 0, 0))
            raise GONE
        yield pb.GenerateResponse(sample_end=pb.SampleEnd(sample_index=0, finish_reason=pb.FINISH_REASON_STOP))
        yield a_token(word(request, 1, 0))
        yield from list(ends(request))[1:]

    server.on_generate = answer
    made = client.generate(PROMPT, max_new_tokens=4, samples=2, interventions=pc.zero(SITE))
    assert [len(sample.receipts) for sample in made.samples] == [0, 1]
    assert [sample.finish_reason for sample in made.samples] == ["stop", "length"]


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("reduce", ["mean", "moments"])
def test_what_is_reduced_over_positions_is_not_taken_up(server: StandIn, client: pc.Client, reduce: Any) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        message = word(request, 0, 0)
        message.reads[0].ClearField("position_range")
        yield a_token(message)
        raise GONE

    server.on_generate = answer
    with pytest.raises(pc.Unavailable, match="connection lost"):
        client.generate(PROMPT, read=pc.read(SITE, reduce=reduce))
    assert len(sent(server)) == 1


@pytest.mark.usefixtures("_at_once")
def test_streams_are_taken_up_a_few_times_only(server: StandIn, client: pc.Client) -> None:
    break_after(server, *[2] * 9)
    stream = client.stream(PROMPT, max_new_tokens=20)
    with pytest.raises(pc.Unavailable, match="connection lost"):
        list(stream)
    assert len(sent(server)) == 5
    assert stream.so_far.text == words(5)
    with pytest.raises(pc.Unavailable):
        stream.result  # noqa: B018
    assert list(stream) == []


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (Failure(grpc.StatusCode.FAILED_PRECONDITION, "the handle is gone"), pc.FailedPrecondition),
        (Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy"), pc.Overloaded),
        (Failure(grpc.StatusCode.INTERNAL, "broken"), pc.Internal),
    ],
)
@pytest.mark.usefixtures("_at_once")
def test_what_cannot_be_taken_up_raises(
    server: StandIn, client: pc.Client, failure: Failure, kind: type[pc.Error]
) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        if request.HasField("resume"):
            raise failure
        yield started(request)
        yield a_token(word(request, 0, 0))
        raise GONE

    server.on_generate = answer
    with pytest.raises(kind, match=failure.message):
        client.generate(PROMPT)
    assert len(sent(server)) == 2
    break_after(server, 2, failure=failure)
    with pytest.raises(kind, match=failure.message):
        client.generate(PROMPT)
    assert len(sent(server)) == 3


def test_a_stream_is_not_taken_up_past_its_deadline(server: StandIn, client: pc.Client) -> None:
    break_after(server, *[2] * 9)
    began = time.monotonic()
    with pytest.raises((pc.Unavailable, pc.DeadlineExceeded)):
        client.generate(PROMPT, timeout=0.5)
    assert time.monotonic() - began < 2
    assert len(sent(server)) < 4


@pytest.mark.usefixtures("_at_once")
def test_a_server_with_another_prompt_is_no_continuation(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        start = started(request)
        if request.HasField("resume"):
            start.start.prompt[1].id = 3
        yield start
        yield a_token(word(request, 0, 0))
        raise GONE

    server.on_generate = answer
    with pytest.raises(pc.Internal, match="another prompt or seed"):
        client.generate(PROMPT)


def endless(server: StandIn) -> None:
    """Generates until the caller has enough."""

    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        for index in range(1000):
            yield a_token(word(request, 0, index))
            if server.ended.wait(0.01):
                return

    server.on_generate = answer


def test_leaving_a_stream_cancels_the_call(server: StandIn, client: pc.Client) -> None:
    endless(server)
    with client.stream(PROMPT) as stream:
        for token in stream:
            if token.index == 2:
                break
    assert server.ended.wait(5)
    assert list(stream) == []
    assert stream.so_far.text == words(3)
    with pytest.raises(RuntimeError, match="has not ended"):
        stream.result  # noqa: B018
    stream.close()


def test_a_break_cancels_the_call(server: StandIn, client: pc.Client) -> None:
    endless(server)
    for token in client.stream(PROMPT):
        if token.index == 2:
            break
    gc.collect()
    assert server.ended.wait(5)


def test_another_thread_may_close_a_stream(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        yield a_token(word(request, 0, 0))
        server.ended.wait(10)

    server.on_generate = answer
    stream = client.stream(PROMPT)
    assert next(stream).index == 0
    threading.Timer(0.2, stream.close).start()
    with pytest.raises(pc.Cancelled, match="the stream was closed"):
        next(stream)
    assert server.ended.wait(5)


def test_closing_the_client_ends_its_streams(server: StandIn, client: pc.Client) -> None:
    endless(server)
    stream = client.stream(PROMPT)
    next(stream)
    client.close()
    with pytest.raises(pc.Cancelled):
        list(stream)


def test_a_stream_that_never_began_needs_no_closing(server: StandIn, client: pc.Client) -> None:
    stream = client.stream(PROMPT)
    with pytest.raises(RuntimeError, match="has not begun"):
        stream.so_far  # noqa: B018
    stream.close()
    assert list(stream) == []
    assert server.calls == []


def swap_tokens(responses: list[pb.GenerateResponse]) -> None:
    responses[1], responses[2] = responses[2], responses[1]


def lose_a_token(responses: list[pb.GenerateResponse]) -> None:
    del responses[1]


def repeat_a_token(responses: list[pb.GenerateResponse]) -> None:
    responses.insert(1, responses[1])


def lose_the_start(responses: list[pb.GenerateResponse]) -> None:
    del responses[0]


def start_twice(responses: list[pb.GenerateResponse]) -> None:
    responses.insert(1, responses[0])


def lose_the_end(responses: list[pb.GenerateResponse]) -> None:
    del responses[-2]


def lose_the_summary(responses: list[pb.GenerateResponse]) -> None:
    del responses[-1]


def end_twice(responses: list[pb.GenerateResponse]) -> None:
    responses.insert(-1, responses[-2])


def go_on_behind_the_end(responses: list[pb.GenerateResponse]) -> None:
    responses.insert(2, responses[-2])


def another_sample(responses: list[pb.GenerateResponse]) -> None:
    responses[1].token.sample_index = 4


def end_for_no_reason(responses: list[pb.GenerateResponse]) -> None:
    responses[-2].sample_end.finish_reason = pb.FINISH_REASON_UNSPECIFIED


def lose_a_receipt(responses: list[pb.GenerateResponse]) -> None:
    del responses[-2].sample_end.receipts[:]


def positions_beyond_the_tokens(responses: list[pb.GenerateResponse]) -> None:
    responses[1].token.reads[0].position_range.stop = 99


def positions_that_are_too_few(responses: list[pb.GenerateResponse]) -> None:
    responses[1].token.reads[0].position_range.stop = 7


def read_what_was_not_asked(responses: list[pb.GenerateResponse]) -> None:
    responses[1].token.reads[0].read_index = 7


def lose_the_chunks(responses: list[pb.GenerateResponse]) -> None:
    header, _ = streamed(np.zeros((8, 4), np.float32), 1, 64)
    responses[1].token.reads[0].values.CopyFrom(header)


def stray_chunk(responses: list[pb.GenerateResponse]) -> None:
    responses.insert(1, pb.GenerateResponse(chunk=tensor_pb2.TensorChunk(tensor_id=1, data=b"1")))


@pytest.mark.parametrize(
    "change",
    [
        swap_tokens,
        lose_a_token,
        repeat_a_token,
        lose_the_start,
        start_twice,
        lose_the_end,
        lose_the_summary,
        end_twice,
        go_on_behind_the_end,
        another_sample,
        end_for_no_reason,
        lose_a_receipt,
        positions_beyond_the_tokens,
        positions_that_are_too_few,
        read_what_was_not_asked,
        lose_the_chunks,
        stray_chunk,
    ],
)
def test_an_answer_that_does_not_add_up_is_refused(server: StandIn, client: pc.Client, change: Any) -> None:
    def answer(request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        responses = list(story(request))
        change(responses)
        return responses

    server.on_generate = answer
    with pytest.raises(pc.Internal, match="damaged") as caught:
        client.generate(PROMPT, max_new_tokens=3, read=SITE, interventions=pc.zero(SITE))
    assert caught.value.reason == "DATA_LOSS"
    assert len(sent(server)) == 1


def test_unknown_messages_of_a_newer_server_are_passed_over(server: StandIn, client: pc.Client) -> None:
    server.on_generate = lambda request: [pb.GenerateResponse(), *story(request), pb.GenerateResponse()]
    assert client.generate(PROMPT, max_new_tokens=2).text == words(2)


def test_the_timeout_holds_for_the_whole_generation(server: StandIn, client: pc.Client) -> None:
    endless(server)
    with pytest.raises(pc.DeadlineExceeded):
        client.generate(PROMPT, timeout=0.3)
    assert server.seconds_left[0] == pytest.approx(0.3, abs=0.3)


def test_a_server_without_generation_says_so(server: StandIn, client: pc.Client) -> None:
    server.fail = [Failure(grpc.StatusCode.UNIMPLEMENTED, "not served")]
    with pytest.raises(pc.Unimplemented, match="not served"):
        client.generate(PROMPT)


def test_receipts_of_a_profile_come_behind(server: StandIn, client: pc.Client) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        for response in story(request):
            if response.WhichOneof("event") == "sample_end":
                response.sample_end.receipts.append(receipt(3, 8, profile="kind@2"))
            yield response

    server.on_generate = answer
    made = client.generate(PROMPT, interventions=pc.zero(SITE))
    assert [found.profile for found in made.receipts] == ["", "kind@2"]


# asyncio


async def test_both_clients_give_the_same(server: StandIn, client: pc.Client, async_client: pc.AsyncClient) -> None:
    options: Any = {
        "max_new_tokens": 4,
        "read": pc.read(SITE, positions=pc.at("Texas")),
        "interventions": pc.zero(SITE),
        "stop": ["\n", 3],
        "samples": 2,
    }
    one, other = client.generate(PROMPT, **options), await async_client.generate(PROMPT, **options)
    assert sent(server)[0] == sent(server)[1]
    assert [(sample.text, sample.tokens, sample.receipts) for sample in one.samples] == [
        (sample.text, sample.tokens, sample.receipts) for sample in other.samples
    ]
    np.testing.assert_array_equal(one.samples[1][SITE], other.samples[1][SITE])
    assert [token.index async for token in async_client.stream(PROMPT, max_new_tokens=3)] == [0, 1, 2]


async def test_a_list_of_prompts_asynchronously(server: StandIn, async_client: pc.AsyncClient) -> None:
    meet = threading.Barrier(3, timeout=20)

    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        meet.wait()
        if request.prompt.text == ":":
            raise invalid(("prompt", "not this one"))
        yield from story(request)

    server.on_generate = answer
    made = await async_client.generate(["Fact", PROMPT, "Fact :"], max_new_tokens=2)
    assert [len(one.prompt_tokens) for one in made] == [2, 8, 3]
    with pytest.raises(pc.InvalidArgument, match=r"^prompt\[1\]: not this one") as caught:
        await async_client.generate(["Fact", ":", PROMPT], max_new_tokens=2)
    assert [isinstance(result, pc.Generation) for result in caught.value.results] == [True, False, True]


@pytest.mark.usefixtures("_at_once")
async def test_a_broken_stream_is_taken_up_again_asynchronously(server: StandIn, async_client: pc.AsyncClient) -> None:
    break_after(server, 3, 4)
    stream = async_client.stream(PROMPT, max_new_tokens=8, read=SITE)
    assert [token.index async for token in stream] == list(range(8))
    assert stream.result[SITE].positions == tuple(range(15))
    assert list(sent(server)[2].resume.received[0].token_ids) == STORY[:5]
    break_after(server, *[2] * 9)
    with pytest.raises(pc.Unavailable, match="connection lost"):
        await async_client.generate(PROMPT, max_new_tokens=20)


async def test_leaving_a_stream_asynchronously(server: StandIn, async_client: pc.AsyncClient) -> None:
    endless(server)
    async with async_client.stream(PROMPT) as stream:
        async for token in stream:
            if token.index == 2:
                break
    assert await asyncio.to_thread(server.ended.wait, 5)
    assert stream.so_far.text == words(3)
    assert [token async for token in stream] == []
    server.ended.clear()
    async for token in async_client.stream(PROMPT):
        if token.index == 2:
            break
    gc.collect()
    await asyncio.sleep(0)
    assert await asyncio.to_thread(server.ended.wait, 5)


async def test_closing_a_stream_that_another_task_reads(server: StandIn, async_client: pc.AsyncClient) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        yield a_token(word(request, 0, 0))
        server.ended.wait(10)

    server.on_generate = answer
    stream = async_client.stream(PROMPT)
    assert (await anext(stream)).index == 0
    task = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.1)
    await stream.close()
    with pytest.raises(pc.Cancelled, match="the stream was closed"):
        await task


async def test_cancelling_a_task_cancels_the_generation(server: StandIn, async_client: pc.AsyncClient) -> None:
    endless(server)
    task = asyncio.create_task(async_client.generate([PROMPT, PROMPT]))
    assert await asyncio.to_thread(server.began.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.ended.wait, 5)


async def test_closing_the_client_ends_its_streams_asynchronously(
    server: StandIn, async_client: pc.AsyncClient
) -> None:
    endless(server)
    stream = async_client.stream(PROMPT)
    await anext(stream)
    await async_client.close()
    with pytest.raises(pc.Cancelled):
        [token async for token in stream]


def test_the_stand_in_tells_a_story() -> None:
    request = pb.GenerateRequest(stop=pb.StopRules(max_new_tokens=1), sampling=pb.Sampling(samples=1))
    request.prompt.text = PROMPT
    assert len(tokenized(request.prompt).tokens) == 8
    assert [response.WhichOneof("event") for response in story(request)] == [
        "start",
        "token",
        "sample_end",
        "summary",
    ]
