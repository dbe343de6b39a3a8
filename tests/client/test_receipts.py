"""Runs with interventions: what travels, and what comes back of each."""

import copy
import pickle
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest

import patchclamp as pc
from client.stand_in import Failure, StandIn, failing_run, receipt, result, summary
from patchclamp._receipts import Edits, retold
from patchclamp._tensors import IncomingTensor
from patchclamp.errors import FieldViolation
from patchclamp.v1 import error_pb2, intervention_pb2, model_pb2, run_pb2, tensor_pb2

PROMPT = "Fact: the capital of Texas is"
SITE = "blocks.1.resid_post"
TWO = pc.ablate(["blocks.0.resid_post", SITE], "refusal")


def sent(server: StandIn) -> run_pb2.RunRequest:
    (request,) = server.seen(run_pb2.RunRequest)
    assert isinstance(request, run_pb2.RunRequest)
    return request


def answer_with(server: StandIn, receipts: list[intervention_pb2.Receipt]) -> None:
    """Lets the server answer with these receipts."""

    def answer(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        answered = result(0, request.runs[0])
        del answered.receipts[:]
        answered.receipts.extend(receipts)
        yield run_pb2.RunResponse(result=answered, summary=summary().summary)

    server.on_run = answer


def test_a_receipt_for_each_intervention(server: StandIn, client: pc.Client) -> None:
    edits = [pc.add(SITE, np.ones(4), strength=3), pc.zero("blocks.0.attn.z", heads=[1])]
    run = client.run(PROMPT, interventions=edits)
    assert [arm.WhichOneof("op") for arm in sent(server).runs[0].interventions] == ["add", "zero"]
    first, second = run.receipts
    assert (first.intervention, second.intervention) == tuple(edits)
    assert (first.index, second.index) == (0, 1)
    assert (first.rows_selected, first.rows_fired, first.rows_changed, first.clipped) == (8, 8, 7, 1)
    assert (first.mean_delta, first.max_delta, first.no_effect, first.profile) == (0.25, 0.5, False, "")
    assert "receipts=2" in repr(run)
    assert "pc.zero(&#x27;blocks.0.attn.z&#x27;, heads=[1])" in run._repr_html_()


def test_one_intervention_needs_no_list(server: StandIn, client: pc.Client) -> None:
    assert len(client.run(PROMPT, interventions=pc.zero(SITE)).receipts) == 1
    assert client.run(PROMPT, interventions=[]).receipts == client.run(PROMPT).receipts == ()


def test_the_receipts_of_several_hooks_are_summed_up(server: StandIn, client: pc.Client) -> None:
    nothing = receipt(1, 8, rows_fired=2, rows_changed=0, mean_delta=0.0, max_delta=0.0, clipped=0, no_effect=True)
    answer_with(
        server, [receipt(0, 8), nothing, receipt(2, 8, rows_fired=6, rows_changed=6, mean_delta=0.4, max_delta=0.9)]
    )
    edits = [pc.zero(SITE), TWO]
    first, second = client.run(PROMPT, interventions=edits).receipts
    assert (first.intervention, second.intervention, second.index) == (*edits, 1)
    assert (second.rows_selected, second.rows_fired, second.rows_changed, second.clipped) == (16, 8, 6, 1)
    assert second.mean_delta == pytest.approx(0.3)
    assert (second.max_delta, second.no_effect) == (0.9, False)


@pytest.mark.parametrize(("fired", "no_effect"), [(8, True), (0, False)])
def test_several_hooks_have_no_effect_when_rows_fired_and_none_changed(fired: int, no_effect: bool) -> None:
    parts = [receipt(i, 8, rows_fired=fired, rows_changed=0, mean_delta=0, max_delta=0) for i in range(2)]
    (found,) = Edits((TWO,)).receipts(parts)
    assert (found.no_effect, found.mean_delta) == (no_effect, 0)


def test_receipts_of_a_profile_name_it(server: StandIn, client: pc.Client) -> None:
    answer_with(server, [receipt(5, 8, profile="kind@2"), receipt(0, 8), receipt(1, 8)])
    run = client.run(PROMPT, interventions=TWO)
    assert [(found.profile, found.index, found.intervention) for found in run.receipts] == [
        ("", 0, TWO),
        ("kind@2", 5, None),
    ]
    assert "kind@2" in run._repr_html_()


@pytest.mark.parametrize(
    ("indices", "words"),
    [([0, 1, 7], "of intervention 7, which was not due"), ([0, 0], "0, which was not due"), ([1], "1 of 2 receipts")],
)
def test_a_receipt_too_many_or_too_few_is_damage(
    server: StandIn, client: pc.Client, indices: list[int], words: str
) -> None:
    answer_with(server, [receipt(index, 8) for index in indices])
    with pytest.raises(pc.Internal, match=words):
        client.run(PROMPT, interventions=TWO)


def test_receipts_come_in_the_order_of_the_interventions(server: StandIn, client: pc.Client) -> None:
    answer_with(server, [receipt(index, 8, clipped=index) for index in (2, 0, 1)])
    run = client.run(PROMPT, interventions=[pc.zero("embed"), TWO])
    assert [(found.index, found.clipped) for found in run.receipts] == [(0, 0), (1, 3)]


def never_fired(index: int, message: str, metadata: dict[str, str] | None = None) -> run_pb2.RunResponse:
    code = grpc.StatusCode.FAILED_PRECONDITION.value[0]
    return failing_run(index, code, message, error_pb2.ERROR_REASON_INTERVENTION_NEVER_FIRED, metadata or {})


def test_an_intervention_that_hit_nothing_is_an_error(server: StandIn, client: pc.Client) -> None:
    server.on_run = lambda _: [never_fired(0, "interventions[0] selected no position"), summary()]
    with pytest.raises(pc.InterventionNeverFired, match=r"interventions\[0\] selected no position") as caught:
        client.run(PROMPT, interventions=pc.zero(SITE, positions=pc.GENERATED))
    assert isinstance(caught.value, pc.FailedPrecondition)
    assert caught.value.reason == "INTERVENTION_NEVER_FIRED"


def test_a_run_that_hit_nothing_fails_alone(server: StandIn, client: pc.Client) -> None:
    def answer(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        yield never_fired(1, "runs[1].interventions[2] selected no position", {"intervention": "2"})
        yield run_pb2.RunResponse(result=result(0, request.runs[0]))
        yield summary()

    server.on_run = answer
    specs = [pc.RunSpec(PROMPT, interventions=TWO), pc.RunSpec(PROMPT, interventions=[TWO, pc.zero(SITE)])]
    fine, failed = client.run_many(specs, return_exceptions=True)
    assert isinstance(fine, pc.Run) and len(fine.receipts) == 1
    assert isinstance(failed, pc.InterventionNeverFired)
    assert str(failed) == "runs[1].interventions[1] selected no position"
    assert failed.metadata == {"intervention": "1"}
    with pytest.raises(pc.InterventionNeverFired) as caught:
        client.run_many(specs)
    assert isinstance(caught.value.results[0], pc.Run)


def test_violations_name_interventions_as_they_were_written() -> None:
    runs = [Edits((pc.zero(SITE),)), Edits((TWO, TWO, pc.zero(SITE)))]
    error = pc.InvalidArgument(
        "2 faults",
        field_violations=[
            FieldViolation("runs[1].interventions[3].ablate.directions", "must not be zero"),
            FieldViolation("runs[1].interventions[4].zero", "undoes what interventions[2] does to the same rows"),
            FieldViolation("runs[0].interventions[0].zero", "this model has no interventions[9]"),
            FieldViolation("runs[7].interventions[3]", "there is no such run"),
        ],
    )
    retold(runs, error)
    assert [str(violation) for violation in error.field_violations] == [
        "runs[1].interventions[1].ablate.directions: must not be zero",
        "runs[1].interventions[2].zero: undoes what interventions[1] does to the same rows",
        "runs[0].interventions[0].zero: this model has no interventions[9]",
        "runs[7].interventions[3]: there is no such run",
    ]
    assert str(retold(runs, pc.FailedPrecondition("interventions[2] is odd"))) == "interventions[2] is odd"
    assert str(retold(runs[1:], pc.FailedPrecondition("interventions[2] is odd"))) == "interventions[1] is odd"


def test_a_refused_call_names_interventions_as_they_were_written(server: StandIn, client: pc.Client) -> None:
    server.fail = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "runs[0].interventions[2].zero is wrong")]
    with pytest.raises(pc.InvalidArgument, match=r"^runs\[0\]\.interventions\[1\]\.zero is wrong"):
        client.run(PROMPT, interventions=[TWO, pc.zero(SITE)])


def test_what_is_not_served_yet_says_so(server: StandIn, client: pc.Client) -> None:
    server.fail = [Failure(grpc.StatusCode.UNIMPLEMENTED, "interventions.zero is not served")]
    with pytest.raises(pc.Unimplemented, match="not served"):
        client.run(PROMPT, interventions=pc.zero(SITE))


def test_positions_and_tokens_are_looked_up(server: StandIn, client: pc.Client) -> None:
    edits = [
        pc.add(
            SITE, pc.unembed(" Austin"), positions=pc.at("Texas"), when=pc.when(SITE, pc.unembed(" Dallas"), less=0)
        ),
        pc.knockout(0, 0, (pc.LAST, pc.at("capital"))),
    ]
    client.run(PROMPT, interventions=edits)
    (tokenize,) = server.seen(model_pb2.TokenizeRequest)
    assert [prompt.text for prompt in tokenize.prompts] == [PROMPT, " Austin", " Dallas"]
    add, knockout = sent(server).runs[0].interventions
    assert add.add.vector.unembed_token == 9 and add.when.direction.unembed_token == 10
    assert list(add.positions.indices.indices) == [6]
    assert [(edge.query, edge.key) for edge in knockout.knockout.edges] == [(-1, 4)]


def test_a_patch_looks_up_each_text_in_its_own_prompt(server: StandIn, client: pc.Client) -> None:
    patch = pc.patch(SITE, source=0, positions=pc.at("Dallas"), source_positions=pc.at("Texas"))
    client.run_many([pc.RunSpec(PROMPT), pc.RunSpec("Fact: Dallas", interventions=[patch])])
    (tokenize,) = server.seen(model_pb2.TokenizeRequest)
    assert sorted(prompt.text for prompt in tokenize.prompts) == ["Fact: Dallas", PROMPT]
    found = sent(server).runs[1].interventions[0]
    assert list(found.positions.indices.indices) == [3]
    assert list(found.patch.source_positions.indices.indices) == [6]
    with pytest.raises(pc.InvalidArgument, match=r"^interventions\.source: there is no run 3: the call has 1"):
        client.run(PROMPT, interventions=pc.patch(SITE, source=3, source_positions=pc.at("Texas")))


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        (pc.zero(SITE, positions=pc.at("Paris")), r"^runs\[1\]\.interventions\.positions: 'Paris' does not occur"),
        ([TWO, pc.add(SITE, pc.unembed("the capital"))], r"^runs\[1\]\.interventions\[1\]\.vector: .* is 2 tokens"),
        (
            pc.zero(SITE, when=pc.when(SITE, pc.unembed("Paris"), less=0)),
            r"^runs\[1\]\.interventions\.when\.direction: .* is no token",
        ),
    ],
)
def test_what_cannot_be_looked_up_names_its_argument(client: pc.Client, edits: Any, words: str) -> None:
    with pytest.raises(pc.InvalidArgument, match=words):
        client.run_many([pc.RunSpec(PROMPT), pc.RunSpec(PROMPT, interventions=edits)])


@pytest.mark.parametrize("edits", [["refusal"], [None], pc.when(SITE, "refusal", less=0), [pc.read(SITE)]])
def test_what_is_no_intervention_is_a_type_error(client: pc.Client, edits: Any) -> None:
    with pytest.raises(TypeError, match="intervention"):
        client.run(PROMPT, interventions=edits)


def test_the_baseline_is_the_run_without_interventions(server: StandIn, client: pc.Client) -> None:
    run = client.run(PROMPT, interventions=pc.zero(SITE), baseline=True, logprobs=[3, 4])
    assert sent(server).runs[0].baseline
    assert run.baseline is not None
    assert (run.top[0].text, run.baseline.top[0].text) == (" Austin", " Dallas")
    assert run.baseline.logits is not None and run.baseline.logits.shape == (1, 12)
    assert run.baseline.logits.positions == run.baseline.logit_positions == (7,)
    assert run.baseline.logprobs is not None and run.baseline.logprobs.shape == (1, 2)
    assert repr(run.baseline) == "Baseline(rows=1, top=' Dallas' 0.97)"
    assert client.run(PROMPT).baseline is None
    with pytest.raises(TypeError, match=r"^baseline is True or False"):
        client.run(PROMPT, baseline=1)  # type: ignore[call-overload]


def test_large_baselines_come_in_chunks(server: StandIn, client: pc.Client) -> None:
    def answer(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        answered = result(0, request.runs[0])
        header = answered.baseline_logits.values
        data = IncomingTensor(header).array() + 1
        header.streamed.CopyFrom(tensor_pb2.StreamedContent(tensor_id=4, total_bytes=data.nbytes))
        yield run_pb2.RunResponse(result=answered)
        chunk = tensor_pb2.TensorChunk(tensor_id=4, data=data.tobytes(), crc32=zlib.crc32(data.tobytes()))
        yield run_pb2.RunResponse(chunk=chunk)
        yield summary()

    server.on_run = answer
    run = client.run(PROMPT, interventions=pc.zero(SITE), baseline=True)
    assert run.baseline is not None and run.baseline.logits is not None
    np.testing.assert_array_equal(run.baseline.logits, np.ones((1, 12)))


def test_what_is_kept_is_a_handle(server: StandIn, client: pc.Client) -> None:
    run = client.run(PROMPT, keep=["blocks.1.resid_pre", pc.read("blocks.*.resid_post", positions=pc.at("Texas"))])
    one, other = sent(server).runs[0].keep
    assert one.read.dtype == tensor_pb2.DTYPE_UNSPECIFIED and not one.HasField("time_to_live")
    assert list(other.read.positions.indices.indices) == [6]
    assert list(run.handles) == ["blocks.1.resid_pre", "blocks.0.resid_post", "blocks.1.resid_post"]
    handle = run.handles["blocks.1.hook_resid_pre"]
    assert (handle.name, handle.hook_point) == ("replicas/r0/handles/k0l1", "blocks.1.resid_pre")
    assert (handle.shape, handle.dtype, handle.size_bytes, handle.owner) == ((8, 4), "bfloat16", 64, "me")
    assert (handle.model, handle.model_revision) == ("stand-in", "abc123")
    assert handle.create_time == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert handle.expire_time == datetime(2023, 11, 14, 23, 13, 20, tzinfo=UTC)
    assert repr(handle) == "Handle('replicas/r0/handles/k0l1', blocks.1.resid_pre, bfloat16 [8, 4])"
    assert handle == copy.copy(handle) == pickle.loads(pickle.dumps(handle))  # noqa: S301
    assert repr(run.handles) == (
        "Handles(blocks.1.resid_pre [8, 4], blocks.0.resid_post [8, 4], blocks.1.resid_post [8, 4])"
    )
    assert "handles=3" in repr(run)


def test_a_handle_is_a_vector_and_a_source(server: StandIn, client: pc.Client) -> None:
    handle = client.run(PROMPT, keep=SITE).handles[SITE]
    client.run(PROMPT, interventions=[pc.patch(SITE, source=handle), pc.add(SITE, handle)])
    patch, add = server.seen(run_pb2.RunRequest)[1].runs[0].interventions
    assert patch.patch.handle == add.add.vector.handle == handle.name


def test_kept_reads_say_how_they_are_stored(server: StandIn, client: pc.Client) -> None:
    client.run(PROMPT, keep=[pc.read(SITE, dtype="float16", reduce="mean")], read=SITE)
    run = sent(server).runs[0]
    assert run.keep[0].read.dtype == tensor_pb2.DTYPE_FLOAT16
    assert run.keep[0].read.reduction.HasField("mean")
    assert run.reads[0].dtype == tensor_pb2.DTYPE_FLOAT32


def test_handles_are_found_by_name(server: StandIn, client: pc.Client) -> None:
    run = client.run(PROMPT, keep=[SITE, pc.read(SITE, reduce="norm")])
    with pytest.raises(KeyError, match=r"was kept 2 times .*: take one of handles\.in_order"):
        run.handles[SITE]
    assert [handle.name for handle in run.handles.in_order] == ["replicas/r0/handles/k0l1", "replicas/r0/handles/k1l1"]
    with pytest.raises(KeyError, match=r"was not kept; this run has blocks\.1\.resid_post"):
        run.handles["embed"]
    with pytest.raises(KeyError, match="this run kept nothing"):
        client.run(PROMPT).handles["embed"]


def test_a_handle_of_nothing_is_damage(server: StandIn, client: pc.Client) -> None:
    def answer(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        answered = result(0, request.runs[0])
        answered.handles[0].keep_index = 1
        yield run_pb2.RunResponse(result=answered, summary=summary().summary)

    server.on_run = answer
    with pytest.raises(pc.Internal, match="a handle of keep 1, which was not asked for"):
        client.run(PROMPT, keep=SITE)


def test_sites_of_a_newer_server_have_a_name(server: StandIn, client: pc.Client) -> None:
    def answer(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        answered = result(0, request.runs[0])
        answered.handles[0].hook_point.site = 99  # type: ignore[assignment]
        answered.handles[0].dtype = 99  # type: ignore[assignment]
        yield run_pb2.RunResponse(result=answered, summary=summary().summary)

    server.on_run = answer
    (handle,) = client.run(PROMPT, keep=SITE).handles.in_order
    assert (handle.hook_point, handle.dtype) == ("site 99", "")


async def test_both_clients_give_the_same(client: pc.Client, async_client: pc.AsyncClient, server: StandIn) -> None:
    options: Any = {"interventions": [TWO, pc.zero(SITE, positions=pc.at("Texas"))], "baseline": True, "keep": SITE}
    one, other = client.run(PROMPT, **options), await async_client.run(PROMPT, **options)
    first, second = server.seen(run_pb2.RunRequest)
    assert first == second
    assert one.receipts == other.receipts and len(one.receipts) == 2
    assert one.handles == other.handles
    assert one.baseline is not None and other.baseline is not None
    assert one.baseline.top == other.baseline.top
    assert len(await async_client.run([PROMPT, PROMPT], **options)) == 2
    server.fail = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "runs[0].interventions[2].zero is wrong")]
    with pytest.raises(pc.InvalidArgument, match=r"interventions\[1\]\.zero is wrong"):
        await async_client.run(PROMPT, interventions=[TWO, pc.zero(SITE)])
