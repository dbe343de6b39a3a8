"""Every kind of bad input is refused before the model runs, with the field, what would be valid, and a reason."""

from __future__ import annotations

import struct
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from patchclamp.v1 import (
    hook_point_pb2,
    logits_pb2,
    model_pb2,
    read_pb2,
    run_pb2,
    tensor_pb2,
    vector_pb2,
)
from service.build import (
    between,
    chat,
    edit,
    ids,
    indices,
    lens,
    logits,
    packed,
    project,
    read,
    run,
    span,
    target,
    text,
    top_k,
    unembed,
    vector,
)
from service.calls import Caller, failure_of
from service.conftest import Connect
from service.stub import StubWorker, make_tokenizer


def unknown(number: int) -> Any:
    """A value of an enum as a newer client may send it."""
    return number


ONES = [1.0] * 16
VALUES = logits_pb2.LogitsRequest(values=True)
ZERO = edit(zero={"target": target()})
PATCHED = run(interventions=[edit(patch={"target": target(layer=1), "source_run": 0})]).runs[0]
INVALID = {
    "no runs": (run_pb2.RunRequest(), "runs", "at least one"),
    "no prompt": (run_pb2.RunRequest(runs=[run_pb2.RunSpec()]), "runs[0].prompt", "text, token_ids or chat"),
    "no token ids": (run(prompt=ids()), "runs[0].prompt.token_ids.ids", "at least one token"),
    "empty text": (run(prompt=text("")), "runs[0].prompt.text", "give text, or token ids"),
    "no messages": (run(prompt=chat()), "runs[0].prompt.chat.messages", "at least one message"),
    "id beyond the vocabulary": (run(prompt=ids(1, 50, 2)), "runs[0].prompt.token_ids.ids[1]", "0 .. 49"),
    "unknown numerics": (run_pb2.RunRequest(runs=run().runs, numerics=unknown(9)), "numerics", "DEFAULT or SOLO"),
    "no site": (run(read_pb2.Read()), "runs[0].reads[0].hook_point.site", "embed, resid_post"),
    "site of the future": (
        run(read_pb2.Read(hook_point=hook_point_pb2.HookPoint(site=unknown(999)))),
        "runs[0].reads[0].hook_point.site",
        "999 is not a site",
    ),
    "layer too high": (run(read(layer=3)), "runs[0].reads[0].hook_point.layer", "0 .. 2"),
    "layer outside blocks": (run(read("EMBED", layer=0)), "runs[0].reads[0].hook_point.layer", "leave the layer out"),
    "head too high": (run(read("ATTN_Z", heads=[1, 4])), "runs[0].reads[0].heads[1]", "0 .. 3"),
    "key head too high": (run(read("ATTN_K", head=2)), "runs[0].reads[0].hook_point.head", "0 .. 1"),
    "heads without a head axis": (run(read(heads=[0])), "runs[0].reads[0].heads", "pos, d_model"),
    "head without a head axis": (run(read(head=0)), "runs[0].reads[0].hook_point.head", "no head axis"),
    "heads twice": (run(read("ATTN_Z", heads=[1, 2, 1])), "runs[0].reads[0].heads", "head 1 is there more than once"),
    "head and heads": (run(read("ATTN_Z", head=1, heads=[1])), "runs[0].reads[0].heads", "either"),
    "position too high": (
        run(read(positions=indices(0, 5))), "runs[0].reads[0].positions.indices.indices[1]", "-5 .. 4"
    ),
    "position too low": (run(read(positions=indices(-6))), "runs[0].reads[0].positions.indices.indices[0]", "-5 .. 4"),
    "positions twice": (
        run(read(positions=indices(4, -1))), "runs[0].reads[0].positions.indices.indices", "position 4 is there more"
    ),
    "no indices": (run(read(positions=indices())), "runs[0].reads[0].positions.indices.indices", "at least one"),
    "range too far": (run(read(positions=between(0, 6))), "runs[0].reads[0].positions.range.stop", "-5 .. 5"),
    "range starts before": (run(read(positions=between(-6))), "runs[0].reads[0].positions.range.start", "-5 .. 5"),
    "empty range": (run(read(positions=between(3, 3))), "runs[0].reads[0].positions", "selects no position"),
    "nothing generated": (run(read(positions=span("GENERATED"))), "runs[0].reads[0].positions", "selects no position"),
    "all excluded": (run(read(positions=span("LAST", (4,)))), "runs[0].reads[0].positions", "selects no position"),
    "exclusion outside": (run(read(positions=span("ALL", (7,)))), "runs[0].reads[0].positions.exclude[0]", "-5 .. 4"),
    "unknown span": (
        run(read(positions=hook_point_pb2.Positions(span=unknown(77)))),
        "runs[0].reads[0].positions.span",
        "GENERATED or LAST",
    ),
    "read dtype": (run(read(dtype="DTYPE_INT32")), "runs[0].reads[0].dtype", "float32, bfloat16 or float16"),
    "top k of nothing": (run(read(reduction=top_k(0))), "runs[0].reads[0].reduction.top_k.k", "1 .. 16"),
    "top k too wide": (run(read(reduction=top_k(17))), "runs[0].reads[0].reduction.top_k.k", "1 .. 16"),
    "top k of a pattern": (
        run(read("ATTN_PATTERN", reduction=top_k(6))), "runs[0].reads[0].reduction.top_k.k", "1 .. 5"
    ),
    "mean of scores": (
        run(read("ATTN_SCORES", reduction=read_pb2.Reduction(mean={}))), "runs[0].reads[0].reduction.mean", "-inf"
    ),
    "norm of scores": (
        run(read("ATTN_SCORES", reduction=read_pb2.Reduction(norm={}))), "runs[0].reads[0].reduction.norm", "-inf"
    ),
    "moments of scores": (
        run(read("ATTN_SCORES", reduction=read_pb2.Reduction(moments={}))),
        "runs[0].reads[0].reduction.moments",
        "reduce attn.pattern instead",
    ),
    "scores by magnitude": (
        run(read("ATTN_SCORES", reduction=top_k(1, by_magnitude=True))),
        "runs[0].reads[0].reduction.top_k.by_magnitude",
        "reduce attn.pattern instead",
    ),
    "lens off the stream": (
        run(read("MLP_POST", reduction=lens(1))), "runs[0].reads[0].reduction.logit_lens", "[pos, d_model]"
    ),
    "lens per head": (run(read("ATTN_Z", reduction=lens(1))), "runs[0].reads[0].reduction.logit_lens", "attn.z has"),
    "lens too wide": (run(read(reduction=lens(51))), "runs[0].reads[0].reduction.logit_lens.k", "1 .. 50"),
    "project onto nothing": (run(read(reduction=project())), "runs[0].reads[0].reduction.project.onto", "at least one"),
    "project a pattern": (
        run(read("ATTN_PATTERN", reduction=project(vector(ONES)))),
        "runs[0].reads[0].reduction.project.onto",
        "depends on the prompt",
    ),
    "project too narrow": (
        run(read(reduction=project(vector([1.0] * 15)))), "runs[0].reads[0].reduction.project.onto[0].tensor", "16 wide"
    ),
    "project too many": (
        run(read(reduction=project(vector(np.ones((257, 16)))))), "runs[0].reads[0].reduction.project.onto", "256"
    ),
    "vector of NaN": (
        run(read(reduction=project(vector(ONES), vector([float("nan")] * 16)))),
        "runs[0].reads[0].reduction.project.onto[1].tensor",
        "finite",
    ),
    "vector of infinities": (
        run(read(reduction=project(vector([float("inf")] * 16)))),
        "runs[0].reads[0].reduction.project.onto[0].tensor",
        "finite",
    ),
    "vector beyond float32": (
        run(read(reduction=project(vector([1e300] * 16, "FLOAT64")))),
        "runs[0].reads[0].reduction.project.onto[0].tensor",
        "finite in float32",
    ),
    "vector without source": (
        run(read(reduction=project(vector_pb2.VectorSource()))), "runs[0].reads[0].reduction.project.onto[0]", "sources"
    ),
    "vector of integers": (
        run(read(reduction=project(vector(ONES, dtype="INT32")))),
        "runs[0].reads[0].reduction.project.onto[0].tensor.dtype",
        "float32, float16, bfloat16 or float64",
    ),
    "vector of three axes": (
        run(read(reduction=project(vector(ONES, shape=(1, 1, 16))))),
        "runs[0].reads[0].reduction.project.onto[0].tensor.shape",
        "[n, width]",
    ),
    "vector too short": (
        run(read(reduction=project(vector(ONES, inline=b"1234")))),
        "runs[0].reads[0].reduction.project.onto[0].tensor.inline",
        "64 bytes are needed",
    ),
    "vector of a strange byte order": (
        run(read(reduction=project(vector(ONES, byte_order=2)))),
        "runs[0].reads[0].reduction.project.onto[0].tensor.byte_order",
        "little-endian",
    ),
    "vector that follows": (
        run(read(reduction=project(vector_pb2.VectorSource(
            tensor=tensor_pb2.Tensor(dtype="DTYPE_FLOAT32", shape=[16], streamed=tensor_pb2.StreamedContent())
        )))),
        "runs[0].reads[0].reduction.project.onto[0].tensor.inline",
        "must be inline",
    ),
    "safetensors that are none": (
        run(read(reduction=project(vector_pb2.VectorSource(safetensors=b"no file")))),
        "runs[0].reads[0].reduction.project.onto[0].safetensors",
        "not a safetensors file",
    ),
    "safetensors of two": (
        run(read(reduction=project(packed(a=np.ones(16, "f4"), b=np.ones(16, "f4"))))),
        "runs[0].reads[0].reduction.project.onto[0].safetensors",
        "exactly one tensor",
    ),
    "safetensors of integers": (
        run(read(reduction=project(packed(a=np.ones(16, "i4"))))),
        "runs[0].reads[0].reduction.project.onto[0].safetensors",
        "must be float32",
    ),
    "safetensors too large": (
        run(read(reduction=project(vector_pb2.VectorSource(safetensors=b" " * ((1 << 20) + 1))))),
        "runs[0].reads[0].reduction.project.onto[0].safetensors",
        "at most 1048576 bytes",
    ),
    "unembedding beyond the vocabulary": (
        run(read(reduction=project(unembed(50)))),
        "runs[0].reads[0].reduction.project.onto[0].unembed_token",
        "0 .. 49",
    ),
    "unembedding off the stream": (
        run(read("MLP_POST", reduction=project(unembed(1)))),
        "runs[0].reads[0].reduction.project.onto[0].unembed_token",
        "16 wide",
    ),
    "logits of nothing": (logits(), "runs[0].logits", "asks for nothing"),
    "logits dtype": (logits(values=True, dtype="DTYPE_FLOAT64"), "runs[0].logits.dtype", "float32"),
    "logits of no row": (logits(values=True, positions=between(2, 2)), "runs[0].logits.positions", "no position"),
    "logits outside": (logits(values=True, positions=indices(9)), "runs[0].logits.positions.indices.indices[0]", "4"),
    "logits top k": (logits(top_k=51), "runs[0].logits.top_k", "0 .. 50"),
    "logits top k beyond every limit": (logits(top_k=1 << 31), "runs[0].logits.top_k", "0 .. 50"),
    "log-probability of a stranger": (logits(logprob_tokens=[1, 50]), "runs[0].logits.logprob_tokens[1]", "0 .. 49"),
    "log-probabilities of too many": (logits(logprob_tokens=[1] * 4097), "runs[0].logits.logprob_tokens", "4096"),
    "intervention without an op": (run(interventions=[edit()]), "runs[0].interventions[0]", "exactly one"),
    "baseline without logits": (run(baseline=True, interventions=[ZERO]), "runs[0].baseline", "ask for logits"),
    "baseline of nothing": (run(baseline=True, logits=VALUES), "runs[0].baseline", "give an intervention"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
async def test_an_invalid_field_is_named_with_what_would_be_valid(caller: Caller, case: str) -> None:
    request, field, valid = INVALID[case]
    failure = await failure_of(caller.run(request))
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
    assert failure.info.reason == "INVALID_FIELD"
    assert list(failure.violations) == [field]
    assert valid in failure.violations[field]
    assert caller.worker.jobs == {}


async def test_all_violations_are_named_not_the_first(caller: Caller) -> None:
    request = run(read(layer=7, dtype="DTYPE_INT64", positions=indices(11)), read("ATTN_Z", heads=[9]))
    request.runs.add()
    failure = await failure_of(caller.run(request))
    assert list(failure.violations) == [
        "runs[0].reads[0].dtype",
        "runs[0].reads[0].hook_point.layer",
        "runs[0].reads[0].positions.indices.indices[0]",
        "runs[0].reads[1].heads[0]",
        "runs[1].prompt",
    ]


async def test_reads_are_checked_even_where_the_prompt_is_invalid(caller: Caller) -> None:
    failure = await failure_of(caller.run(run(read(layer=7), prompt=ids())))
    assert set(failure.violations) == {"runs[0].prompt.token_ids.ids", "runs[0].reads[0].hook_point.layer"}


async def test_a_thousand_violations_still_fit_into_the_trailers(caller: Caller) -> None:
    reads = [read(layer=1000 + i, positions=indices(*range(100, 140))) for i in range(200)]
    failure = await failure_of(caller.run(run(*reads)))
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "runs[0].reads[0].hook_point.layer" in failure.violations
    assert failure.violations[""].endswith("more")
    assert len(failure.message) <= 1100


async def test_an_absent_site_is_told_with_its_reason_and_those_there_are(caller: Caller) -> None:
    failure = await failure_of(caller.run(run(read("RESID_MID"))))
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
    assert failure.info.reason == "SITE_ABSENT"
    available = "embed, resid_post, attn.k, attn.z, attn.scores, attn.pattern, mlp.post, ln_final"
    assert failure.info.metadata["available"] == available
    violation = failure.violations["runs[0].reads[0].hook_point.site"]
    assert "its blocks are parallel" in violation
    assert available in violation


async def test_a_site_absent_in_one_layer_is_told_with_the_layers_that_have_it(caller: Caller) -> None:
    failure = await failure_of(caller.run(run(read("MLP_POST", layer=1))))
    assert failure.info.reason == "SITE_ABSENT"
    violation = failure.violations["runs[0].reads[0].hook_point.layer"]
    assert "layer 1 has no MLP" in violation
    assert "layers 0, 2 have it" in violation


async def test_a_prompt_longer_than_the_context_is_told_with_limit_and_demand(caller: Caller) -> None:
    prompts = (ids(*[1] * 33), "token_ids.ids"), (text("w1 " * 33), "text"), (chat(("user", "w1 " * 31)), "chat")
    for prompt, field in prompts:
        failure = await failure_of(caller.run(run(prompt=prompt)))
        assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
        assert failure.info.reason == "PROMPT_TOO_LONG"
        assert (failure.info.metadata["limit"], failure.info.metadata["demand"]) == ("32", "33")
        assert list(failure.violations) == [f"runs[0].prompt.{field}"]


async def test_an_unknown_model_is_not_found(caller: Caller) -> None:
    failure = await failure_of(caller.model.Describe(model_pb2.DescribeRequest(model="gpt-9")))
    assert failure.code == grpc.StatusCode.NOT_FOUND
    assert failure.info.reason == "MODEL_NOT_FOUND"
    assert (failure.resource.resource_type, failure.resource.resource_name) == ("model", "gpt-9")
    for call in (
        caller.run(run_pb2.RunRequest(model="gpt-9", runs=run().runs)),
        caller.model.Tokenize(model_pb2.TokenizeRequest(model="gpt-9", prompts=[ids(1)])),
    ):
        assert (await failure_of(call)).info.reason == "MODEL_NOT_FOUND"


async def test_a_name_of_any_length_and_script_still_fits_into_the_trailers(caller: Caller) -> None:
    for name in ("x" * 100_000, "модель" * 10_000):
        failure = await failure_of(caller.model.Describe(model_pb2.DescribeRequest(model=name)))
        assert failure.code == grpc.StatusCode.NOT_FOUND
        assert failure.resource.resource_name.removesuffix(" ...") in name


NOT_SERVED = {
    "interventions.feature": run(interventions=[edit(feature={})]),
    "interventions.patch.handle": run(interventions=[edit(patch={"target": target(), "handle": "h"})]),
    "numerics.deterministic": run_pb2.RunRequest(runs=run().runs, numerics="NUMERICS_DETERMINISTIC"),
    "vectors.direction": run(read(reduction=project(vector_pb2.VectorSource(direction="d")))),
    "vectors.handle": run(read(reduction=project(vector_pb2.VectorSource(handle="h")))),
    "vectors.decoder": run(read(reduction=project(vector_pb2.VectorSource(decoder=vector_pb2.FeatureRow())))),
    "vectors.encoder": run(read(reduction=project(vector_pb2.VectorSource(encoder=vector_pb2.FeatureRow())))),
    "keep": run_pb2.RunRequest(runs=[run_pb2.RunSpec(prompt=ids(1), keep=[{}])]),
    "profile": run(profile="kind"),
}


@pytest.mark.parametrize("arm", NOT_SERVED)
async def test_an_arm_that_is_not_served_is_named_never_ignored(caller: Caller, arm: str) -> None:
    failure = await failure_of(caller.run(NOT_SERVED[arm]))
    assert failure.code == grpc.StatusCode.UNIMPLEMENTED
    assert failure.info.reason == "NOT_SERVED"
    assert failure.info.metadata["arm"] == arm
    described = await caller.model.Describe(model_pb2.DescribeRequest())
    assert {c.name: c.available for c in described.capabilities}[arm] is False


@pytest.mark.parametrize(
    ("setting", "value", "request_", "demand"),
    [
        ("max_runs", 2, run_pb2.RunRequest(runs=[run().runs[0]] * 3), 3),
        ("max_reads", 1, run(read(), read()), 2),
        ("max_interventions", 1, run(interventions=[edit(zero={"target": target(layer=i)}) for i in (0, 1)]), 2),
        ("max_tokens", 9, run_pb2.RunRequest(runs=[run().runs[0]] * 2), 10),
        # 3 layers x 5 positions x 16 entries x 4 bytes
        ("max_result_bytes", 959, run(read()), 960),
        ("max_result_bytes", 479, run(read(dtype="DTYPE_BFLOAT16")), 480),
        # patterns of 2 of 4 heads and 4 of 5 queries, twice: 2 x 3 x 2 x 4 x 5 x 4
        ("max_result_bytes", 959, run(*[read("ATTN_PATTERN", heads=[0, 3], positions=span("ALL", (1,)))] * 2), 960),
        # but in the making all 4 heads and 5 queries, before and after the softmax: 2 x 4 x 5 x 5 x 4
        ("max_result_bytes", 799, run(read("ATTN_PATTERN", heads=[0, 3], positions=span("LAST"))), 800),
        ("max_result_bytes", 799, run(read("ATTN_SCORES", layer=0, positions=span("LAST"))), 800),
        ("max_prompt_characters", 4, run(prompt=text("w1 w2")), 5),
        ("max_prompt_characters", 8, run(prompt=chat(("user", "w1"), ("go", "w"))), 9),
        # values and indices of the 2 largest of 5 rows in one layer
        ("max_result_bytes", 79, run(read(layer=0, reduction=top_k(2))), 80),
        ("max_result_bytes", 63, run(read(layer=0, reduction=read_pb2.Reduction(mean={}))), 64),
        ("max_result_bytes", 127, run(read(layer=0, reduction=read_pb2.Reduction(moments={}))), 128),
        ("max_result_bytes", 19, run(read(layer=0, reduction=read_pb2.Reduction(norm={}))), 20),
        ("max_result_bytes", 39, run(read(layer=0, reduction=project(vector(ONES), unembed(3)))), 40),
        ("max_result_bytes", 199, logits(values=True), 200),
        ("max_result_bytes", 999, logits(values=True, positions=span("ALL")), 1000),
        ("max_result_bytes", 7, logits(logprob_tokens=[1, 2]), 8),
        # the logits of the run and of its baseline
        ("max_result_bytes", 399, run(logits=VALUES, baseline=True, interventions=[ZERO]), 400),
        # one layer's 5 rows of 16, held once however many runs take them
        ("max_result_bytes", 319, run_pb2.RunRequest(runs=[run().runs[0], PATCHED, PATCHED]), 320),
        ("max_result_bytes", 15, run(loss=True), 16),
    ],
)
async def test_what_exceeds_a_limit_is_told_with_limit_and_demand_before_it_runs(
    connect: Connect, setting: str, value: int, request_: run_pb2.RunRequest, demand: int
) -> None:
    caller = await connect(**{setting: value})
    failure = await failure_of(caller.run(request_))
    assert failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.info.reason == "REQUEST_TOO_LARGE"
    assert (failure.info.metadata["limit"], failure.info.metadata["demand"]) == (str(value), str(demand))
    assert caller.worker.jobs == {}
    responses = await (await connect(**{setting: demand})).run(request_)
    assert responses[-1].HasField("summary")


async def test_no_more_top_tokens_are_asked_for_than_a_message_holds(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchclamp_server.service.parse.MOST_TOP_TOKENS", 14)
    caller = await connect()
    failure = await failure_of(caller.run(logits(top_k=3, positions=span("ALL"))))
    assert failure.info.reason == "REQUEST_TOO_LARGE"
    assert (failure.info.metadata["limit"], failure.info.metadata["demand"]) == ("14", "15")


async def test_no_more_positions_are_listed_than_a_message_holds(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchclamp_server.service.parse.MOST_LISTED_POSITIONS", 8)
    caller = await connect()
    gaps = indices(0, 2, 4)
    failure = await failure_of(caller.run(run(read(positions=gaps))))
    assert failure.info.reason == "REQUEST_TOO_LARGE"
    assert "listed positions of one run's reads" in failure.message
    assert (failure.info.metadata["limit"], failure.info.metadata["demand"]) == ("8", "9")
    mean = read_pb2.Reduction(mean={})
    for fits in (run(*[read(positions=gaps, layer=0)] * 2), run(read()), run(read(positions=gaps, reduction=mean))):
        assert (await caller.run(fits))[-1].HasField("summary")


async def test_an_empty_text_is_refused_even_if_special_tokens_would_fill_it(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: tokenizer.describe([1]))
    caller = await connect(StubWorker(tokenizer))
    assert list((await failure_of(caller.run(run(prompt=text(""))))).violations) == ["runs[0].prompt.text"]
    prompts = model_pb2.TokenizeRequest(prompts=[text("")])
    assert list((await failure_of(caller.model.Tokenize(prompts))).violations) == ["prompts[0].text"]


async def test_scores_may_be_reduced_by_what_keeps_their_masked_entries(caller: Caller) -> None:
    for reduction in (top_k(1), read_pb2.Reduction(last={})):
        assert (await caller.run(run(read("ATTN_SCORES", reduction=reduction))))[-1].HasField("summary")


async def test_prompts_of_text_need_a_tokenizer_and_of_chat_a_template(connect: Connect) -> None:
    bare = await connect(StubWorker())
    untemplated = await connect(StubWorker(make_tokenizer(template=None)))
    for caller, prompt in ((bare, text("w1")), (bare, chat(("user", "w1"))), (untemplated, chat(("user", "w1")))):
        failure = await failure_of(caller.run(run(prompt=prompt)))
        assert failure.code == grpc.StatusCode.FAILED_PRECONDITION
        assert failure.info.reason == "UNSUPPORTED_BY_MODEL"
    assert (await bare.run(run(prompt=ids(1, 2))))[-1].HasField("summary")


async def test_a_conversation_that_the_template_refuses_is_an_invalid_field(connect: Connect) -> None:
    strict = StubWorker(make_tokenizer(template="{{ raise_exception('system is no role here') }}"))
    failure = await failure_of((await connect(strict)).run(run(prompt=chat(("system", "w1")))))
    assert "system is no role here" in failure.violations["runs[0].prompt.chat.messages"]


async def test_tokenize_checks_its_prompts_too(caller: Caller) -> None:
    failure = await failure_of(caller.model.Tokenize(model_pb2.TokenizeRequest()))
    assert list(failure.violations) == ["prompts"]
    failure = await failure_of(caller.model.Tokenize(model_pb2.TokenizeRequest(prompts=[text("w1"), ids(50)])))
    assert list(failure.violations) == ["prompts[1].token_ids.ids[0]"]


async def test_tokenize_has_the_limits_of_runs(connect: Connect) -> None:
    caller = await connect(max_tokens=3, max_runs=2)
    for prompts, demand in (([ids(1, 2), ids(3, 4)], "4"), ([ids(1)] * 3, "3")):
        failure = await failure_of(caller.model.Tokenize(model_pb2.TokenizeRequest(prompts=prompts)))
        assert failure.info.reason == "REQUEST_TOO_LARGE"
        assert failure.info.metadata["demand"] == demand


async def test_vectors_of_every_form_reach_the_worker_as_float32_rows(caller: Caller) -> None:
    half = np.asarray(ONES, "<f2").tobytes()
    upper = b"".join(struct.pack("<f", 1.0)[2:] for _ in ONES)
    onto = project(
        vector(ONES),
        vector(np.ones((2, 16)), "FLOAT64"),
        vector(ONES, "FLOAT16", inline=half),
        vector(ONES, "BFLOAT16", inline=upper),
        packed(v=np.ones((1, 16), "f4")),
        unembed(3),
    )
    await caller.run(run(read(reduction=onto)))
    (job,) = caller.worker.jobs.values()
    reduction = job.runs[0].reads[0].reduction
    tensors = [rows for rows in reduction.onto if isinstance(rows, torch.Tensor)]  # type: ignore[union-attr]
    assert [tuple(rows.shape) for rows in tensors] == [(1, 16), (2, 16), (1, 16), (1, 16), (1, 16)]
    assert all(rows.dtype == torch.float32 and bool((rows == 1).all()) for rows in tensors)
