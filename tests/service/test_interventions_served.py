"""Interventions through a running server on a tiny model: what callers see of them, and what others do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

from engine.models import resident
from families import family_named
from patchclamp.v1 import failure_pb2, intervention_pb2, logits_pb2, read_pb2, run_pb2, tensor_pb2
from patchclamp_server.engine.worker import Worker
from service.build import edit, ids, indices, read, span, target, vector
from service.calls import Caller, serving

Edit = intervention_pb2.Intervention
Values = npt.NDArray[np.float32]

PROMPT, OTHER, SHORT = (5, 17, 3, 40, 11), (9, 33, 21, 4, 48), (8, 2, 30)
D_MODEL = 32
ALONG = np.linspace(-1, 2, D_MODEL, dtype="f4")
UNIT = ALONG / np.linalg.norm(ALONG)
LOGITS = logits_pb2.LogitsRequest(values=True, positions=span("ALL"))
# Float32 on the CPU, values of some tens: alone and in a batch they are summed up in another order.
ROUNDING = 2e-5
LAST_LAYER = 1
STREAM = {"target": target(layer=LAST_LAYER)}


@pytest.fixture
async def caller() -> AsyncIterator[Caller]:
    """A caller of the engine itself."""
    async with serving(Worker(lambda _: resident(family_named("llama")))) as found:
        yield found


def run_of(
    prompt: tuple[int, ...], *edits: Edit, reads: tuple[read_pb2.Read, ...] = (), **fields: Any
) -> run_pb2.RunSpec:
    return run_pb2.RunSpec(prompt=ids(*prompt), interventions=edits, reads=reads, logits=LOGITS, **fields)


async def results(caller: Caller, *runs: run_pb2.RunSpec) -> list[run_pb2.RunResult]:
    """What each run gave, in the order of the request."""
    responses = await caller.run(run_pb2.RunRequest(runs=runs))
    found = [response.result for response in responses if response.HasField("result")]
    return sorted(found, key=lambda result: result.run_index)


def array(wire: tensor_pb2.Tensor) -> Values:
    return np.frombuffer(wire.inline, "<f4").reshape(*wire.shape)


def logits(result: run_pb2.RunResult) -> Values:
    assert not result.HasField("failure"), result.failure
    return array(result.logits.values)


def values(result: run_pb2.RunResult, index: int = 0) -> Values:
    return array(result.reads[index].values)


def close(actual: Values, expected: Values | float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING)


def add(strength: float = 1.0, **fields: Any) -> Edit:
    return edit(add=STREAM | {"vector": vector(ALONG), "strength": strength}, **fields)


async def test_an_addition_is_seen_by_reads_and_told_in_its_receipt(caller: Caller) -> None:
    watch = (read(layer=LAST_LAYER),)
    plain, edited = await results(
        caller, run_of(PROMPT, reads=watch), run_of(PROMPT, add(3.0, positions=indices(1, -1)), reads=watch)
    )
    expected = values(plain).copy()
    expected[[1, 4]] += 3 * ALONG
    close(values(edited), expected)
    (receipt,) = edited.receipts
    assert (receipt.rows_selected, receipt.rows_fired, receipt.rows_changed) == (2, 2, 2)
    norms = np.linalg.norm(values(plain)[[1, 4]], axis=-1)
    assert receipt.mean_delta == pytest.approx(np.mean(3 * np.linalg.norm(ALONG) / norms), rel=1e-4)
    assert not plain.receipts
    assert np.abs(logits(edited) - logits(plain))[[1, 4]].max() > 0.1


async def test_an_ablated_direction_is_gone(caller: Caller) -> None:
    ablate = {"directions": vector(ALONG)}
    watch = (read(layer=LAST_LAYER),)
    plain, here, everywhere = await results(
        caller,
        run_of(PROMPT, reads=watch),
        run_of(PROMPT, edit(ablate=STREAM | ablate), reads=watch),
        run_of(PROMPT, edit(ablate_everywhere=ablate), reads=(read(),)),
    )
    coordinate = values(plain) @ UNIT
    close(values(here), values(plain) - coordinate[:, None] * UNIT)
    for layer in range(LAST_LAYER + 1):
        close(values(everywhere, layer) @ UNIT, 0)


async def test_a_run_patched_from_another_at_its_end_answers_as_that_one(caller: Caller) -> None:
    patched, shifted, source = await results(
        caller,
        run_of(PROMPT, edit(patch=STREAM | {"source_run": 2})),
        run_of(SHORT, edit(patch=STREAM | {"source_run": 2, "source_positions": indices(4, 0, 2)})),
        run_of(OTHER),
    )
    close(logits(patched), logits(source))
    close(logits(shifted), logits(source)[[4, 0, 2]])
    assert [result.receipts[0].rows_selected for result in (patched, shifted)] == [5, 3]


async def test_a_resample_answers_as_one_of_its_sources(caller: Caller) -> None:
    given = edit(resample=STREAM | {"source_runs": [1, 2], "seed": 4})
    drawn, *sources = await results(caller, run_of(PROMPT, given), run_of(OTHER), run_of(OTHER[::-1]))
    distances = [float(np.abs(logits(drawn) - logits(source)).max()) for source in sources]
    assert min(distances) < ROUNDING < 0.1 < max(distances)


async def test_rows_that_a_request_brings_along_are_put_in_place(caller: Caller) -> None:
    rows = np.stack([ALONG, -ALONG])
    wire = tensor_pb2.Tensor(dtype="DTYPE_FLOAT32", shape=rows.shape, inline=rows.tobytes())
    given = edit(patch=STREAM | {"tensor": wire}, positions=indices(3, 0))
    (result,) = await results(caller, run_of(PROMPT, given, reads=(read(layer=LAST_LAYER),)))
    close(values(result)[[3, 0]], rows)


async def test_a_run_frozen_to_another_keeps_what_that_one_had(caller: Caller) -> None:
    held = edit(freeze={"source_run": 1, "attention": True, "norms": True, "mlps": True})
    watch = (read("MLP_OUT"), read("ATTN_PATTERN"), read("LN1_SCALE"))
    frozen, source, plain = await results(
        caller, run_of(PROMPT, held, reads=watch), run_of(OTHER, reads=watch), run_of(PROMPT, reads=watch)
    )
    for index in range(len(source.reads)):
        close(values(frozen, index), values(source, index))
    assert np.abs(logits(frozen) - logits(source)).max() > 0.1
    assert np.abs(logits(frozen) - logits(plain)).max() > 0.1


async def test_an_edge_knocked_out_has_no_weight(caller: Caller) -> None:
    given = edit(knockout={"layer": 1, "heads": [2], "edges": [{"query": 4, "key": 1}]})
    watch = (read("ATTN_PATTERN", layer=1),)
    cut, plain = await results(caller, run_of(PROMPT, given, reads=watch), run_of(PROMPT, reads=watch))
    before, after = values(plain), values(cut)
    assert before[2, 4, 1] > 0.01
    assert after[2, 4, 1] == 0
    close(after[2, 4, [0, 2, 3, 4]], before[2, 4, [0, 2, 3, 4]] / (1 - before[2, 4, 1]))
    close(after[[0, 1, 3]], before[[0, 1, 3]])


async def test_a_condition_chooses_the_tokens(caller: Caller) -> None:
    (plain,) = await results(caller, run_of(PROMPT, reads=(read(layer=0), read(layer=LAST_LAYER))))
    coordinate = values(plain) @ UNIT
    threshold = float(np.sort(coordinate)[1:3].mean())
    when = {"hook_point": target(layer=0).hook_point, "direction": vector(ALONG), "threshold": threshold}
    given = edit(zero=STREAM, when=when | {"comparison": "COMPARISON_GREATER"})
    (result,) = await results(caller, run_of(PROMPT, given, reads=(read(layer=LAST_LAYER),)))
    expected = np.where((coordinate > threshold)[:, None], 0, values(plain, 1))
    close(values(result), expected)
    (receipt,) = result.receipts
    assert (receipt.rows_selected, receipt.rows_fired, receipt.rows_changed) == (5, 3, 3)


async def test_edits_come_one_after_another(caller: Caller) -> None:
    placed = edit(set_coordinate=STREAM | {"direction": vector(ALONG), "value": 3.0})
    halved = edit(scale=STREAM | {"direction": vector(ALONG), "factor": 0.5})
    watch = (read(layer=LAST_LAYER),)
    one, other = await results(
        caller, run_of(PROMPT, placed, halved, reads=watch), run_of(PROMPT, halved, placed, reads=watch)
    )
    close(values(one) @ UNIT, 1.5)
    close(values(other) @ UNIT, 3.0)


async def test_an_edit_that_never_fires_fails_its_run_alone_unless_it_may(caller: Caller) -> None:
    nothing = span("GENERATED")
    failed, neighbour, allowed = await results(
        caller,
        run_of(PROMPT, add(), add(positions=nothing)),
        run_of(PROMPT, add()),
        run_of(PROMPT, add(positions=nothing, allow_never_fired=True)),
    )
    assert failed.failure.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert failed.failure.reason == failure_pb2.RunFailure(reason="ERROR_REASON_INTERVENTION_NEVER_FIRED").reason
    assert "interventions[1]" in failed.failure.message
    assert neighbour.receipts[0].rows_changed == 5
    assert (allowed.receipts[0].rows_selected, allowed.receipts[0].no_effect) == (0, False)
    assert logits(allowed).shape == (5, 56)


async def test_the_baseline_is_the_run_without_its_edits(caller: Caller) -> None:
    edited, plain = await results(caller, run_of(PROMPT, add(5.0), baseline=True), run_of(PROMPT))
    close(array(edited.baseline_logits.values), logits(plain))
    assert np.abs(logits(edited) - logits(plain)).max() > 0.1
    assert not plain.HasField("baseline_logits")


async def test_edits_of_one_caller_never_reach_anothers_run(caller: Caller) -> None:
    (alone,) = await results(caller, run_of(PROMPT))
    plain, edited = [run_of(PROMPT)] * 4, [run_of(PROMPT, add(10.0)), run_of(OTHER, edit(zero=STREAM))]
    calls = [results(caller, *runs) for _ in range(8) for runs in (plain, edited)]
    answers = await asyncio.gather(*calls)
    for answer in answers[::2]:
        for result in answer:
            close(logits(result), logits(alone))
            assert not result.receipts
    for answer in answers[1::2]:
        assert np.abs(logits(answer[0]) - logits(alone)).max() > 0.1


async def test_a_source_that_fails_fails_those_that_take_from_it(caller: Caller) -> None:
    broken = run_of(OTHER, add(positions=span("GENERATED")))
    taker, source, takers_taker, neighbour = await results(
        caller,
        run_of(PROMPT, edit(patch=STREAM | {"source_run": 1})),
        broken,
        run_of(PROMPT, edit(patch=STREAM | {"source_run": 0})),
        run_of(PROMPT),
    )
    assert "interventions[0]" in source.failure.message
    for result in (taker, takers_taker):
        assert result.failure.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        assert result.failure.reason == failure_pb2.RunFailure(reason="ERROR_REASON_SOURCE_RUN_FAILED").reason
        assert result.failure.metadata["source_run"] == "1"
        assert "runs[1], which failed" in result.failure.message
    assert logits(neighbour).shape == (5, 56)


async def test_a_source_is_taken_as_its_own_edits_leave_it(caller: Caller) -> None:
    patched, source = await results(
        caller, run_of(PROMPT, edit(patch=STREAM | {"source_run": 1})), run_of(OTHER, add(4.0))
    )
    close(logits(patched), logits(source))
