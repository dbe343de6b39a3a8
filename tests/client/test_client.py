"""The clients against a stand-in server: what travels, what comes back, and how calls end."""

import asyncio
import inspect
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

import patchclamp as pc
from client.stand_in import Failure, StandIn, result, start, streamed, summary
from patchclamp._config import Config, resolve
from patchclamp._rpc import channel_options, service_config
from patchclamp.v1 import logits_pb2, model_pb2, numerics_pb2, run_pb2, tensor_pb2

PROMPT = "Fact: the capital of Texas is"


def test_describe(client: pc.Client) -> None:
    info = client.describe()
    assert (info.name, info.architecture, info.dtype, info.devices) == (
        "stand-in",
        "StandInForCausalLM",
        "float32",
        ("cpu",),
    )
    assert (info.dims.n_layers, info.dims.d_model, info.dims.n_ctx, info.layout) == (2, 4, 64, "sequential")
    assert list(info.sites) == ["embed", "resid_post"]
    assert info.sites["resid_post"].shape == "[pos, 4]"
    assert info.sites["resid_post"].hook_points() == ("blocks.0.resid_post", "blocks.1.resid_post")
    assert info.sites["embed"].hook_points() == ("embed",)
    assert info.absent_sites == (pc.AbsentSite("pos_embed", (), "positions are rotary"),)
    assert info.capabilities["runs"]
    assert not info.capabilities["numerics.deterministic"]
    assert info.limits.max_runs == 16


def test_sites_know_every_name(client: pc.Client) -> None:
    sites = client.describe().sites
    for name in ("resid_post", "blocks.1.resid_post", "blocks.*.resid_post", "blocks.0.hook_resid_post", "hook_embed"):
        assert name in sites
    for name in ("blocks.2.resid_post", "pos_embed", "blocks.0.resid_pots", "nothing"):
        assert name not in sites


def test_tokenize_one_and_many(server: StandIn, client: pc.Client) -> None:
    one = client.tokenize(PROMPT)
    assert one.strings == ("<bos>", "Fact", ":", " the", " capital", " of", " Texas", " is")
    assert one.offsets[6] == (20, 26)
    assert (len(one), one.text) == (8, PROMPT)
    assert one[6] == list(one)[6] == pc.Token(7, " Texas", 20, 26)
    assert one[5:7] == pc.Tokens((6, 7), (" of", " Texas"), ((17, 20), (20, 26)), PROMPT)
    assert one[-1:][0] == one[-1]
    many = client.tokenize([PROMPT, "Fact"])
    assert [len(tokens) for tokens in many] == [8, 2]
    assert client.tokenize("Fact", special_tokens=False).strings == ("Fact",)
    assert client.tokenize(one.ids).ids == one.ids


@pytest.mark.parametrize(
    ("prompt", "content"),
    [
        ("Fact", "text"),
        ("", "text"),
        ([0, 2], "token_ids"),
        ((0, 2), "token_ids"),
        (np.array([0, 2]), "token_ids"),
        ([np.int64(0), np.int32(2)], "token_ids"),
        ([{"role": "user", "content": "Fact"}], "chat"),
    ],
)
def test_one_prompt_gives_one_result(server: StandIn, client: pc.Client, prompt: pc.RunSpec, content: str) -> None:
    run = client.run(prompt)  # type: ignore[call-overload]
    assert isinstance(run, pc.Run)
    assert server.seen(run_pb2.RunRequest)[-1].runs[0].prompt.WhichOneof("content") == content


@pytest.mark.parametrize(
    "prompts",
    [
        ["Fact", "Fact"],
        ("Fact", "Fact"),
        [[0, 2], [2]],
        [np.array([0, 2]), np.array([2])],
        [[{"role": "user", "content": "Fact"}], "Fact"],
    ],
)
def test_a_list_gives_a_list(server: StandIn, client: pc.Client, prompts: list[str]) -> None:
    runs = client.run(prompts)
    assert isinstance(runs, list)
    assert len(runs) == 2
    assert len(server.seen(run_pb2.RunRequest)) == 1


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ([], pc.InvalidArgument),
        ([-1], pc.InvalidArgument),
        ([2**32], pc.InvalidArgument),
        ([{"role": "user"}], pc.InvalidArgument),
        ([{"role": "user", "content": 3}], pc.InvalidArgument),
        ("\ud800", pc.InvalidArgument),
        (b"Fact", TypeError),
        (3, TypeError),
        ([1, "a"], TypeError),
        ([1.5], TypeError),
        ([True], TypeError),
        (None, TypeError),
    ],
)
def test_prompts_that_are_none(server: StandIn, client: pc.Client, prompt: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="prompt"):
        client.run(prompt)  # type: ignore[call-overload]
    assert server.calls == []


def test_an_empty_list_is_no_prompt(server: StandIn, client: pc.Client) -> None:
    words = "an empty list is no prompt: one has a token at least, a list of prompts one prompt$"
    for verb in (client.run, client.generate, client.tokenize):
        with pytest.raises(pc.InvalidArgument, match=f"^prompt: {words}"):
            verb([])
    with pytest.raises(pc.InvalidArgument, match=rf"^runs\[1\]\.prompt: {words}"):
        client.run([[1, 2], []])
    assert server.calls == []


def test_run(server: StandIn, client: pc.Client) -> None:
    run = client.run(PROMPT, read="blocks.*.resid_post", logprobs=[9, " Dallas"], loss=True)
    assert run.tokens.strings[-1] == " is"
    assert [top.text for top in run.top] == [" Austin", " Dallas", " Texas"]
    text, probability = run.top[0]
    assert (text, probability) == (" Austin", pytest.approx(math.exp(-0.03)))
    assert run.top[0].id == 9
    assert run.logits is not None and run.logits.shape == (1, 12) and run.logits.positions == (7,)
    assert run.logprobs is not None and run.logprobs.tolist() == [[-1.5, -1.5]]
    assert run.loss is not None and run.loss.shape == (7,)
    assert list(run.reads) == list(run) == ["blocks.0.resid_post", "blocks.1.resid_post"]
    assert run.receipts == ()
    assert run.summary.fingerprint == "f0"
    sent = server.seen(run_pb2.RunRequest)[0].runs[0]
    assert list(sent.logits.logprob_tokens) == [9, 10]


def test_activations_by_name(client: pc.Client) -> None:
    run = client.run(PROMPT, read="blocks.*.resid_post")
    activation = run["blocks.1.resid_post"]
    assert activation.dtype == np.float32
    assert activation.shape == (8, 4)
    assert activation.positions == tuple(range(8))
    assert activation.hook_point == "blocks.1.resid_post"
    assert run["blocks.1.hook_resid_post"] is activation
    assert "blocks.1.resid_post" in run and "blocks.2.resid_post" not in run and 3 not in run
    np.testing.assert_array_equal(run.reads.stack("resid_post"), [run["blocks.0.resid_post"], activation])
    with pytest.raises(KeyError, match=r"was not read; this run has blocks\.0\.resid_post, blocks\.1\.resid_post"):
        run["blocks.0.attn.z"]
    with pytest.raises(KeyError, match="did you mean"):
        run["blocks.0.resid_pots"]
    with pytest.raises(KeyError, match="this run read nothing"):
        client.run(PROMPT)["embed"]


def test_positions_come_as_a_range_or_one_by_one(server: StandIn, client: pc.Client) -> None:
    def answer(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        answered = result(0, request.runs[0])
        answered.reads[0].position_range.start = 3
        for read in answered.reads[1:]:
            read.ClearField("position_range")
            read.positions.extend([6, 2])
        yield run_pb2.RunResponse(result=answered)
        yield summary()

    server.on_run = answer
    site = "blocks.0.resid_post"
    reads: list[str | pc.Read] = [site, site, *(pc.read(site, reduce=how) for how in ("last", "mean", "moments"))]
    run = client.run(PROMPT, read=reads)
    assert [read.positions for read in run.reads.in_order] == [(3, 4, 5, 6, 7), (6, 2), (), (), ()]


def test_a_reduction_that_drops_the_position_axis_has_no_positions(client: pc.Client) -> None:
    run = client.run(PROMPT, read=pc.read("blocks.0.resid_post", reduce="mean"))
    assert run["blocks.0.resid_post"].positions == ()


def test_one_place_read_twice(client: pc.Client) -> None:
    run = client.run(PROMPT, read=["blocks.0.resid_post", pc.read("blocks.0.resid_post", reduce="topk", k=2)])
    with pytest.raises(KeyError, match=r"read 2 times \(rows, topk\)"):
        run["blocks.0.resid_post"]
    assert [read.reduce for read in run.reads.in_order] == [None, "topk"]


@pytest.mark.parametrize(
    ("logits", "top_k", "sent"),
    [
        ("last", None, logits_pb2.LogitsRequest(values=True, top_k=5)),
        ("last", 0, logits_pb2.LogitsRequest(values=True)),
        (None, 5, logits_pb2.LogitsRequest(top_k=5)),
        ("none", 5, logits_pb2.LogitsRequest(top_k=5)),
    ],
)
def test_logits_asked_for(
    server: StandIn, client: pc.Client, logits: str | None, top_k: int | None, sent: logits_pb2.LogitsRequest
) -> None:
    run = client.run(PROMPT, logits=logits, top_k=top_k)
    found = server.seen(run_pb2.RunRequest)[0].runs[0].logits
    found.ClearField("positions")
    assert found == sent
    assert (run.logits is None) == (not sent.values)
    assert len(run.top) == (3 if sent.top_k else 0)


@pytest.mark.parametrize("logits", [None, "none"])
def test_no_logits_means_that_none_are_computed(server: StandIn, client: pc.Client, logits: str | None) -> None:
    client.run(PROMPT, logits=logits)
    assert not server.seen(run_pb2.RunRequest)[0].runs[0].HasField("logits")


def test_none_is_nothing(server: StandIn, client: pc.Client) -> None:
    run = client.run(PROMPT, read=None, logprobs=None)
    assert not run.reads and run.logprobs is None
    assert pc.read("attn.z", heads=None).heads == ()


def test_a_damaged_answer_ends_the_call(server: StandIn, client: pc.Client) -> None:
    released = threading.Event()

    def answer(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        yield run_pb2.RunResponse(chunk=tensor_pb2.TensorChunk(tensor_id=1, data=b"1"))
        released.wait(10)

    server.on_run = answer
    with pytest.raises(pc.Internal, match="damaged"):
        client.run(PROMPT)
    assert server.ended.wait(5)
    released.set()


def test_nothing_asked_computes_no_logits(server: StandIn, client: pc.Client) -> None:
    run = client.run(PROMPT, logits=None, top_k=0)
    assert not server.seen(run_pb2.RunRequest)[0].runs[0].HasField("logits")
    assert (run.logits, run.top, run.logprobs, run.loss) == (None, (), None, None)


def test_at_is_looked_up_once_per_prompt(server: StandIn, client: pc.Client) -> None:
    read = [pc.read("resid_post", positions=pc.at("Texas")), pc.read("embed", positions=pc.at("capital of"))]
    client.run([PROMPT, PROMPT, "Fact: Texas the capital of"], read=read, logits=pc.at("Texas"))
    (tokenize,) = server.seen(model_pb2.TokenizeRequest)
    assert len(tokenize.prompts) == 2
    (request,) = server.seen(run_pb2.RunRequest)
    indices = [list(run.reads[0].positions.indices.indices) for run in request.runs]
    assert indices == [[6], [6], [3]]
    assert [list(run.reads[1].positions.indices.indices) for run in request.runs] == [[4, 5], [4, 5], [5, 6]]
    assert list(request.runs[2].logits.positions.indices.indices) == [3]


def test_tokens_by_text_are_looked_up_bare(server: StandIn, client: pc.Client) -> None:
    client.run(PROMPT, read=pc.read("resid_post", reduce="project", onto=pc.unembed(" Austin")))
    (tokenize,) = server.seen(model_pb2.TokenizeRequest)
    assert tokenize.prompts[0].omit_special_tokens
    (request,) = server.seen(run_pb2.RunRequest)
    assert request.runs[0].reads[0].reduction.project.onto[0].unembed_token == 9


@pytest.mark.parametrize(
    ("token", "words"), [("the capital", "is 2 tokens"), ("Paris", "the tokenizer makes '<unk>' of it")]
)
def test_tokens_by_text_must_be_one(client: pc.Client, token: str, words: str) -> None:
    with pytest.raises(pc.InvalidArgument, match=f"^logprobs: .*{words}"):
        client.run(PROMPT, logprobs=token)
    onto = pc.read("resid_post", reduce="project", onto=[pc.unembed(3), pc.unembed(token)])
    with pytest.raises(pc.InvalidArgument, match=rf"^read\[1\]\.onto: .*{words}"):
        client.run(PROMPT, read=["embed", onto])
    with pytest.raises(pc.InvalidArgument, match=rf"^runs\[1\]\.read\.onto: .*{words}"):
        client.run_many([pc.RunSpec(PROMPT), pc.RunSpec(PROMPT, read=onto)])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (pc.zero("embed", positions=pc.at("Dallas")), r"\.positions: 'Dallas' does not occur"),
        (pc.add("embed", pc.unembed(" the capital")), r"\.vector: ' the capital' is 2 tokens"),
        (
            pc.zero("embed", when=pc.when("embed", pc.unembed(" the capital"), less=0)),
            r"\.when\.direction: ' the capital' is 2 tokens",
        ),
        (pc.knockout(0, 0, [(-1, 1), (-1, pc.at("Dallas"))]), r"\.edges\[1\]: 'Dallas' does not occur"),
        (pc.patch("embed", 0, source_positions=pc.at("Dallas")), r"\.source_positions: 'Dallas' does not occur"),
        (pc.patch("embed", 9, source_positions=pc.at("Dallas")), r"\.source: there is no run 9"),
    ],
)
def test_lookups_of_interventions_that_fail_say_which(client: pc.Client, edit: pc.Intervention, words: str) -> None:
    other = pc.zero("embed")
    given: list[tuple[pc.Intervention | list[pc.Intervention], str]] = [
        (edit, "interventions"),
        ([edit], r"interventions\[0\]"),
        ([other, other, edit], r"interventions\[2\]"),
    ]
    for edits, name in given:
        with pytest.raises(pc.InvalidArgument, match=f"^{name}{words}"):
            client.run(PROMPT, interventions=edits)
        with pytest.raises(pc.InvalidArgument, match=rf"^runs\[1\]\.{name}{words}"):
            client.run_many([pc.RunSpec(PROMPT), pc.RunSpec(PROMPT, interventions=edits)])


def test_half_a_surrogate_pair_names_its_argument(client: pc.Client) -> None:
    with pytest.raises(pc.InvalidArgument, match=r"^logprobs: character 0"):
        client.run(PROMPT, logprobs="\ud800")


def test_many_lookups_go_in_several_calls(server: StandIn, client: pc.Client) -> None:
    client.run([f"Fact: {'the ' * i}Texas" for i in range(40)], read=pc.read("embed", positions=pc.at("Texas")))
    assert [len(call.prompts) for call in server.seen(model_pb2.TokenizeRequest)] == [16, 16, 8]


def test_every_misspelt_read_is_told(server: StandIn, client: pc.Client) -> None:
    with pytest.raises(pc.InvalidArgument) as caught:
        client.run(PROMPT, read=["blocks.0.resid_pots", "embed", "blocks.0.attn.zz"])
    assert [violation.field for violation in caught.value.field_violations] == ["read[0]", "read[2]"]
    assert server.calls == []


def test_runs_of_different_kinds(server: StandIn, client: pc.Client) -> None:
    runs = client.run_many(
        [pc.RunSpec(PROMPT, read="blocks.0.resid_post"), pc.RunSpec([0, 2], logits=None, top_k=0, loss=True)],
        numerics="solo",
    )
    assert [len(run.tokens) for run in runs] == [8, 2]
    assert runs[0].loss is None and runs[1].loss is not None
    (request,) = server.seen(run_pb2.RunRequest)
    assert request.numerics == numerics_pb2.NUMERICS_SOLO
    with pytest.raises(pc.InvalidArgument, match="runs: an empty list"):
        client.run_many([])
    with pytest.raises(pc.InvalidArgument, match="numerics: 'exact'"):
        client.run(PROMPT, numerics="exact")  # type: ignore[call-overload]


def test_an_invalid_run_refuses_the_request(server: StandIn, client: pc.Client) -> None:
    server.fail = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "runs[1] is wrong")]
    with pytest.raises(pc.InvalidArgument, match="is wrong"):
        client.run_many([pc.RunSpec(PROMPT), pc.RunSpec(PROMPT)], return_exceptions=True)


def test_results_come_in_any_order_with_chunks(server: StandIn, client: pc.Client) -> None:
    arrays = [np.random.default_rng(seed).standard_normal((8, 40_000), np.float32) for seed in range(2)]

    def answer(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        pieces = []
        for index in (1, 0):
            header, chunks = streamed(arrays[index], index, 1 << 20)
            answered = result(index, request.runs[index])
            answered.reads[0].values.CopyFrom(header)
            yield run_pb2.RunResponse(result=answered)
            pieces.append(chunks)
        for chunk in (chunk for pair in zip(*pieces, strict=True) for chunk in pair):
            yield run_pb2.RunResponse(chunk=chunk)
        yield summary()

    server.on_run = answer
    runs = client.run([PROMPT, PROMPT], read="blocks.0.resid_post")
    for run, array in zip(runs, arrays, strict=True):
        np.testing.assert_array_equal(run["blocks.0.resid_post"], array)


def lose_the_summary(responses: list[run_pb2.RunResponse]) -> None:
    del responses[-1]


def lose_a_result(responses: list[run_pb2.RunResponse]) -> None:
    del responses[0]


def answer_twice(responses: list[run_pb2.RunResponse]) -> None:
    responses.insert(0, responses[0])


def answer_what_was_not_asked(responses: list[run_pb2.RunResponse]) -> None:
    responses[0].result.run_index = 7


def read_what_was_not_asked(responses: list[run_pb2.RunResponse]) -> None:
    responses[0].result.reads[0].read_index = 7


def stray_chunk(responses: list[run_pb2.RunResponse]) -> None:
    responses.insert(0, run_pb2.RunResponse(chunk=tensor_pb2.TensorChunk(tensor_id=1, data=b"1")))


def positions_beyond_the_tokens(responses: list[run_pb2.RunResponse]) -> None:
    responses[0].result.reads[0].position_range.stop = 2**31 - 1


def odd_top(responses: list[run_pb2.RunResponse]) -> None:
    responses[0].result.logits.positions.append(3)


@pytest.mark.parametrize(
    "change",
    [
        lose_the_summary,
        lose_a_result,
        answer_twice,
        answer_what_was_not_asked,
        read_what_was_not_asked,
        stray_chunk,
        positions_beyond_the_tokens,
        odd_top,
    ],
)
def test_an_answer_that_does_not_add_up_is_refused(server: StandIn, client: pc.Client, change: object) -> None:
    def answer(request: run_pb2.RunRequest) -> list[run_pb2.RunResponse]:
        responses = [run_pb2.RunResponse(result=result(0, request.runs[0])), summary()]
        change(responses)  # type: ignore[operator]
        return responses

    server.on_run = answer
    with pytest.raises(pc.Internal, match="damaged") as caught:
        client.run(PROMPT, read="blocks.0.resid_post")
    assert caught.value.reason == "DATA_LOSS"


def test_the_summary_may_come_with_the_last_result(server: StandIn, client: pc.Client) -> None:
    server.on_run = lambda request: [
        run_pb2.RunResponse(result=result(0, request.runs[0]), summary=summary().summary),
    ]
    assert client.run(PROMPT).summary.fingerprint == "f0"


def test_unknown_messages_of_a_newer_server_are_passed_over(server: StandIn, client: pc.Client) -> None:
    server.on_run = lambda request: [
        run_pb2.RunResponse(),
        run_pb2.RunResponse(result=result(0, request.runs[0])),
        summary(),
    ]
    assert client.run(PROMPT).top


def test_unavailable_is_tried_again(server: StandIn, client: pc.Client) -> None:
    server.fail = [Failure(grpc.StatusCode.UNAVAILABLE, "loading")] * 2
    assert client.describe().name == "stand-in"
    server.fail = [Failure(grpc.StatusCode.UNAVAILABLE, "loading")]
    assert client.run(PROMPT).top
    assert len(server.calls) == 5


def test_what_was_refused_is_not_tried_again(server: StandIn, client: pc.Client) -> None:
    server.fail = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")]
    with pytest.raises(pc.Overloaded):
        client.run(PROMPT)
    assert len(server.calls) == 1


def test_no_server() -> None:
    with pc.connect("127.0.0.1:1", timeout=10) as client, pytest.raises(pc.Unavailable, match=r"at 127\.0\.0\.1:1"):
        client.describe()


def test_the_timeout_travels(server: StandIn, client: pc.Client) -> None:
    client.describe()
    client.describe(timeout=3)
    assert server.seconds_left[0] == pytest.approx(10, abs=1)
    assert server.seconds_left[1] == pytest.approx(3, abs=1)
    with pc.connect(server.target, timeout=math.inf) as patient:
        patient.describe()
    assert server.seconds_left[2] is None or server.seconds_left[2] > 1e6


def test_one_timeout_for_all_calls_of_a_verb(server: StandIn, client: pc.Client) -> None:
    server.seconds_to_tokenize = 0.5
    client.run(PROMPT, read=pc.read("embed", positions=pc.at("Texas")), timeout=5)
    first, second = server.seconds_left
    assert first is not None and second is not None
    assert second < first - 0.4


def test_deadline(server: StandIn, client: pc.Client) -> None:
    released = threading.Event()

    def stall(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        released.wait(10)
        yield summary()

    server.on_run = stall
    start_time = time.monotonic()
    with pytest.raises(pc.DeadlineExceeded, match="within the timeout") as caught:
        client.run(PROMPT, timeout=0.2)
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    released.set()
    assert time.monotonic() - start_time < 5


async def test_cancelling_a_task_cancels_the_call(server: StandIn, async_client: pc.AsyncClient) -> None:
    released = threading.Event()

    def stall(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        yield run_pb2.RunResponse(result=result(0, request.runs[0]))
        released.wait(10)

    server.on_run = stall
    task = asyncio.create_task(async_client.run(PROMPT))
    assert await asyncio.to_thread(server.began.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.ended.wait, 5)
    released.set()


async def test_closing_the_client_ends_its_calls(server: StandIn, async_client: pc.AsyncClient) -> None:
    released = threading.Event()

    def stall(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        released.wait(10)
        yield summary()

    server.on_run = stall
    task = asyncio.create_task(async_client.run(PROMPT))
    assert await asyncio.to_thread(server.began.wait, 5)
    await async_client.close()
    with pytest.raises(pc.Cancelled):
        await task
    released.set()


def test_closing_the_client_in_another_thread_ends_its_calls(server: StandIn, client: pc.Client) -> None:
    released = threading.Event()

    def stall(request: run_pb2.RunRequest) -> Iterator[run_pb2.RunResponse]:
        client.close()
        released.wait(10)
        yield summary()

    server.on_run = stall
    with pytest.raises(pc.Cancelled):
        client.run(PROMPT)
    released.set()


@pytest.mark.parametrize("verb", ["describe()", "run('Fact')"])
def test_an_interrupted_call_leaves_at_once(server: StandIn, verb: str) -> None:
    server.hold = threading.Event()
    code = f"import patchclamp as pc\nwith pc.connect({server.target!r}) as client:\n    client.{verb}"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert server.began.wait(20)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=10)[1]
    finally:
        process.kill()
        process.communicate()
        server.hold.set()
    assert server.ended.wait(5)


async def test_both_clients_give_the_same(client: pc.Client, async_client: pc.AsyncClient) -> None:
    options = {"read": ["blocks.*.resid_post", pc.read("embed", positions=pc.at("Texas"))], "loss": True}
    one, other = client.run(PROMPT, **options), await async_client.run(PROMPT, **options)  # type: ignore[call-overload]
    assert (one.tokens, one.top) == (other.tokens, other.top)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert client.describe() is not None
    assert repr(await async_client.describe()) == repr(client.describe())
    assert await async_client.tokenize([PROMPT]) == client.tokenize([PROMPT])
    assert len(await async_client.run([PROMPT, PROMPT])) == 2


def test_both_clients_have_the_same_verbs() -> None:
    def verbs(kind: type) -> dict[str, str]:
        return {
            name: str(inspect.signature(function)).replace("AsyncGeneration", "Generation")
            for name, function in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert verbs(pc.Client) == verbs(pc.AsyncClient)
    assert inspect.signature(pc.connect).parameters == inspect.signature(pc.aio.connect).parameters
    for name, function in inspect.getmembers(pc.Client, inspect.isfunction):
        if not name.startswith("_"):
            assert function.__doc__ == getattr(pc.AsyncClient, name).__doc__, name


def test_closing(server: StandIn) -> None:
    client = pc.connect(server.target)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.describe()
    with pc.connect(server.target) as inside:
        inside.describe()
    with pytest.raises(RuntimeError, match="closed"):
        inside.run(PROMPT)


async def test_closing_asynchronously(server: StandIn) -> None:
    client = pc.aio.connect(server.target)
    await client.close()
    await client.close()
    with pytest.raises(RuntimeError, match="closed"):
        await client.describe()


def test_connecting_is_lazy() -> None:
    assert repr(pc.connect("dns:///nowhere.invalid:1")) == "Client('dns:///nowhere.invalid:1')"


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(None, None, None, None) == Config("localhost:50051", None, False, 120.0)
    monkeypatch.setenv("PATCHCLAMP_TARGET", "unix:/run/patchclamp.sock")
    monkeypatch.setenv("PATCHCLAMP_TOKEN", "secret-one")
    monkeypatch.setenv("PATCHCLAMP_TIMEOUT", "7.5")
    assert resolve(None, None, None, None) == Config("unix:/run/patchclamp.sock", "secret-one", False, 7.5)
    assert resolve("a:1", "secret-two", True, 3) == Config("a:1", "secret-two", True, 3.0)
    monkeypatch.setenv("PATCHCLAMP_TIMEOUT", "soon")
    with pytest.raises(pc.InvalidArgument, match="PATCHCLAMP_TIMEOUT"):
        pc.connect()


def test_the_token_travels_and_stays_secret(server: StandIn) -> None:
    with pc.connect(server.target, token="s3cr3t") as client:
        client.describe()
        client.run(PROMPT)
        assert "s3cr3t" not in repr(client) + repr(vars(client)) + str(client)
    assert [seen["authorization"] for seen in server.metadata] == ["Bearer s3cr3t"] * 2
    assert server.metadata[0]["user-agent"].startswith(f"patchclamp/{pc.__version__}")
    with pytest.raises(pc.InvalidArgument, match="token") as caught:
        pc.connect(token="s3cr3t\n")
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "target",
    ["localhost:50051", "unix:/path", "dns:///name:1", "[::1]:50051", "10.0.0.1:80", "ipv6:[::1]:5", "a.b-c:1"],
)
def test_targets(target: str) -> None:
    pc.connect(target)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("localhost", "names no port"),
        ("http://localhost:50051", "write 'localhost:50051'"),
        ("::1", "names no port"),
        ("host :1", "names no port"),
    ],
)
def test_targets_that_would_hang(target: str, words: str) -> None:
    with pytest.raises(pc.InvalidArgument, match=words):
        pc.connect(target)


@pytest.mark.parametrize("timeout", [0, -1, math.nan])
def test_timeouts_that_are_none(client: pc.Client, timeout: float) -> None:
    with pytest.raises(pc.InvalidArgument, match="timeout"):
        client.describe(timeout=timeout)
    with pytest.raises(pc.InvalidArgument, match="timeout"):
        pc.connect(timeout=timeout)
    with pytest.raises(TypeError, match="timeout"):
        pc.connect(timeout="3")  # type: ignore[arg-type]


def test_unix_sockets(tmp_path: Path) -> None:
    state = StandIn()
    server = start(state, f"unix:{tmp_path}/s")
    with pc.connect(f"unix:{tmp_path}/s") as client:
        assert client.describe().name == "stand-in"
    server.stop(None).wait()


def test_tls_needs_a_server_that_speaks_it(server: StandIn, tmp_path: Path) -> None:
    with pc.connect(server.target, tls=True, timeout=10) as client, pytest.raises(pc.Unavailable, match="certificate"):
        client.describe()
    with pytest.raises(pc.InvalidArgument, match="tls: cannot read"):
        pc.connect("a:1", tls=tmp_path / "missing.pem").describe()


def test_channels_behave() -> None:
    options = dict(channel_options(Config("localhost:1")))
    assert options["grpc.keepalive_time_ms"] == 30_000
    assert options["grpc.keepalive_timeout_ms"] == 10_000
    assert options["grpc.max_receive_message_length"] == 16 << 20
    assert options["grpc.enable_http_proxy"] == 0
    assert "grpc.enable_http_proxy" not in dict(channel_options(Config("dns:///far.example:1")))
    assert "loadBalancingConfig" not in service_config(Config("localhost:1"))
    assert service_config(Config("dns:///a:1"))["loadBalancingConfig"] == [{"round_robin": {}}]


def test_threads_may_share_a_client(client: pc.Client) -> None:
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(client.describe().name)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["stand-in"] * 8
