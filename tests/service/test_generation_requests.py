"""Requests to generate reach the worker as they were meant, or are refused with every field that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from patchclamp.v1 import generation_pb2, read_pb2, tensor_pb2
from patchclamp_server.adapters.tokenizer import Tokenizer
from patchclamp_server.config import ServerConfig
from patchclamp_server.engine.messages import Finish, Loaded, StopRules
from patchclamp_server.errors import Error, FailedPrecondition, InvalidArgument, NotServed, TooLarge
from patchclamp_server.interventions.ops import Replace
from patchclamp_server.positions import Positions, Range, Span
from patchclamp_server.service.generation import BACKLOG, ParsedGeneration, parse_generate_request
from patchclamp_server.service.tensors import INLINE_BYTES
from service.build import between, edit, generation, ids, indices, project, read, span, target, unembed, vector
from service.stub import DIMS, EDITABLE, make_tokenizer

ONES = [1.0] * 16
AT = {"target": target(layer=1)}
TOKENIZER = make_tokenizer()
# What the stub's prompt has, and what a forward sees of six tokens that are generated behind it.
PROMPT, SEEN = 5, 5


def parsed(
    request: generation_pb2.GenerateRequest, tokenizer: Tokenizer | None = TOKENIZER, **settings: Any
) -> ParsedGeneration:
    config = ServerConfig(model="stub").model_copy(update=settings)
    return parse_generate_request(request, Loaded(EDITABLE, tokenizer), config)


def refused(request: generation_pb2.GenerateRequest, tokenizer: Tokenizer | None = TOKENIZER) -> dict[str, str]:
    """What is wrong, by field."""
    with pytest.raises(InvalidArgument) as caught:
        parsed(request, tokenizer)
    return {violation.field: violation.description for violation in caught.value.violations}


def resumed(*received: tuple[int, ...], seed: int = 7, **fields: Any) -> generation_pb2.GenerateRequest:
    samples = [{"sample_index": index, "token_ids": token_ids} for index, token_ids in enumerate(received)]
    given: dict[str, Any] = {"resume": {"received": samples, "seed": seed}, "sampling": {"samples": len(received)}}
    return generation(**given | fields)


def add(**fields: Any) -> Any:
    return edit(add=AT | {"vector": vector(ONES)}, **fields)


def test_what_is_left_out_has_its_default() -> None:
    one = parsed(generation())
    (rules,) = one.spec.sampling
    assert (rules.temperature, rules.top_k, rules.top_p, rules.repetition_penalty) == (0, 0, 1, 1)
    assert (one.spec.stop, one.spec.received) == (StopRules(6), ((),))
    assert (one.spec.prompt, one.tokens.ids) == ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5))
    assert (one.solo, one.result_bytes, one.backlog) == (False, 0, BACKLOG)


def test_every_setting_reaches_the_worker() -> None:
    sampling = {"temperature": 0.7, "top_k": 9, "top_p": 0.5, "repetition_penalty": 1.2, "seed": 11, "samples": 3}
    stop = {"texts": ["w1", "\n"], "token_ids": [4]}
    one = parsed(generation(sampling=sampling, stop=stop, top_logprobs=20, numerics="NUMERICS_SOLO"))
    for number, rules in enumerate(one.spec.sampling):
        assert (rules.temperature, rules.top_k, rules.top_p, rules.repetition_penalty) == (0.7, 9, 0.5, 1.2)
        assert (rules.seed, rules.sample) == (11, number)
    assert one.spec.stop == StopRules(6, frozenset({4}), ("w1", "\n"))
    assert (one.spec.top_logprobs, one.solo, one.seed, one.backlog) == (20, True, 11, 3 * BACKLOG)


def test_a_seed_left_out_is_chosen_anew_and_never_zero() -> None:
    seeds = {parsed(generation()).seed for _ in range(20)}
    assert len(seeds) == 20 and 0 not in seeds
    assert parsed(generation(sampling={"seed": 0})).seed == 0
    assert parsed(generation(sampling={"seed": 2**64 - 1})).spec.sampling[0].seed == 2**64 - 1


def test_the_models_end_of_sequence_stops_unless_ignored() -> None:
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.eos_token = "w7"
    assert tokenizer.end_ids == {7} and not TOKENIZER.end_ids
    assert parsed(generation(stop={"token_ids": [4]}), tokenizer).spec.stop.token_ids == {4, 7}
    assert parsed(generation(stop={"ignore_eos": True}), tokenizer).spec.stop.token_ids == frozenset()
    assert parsed(generation(), None).spec.stop.token_ids == frozenset()


NAN, INFINITE = float("nan"), float("inf")
TENSOR = tensor_pb2.Tensor(dtype="DTYPE_FLOAT32", shape=(2, 16), inline=np.ones((2, 16), "f4").tobytes())
INVALID: dict[str, tuple[dict[str, Any], str, str]] = {
    "cold": ({"sampling": {"temperature": -0.1}}, "sampling.temperature", "0 .. 100"),
    "hot": ({"sampling": {"temperature": 100.5}}, "sampling.temperature", "0 .. 100"),
    "no temperature": ({"sampling": {"temperature": NAN}}, "sampling.temperature", "not nan"),
    "top k": ({"sampling": {"top_k": 51}}, "sampling.top_k", "0 .. 50"),
    "top p zero": ({"sampling": {"top_p": 0.0}}, "sampling.top_p", "greater than 0"),
    "top p large": ({"sampling": {"top_p": 1.01}}, "sampling.top_p", "at most 1"),
    "top p nan": ({"sampling": {"top_p": NAN}}, "sampling.top_p", "not nan"),
    "penalty zero": ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty", "greater than 0"),
    "penalty infinite": ({"sampling": {"repetition_penalty": INFINITE}}, "sampling.repetition_penalty", "finite"),
    "samples": ({"sampling": {"samples": 65}}, "sampling.samples", "1 .. 64"),
    "no tokens": ({"stop": {"max_new_tokens": 0}}, "stop.max_new_tokens", "1 .. 4096"),
    "many tokens": ({"stop": {"max_new_tokens": 4097}}, "stop.max_new_tokens", "1 .. 4096"),
    "empty stop": ({"stop": {"texts": ["a", ""]}}, "stop.texts[1]", "1 .. 256 characters"),
    "long stop": ({"stop": {"texts": ["a" * 257]}}, "stop.texts[0]", "it has 257"),
    "many stops": ({"stop": {"texts": ["a"] * 17}}, "stop.texts", "at most 16"),
    "stop id": ({"stop": {"token_ids": [1, 50]}}, "stop.token_ids[1]", "0 .. 49"),
    "top logprobs": ({"top_logprobs": 21}, "top_logprobs", "0 .. 20"),
    "numerics": ({"numerics": 9}, "numerics", "DEFAULT or SOLO"),
    "no prompt": ({"prompt": None}, "prompt", "text, token_ids or chat"),
    "long prompt": ({"prompt": ids(*[1] * 33)}, "prompt.token_ids.ids", "context holds 32"),
    "no op": ({"interventions": [edit()]}, "interventions[0]", "exactly one"),
    "edit beyond": (
        {"interventions": [add(), add(positions=indices(PROMPT + SEEN))]},
        "interventions[1].positions.indices.indices[0]",
        "-5 .. 9",
    ),
    "edit before": ({"interventions": [add(positions=between(-6))]}, "interventions[0].positions.range.start", "-5 .."),
    "twice": ({"interventions": [add(positions=indices(-1, 4))]}, "interventions[0].positions.indices.indices", "4"),
    "patch from a run": (
        {"interventions": [edit(patch=AT | {"source_run": 0})]},
        "interventions[0].patch.source_run",
        "no other run to take values from, give them as a tensor instead",
    ),
    "resample": (
        {"interventions": [edit(resample=AT | {"source_runs": [1]})]},
        "interventions[0].resample.source_runs",
        "no other run to draw values from",
    ),
    "freeze": (
        {"interventions": [edit(freeze={"source_run": 0, "norms": True})]},
        "interventions[0].freeze.source_run",
        "no other run to hold these parts to",
    ),
    "patch from nowhere": ({"interventions": [edit(patch=AT)]}, "interventions[0].patch", "needed: set tensor"),
    "patch with too few": (
        {"interventions": [edit(patch=AT | {"tensor": TENSOR})]},
        "interventions[0].patch.tensor.shape",
        "[10, 16]",
    ),
    "read beyond": ({"reads": [read(), read(positions=indices(10))]}, "reads[1].positions.indices.indices[0]", "10"),
    "read of nothing": ({"reads": [read(positions=span("GENERATED"))], "stop": {"max_new_tokens": 1}},
                        "reads[0].positions", "selects no position"),
    "read nowhere": ({"reads": [read("RESID_MID")]}, "reads[0].hook_point.site", "parallel"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_field_is_named_with_what_would_be_valid(case: str) -> None:
    fields, field, text = INVALID[case]
    found = refused(generation(**fields))
    assert list(found) == [field]
    assert text in found[field]


def test_only_a_patch_may_bring_a_tensor_instead_of_another_run() -> None:
    edits = [edit(resample=AT | {"source_runs": [1]}), edit(freeze={"norms": True})]
    texts = refused(generation(interventions=edits)).values()
    assert len(texts) == 2 and not any("tensor" in text for text in texts)
    large = tensor_pb2.Tensor(dtype="DTYPE_FLOAT32", shape=(2, 16), inline=bytes(INLINE_BYTES + 1))
    (text,) = refused(generation(interventions=[edit(patch=AT | {"tensor": large})])).values()
    assert "at most" in text and "run" not in text


def test_all_violations_are_named_not_the_first() -> None:
    request = generation(
        prompt=ids(1, 77),
        sampling={"temperature": -1, "top_k": 99, "top_p": 2.0, "repetition_penalty": -1, "samples": 1000},
        stop={"max_new_tokens": 5000, "texts": [""], "token_ids": [99]},
        reads=[read(layer=9)],
        interventions=[add(), edit()],
        top_logprobs=99,
        resume={"received": [{"token_ids": [98]}]},
    )
    assert list(refused(request)) == [
        "prompt.token_ids.ids[1]",
        "sampling.temperature",
        "sampling.top_k",
        "sampling.top_p",
        "sampling.repetition_penalty",
        "sampling.samples",
        "resume.seed",
        "stop.max_new_tokens",
        "stop.texts[0]",
        "stop.token_ids[0]",
        "top_logprobs",
        "interventions[1]",
        "reads[0].hook_point.layer",
        "resume.received[0].token_ids[0]",
    ]


def test_stop_texts_need_a_tokenizer() -> None:
    assert "stop at token ids" in refused(generation(stop={"texts": ["a"]}), None)["stop.texts"]


def test_positions_reach_beyond_the_prompt() -> None:
    edits = [
        add(positions=span("GENERATED")),
        add(positions=indices(-5, 9)),
        add(positions=between(4, 10)),
        add(positions=span("ALL", exclude=(9,))),
    ]
    reads = [read(positions=indices(7)), read("ATTN_PATTERN", positions=between(3))]
    spec = parsed(generation(interventions=edits, reads=reads)).spec
    expected = [Positions(Span.GENERATED), Positions((-5, 9)), Positions(Range(4, 10)), Positions(Span.ALL, (9,))]
    assert [edit.positions for edit in spec.interventions] == expected
    assert [read.positions for read in spec.reads] == [Positions((7,)), Positions(Range(3, None))]


@pytest.mark.parametrize("positions", [span("GENERATED"), between(PROMPT)])
def test_one_token_leaves_nothing_generated_to_edit(positions: Any) -> None:
    given = [add(), add(positions=positions)]
    with pytest.raises(FailedPrecondition, match=r"interventions\[1\].*max_new_tokens=1 leaves no") as caught:
        parsed(generation(1, interventions=given))
    assert (caught.value.reason, caught.value.metadata) == ("INTERVENTION_NEVER_FIRED", {"intervention": "1"})
    assert parsed(generation(2, interventions=given)).spec.interventions
    given[1].allow_never_fired = True
    assert parsed(generation(1, interventions=given)).spec.interventions


def test_an_edit_empty_by_its_own_terms_is_left_to_the_engine() -> None:
    given = [add(positions=positions) for positions in (span("LAST", exclude=(-1,)), between(5, 5))]
    assert len(parsed(generation(1, interventions=given)).spec.interventions) == 2


def test_rows_that_a_request_brings_along_may_go_to_generated_positions() -> None:
    given = edit(patch=AT | {"tensor": TENSOR}, positions=indices(4, 9))
    op = parsed(generation(interventions=[given])).spec.interventions[0].op
    assert isinstance(op, Replace)


@pytest.mark.parametrize(
    ("arm", "fields"),
    [
        ("numerics.deterministic", {"numerics": "NUMERICS_DETERMINISTIC"}),
        ("keep", {"keep": [{}]}),
        ("profile", {"profile": "calm"}),
        ("interventions.patch.handle", {"interventions": [edit(patch=AT | {"handle": "x"})]}),
    ],
)
def test_an_arm_that_is_not_served_is_named_never_ignored(arm: str, fields: dict[str, Any]) -> None:
    with pytest.raises(NotServed) as caught:
        parsed(generation(**fields))
    assert caught.value.metadata["arm"] == arm
    assert parsed(generation(profile="none")).spec.prompt


KV_TOKEN = 2 * DIMS.n_layers * DIMS.n_kv_heads * DIMS.d_head * 4
ROW = 3 * 16 * 4


@pytest.mark.parametrize(
    ("settings", "fields", "demand"),
    [
        ({"kv_bytes": 22 * KV_TOKEN - 1}, {"sampling": {"samples": 2}}, 22 * KV_TOKEN),
        ({"kv_bytes": 32 * KV_TOKEN - 1}, {"stop": {"max_new_tokens": 4000}}, 32 * KV_TOKEN),
        ({"max_result_bytes": 10 * ROW - 1}, {"reads": [read()]}, 10 * ROW),
        ({"max_reads": 1}, {"reads": [read()] * 2}, 2),
        ({"max_interventions": 1}, {"interventions": [add()] * 2}, 2),
        ({"max_tokens": 4}, {}, 5),
    ],
)
def test_what_never_fits_is_told_with_its_demand(settings: dict[str, Any], fields: dict[str, Any], demand: int) -> None:
    with pytest.raises(TooLarge) as caught:
        parsed(generation(**fields), **settings)
    assert caught.value.metadata["demand"] == str(demand)
    roomy: dict[str, Any] = {name: limit + 1 for name, limit in settings.items()}
    assert parsed(generation(**fields), **roomy).spec.prompt


def test_reads_are_priced_for_every_token_and_what_waits_of_them_is_bounded() -> None:
    mean = read(reduction=read_pb2.Reduction(mean={}))
    # The prompt's mean comes with the first token, one of a single row with each of the others.
    assert parsed(generation(reads=[mean])).result_bytes == (1 + SEEN) * ROW
    assert parsed(generation(reads=[read()], sampling={"samples": 3})).result_bytes == 3 * (PROMPT + SEEN) * ROW
    assert parsed(generation(1000, reads=[read()])).result_bytes == (PROMPT + BACKLOG) * ROW
    onto = parsed(generation(reads=[read(reduction=project(unembed(1), unembed(2)))])).result_bytes
    assert onto == 3 * 2 * 4 * (PROMPT + SEEN)


def test_a_resumption_takes_what_was_received() -> None:
    samples = [{"sample_index": 2, "token_ids": [8, 9]}, {"sample_index": 0, "token_ids": [7]}]
    one = parsed(generation(resume={"received": samples, "seed": 5}, sampling={"samples": 3}))
    assert one.spec.received == ((7,), (), (8, 9))
    assert (one.seed, {rules.seed for rules in one.spec.sampling}) == (5, {5})
    assert parsed(resumed((1,), seed=0, sampling={"seed": 0})).seed == 0


def test_samples_that_had_ended_are_not_generated_again() -> None:
    one = parsed(resumed((1, 2), (3, 9), (1, 2, 3, 4, 5, 6), stop={"token_ids": [9]}))
    assert [sample.finish for sample in one.resumed] == [None, Finish.STOP, Finish.LENGTH]
    assert (one.numbers, one.spec.received) == ((0,), ((1, 2),))
    second = parsed(resumed((3, 9), (1, 2), stop={"token_ids": [9]}))
    assert [rules.sample for rules in second.spec.sampling] == [1]


RESUMED: dict[str, tuple[generation_pb2.GenerateRequest, str, str]] = {
    "no seed": (resumed((1,), seed=0), "resume.seed", "is needed"),
    "another seed": (resumed((1,), sampling={"seed": 8}), "resume.seed", "8"),
    "a stranger": (resumed((1, 50)), "resume.received[0].token_ids[1]", "0 .. 49"),
    "too many": (resumed((1,) * 7, ()), "resume.received[0].token_ids[6]", "length"),
    "past a stop id": (resumed((1, 9, 2), (), stop={"token_ids": [9]}), "resume.received[0].token_ids[2]", "stop"),
    "past a stop text": (resumed((1, 9, 2), (), stop={"texts": ["w9"]}), "resume.received[0].token_ids[2]", "stop"),
    "no sample": (resumed((1,), (1,), sampling={"samples": 1}), "resume.received[1].sample_index", "0 .. 0"),
    "all ended": (resumed((1,) * 6), "resume.received", "nothing to go on with"),
    "twice": (
        generation(resume={"seed": 7, "received": [{"token_ids": [1]}, {"token_ids": [2]}]}),
        "resume.received[1].sample_index",
        "more than once",
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_an_invalid_resumption_is_named(case: str) -> None:
    request, field, text = RESUMED[case]
    found = refused(request)
    assert list(found) == [field]
    assert text in found[field]


def test_hostile_numbers_are_refused_not_run() -> None:
    huge = generation(sampling={"samples": 2**32 - 1}, stop={"max_new_tokens": 2**32 - 1}, top_logprobs=2**32 - 1)
    assert list(refused(huge)) == ["sampling.samples", "stop.max_new_tokens", "top_logprobs"]
    with pytest.raises(Error):
        parsed(generation(prompt=ids(2**32 - 1), resume={"received": [{"sample_index": 2**32 - 1}]}))
