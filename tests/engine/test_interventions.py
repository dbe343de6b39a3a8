"""Edited runs through the worker: alone, batched with strangers, waiting for each other's values, and failing alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.jobs import PATIENCE, Mailbox, job
from engine.models import hooks_on, resident
from engine.test_worker import Reports
from families import family_named
from patchclamp_server.engine import editing
from patchclamp_server.engine.exchange import Exchange
from patchclamp_server.engine.loading import Resident
from patchclamp_server.engine.messages import LogitsSpec, ReadSpec, RunOutput, RunSpec
from patchclamp_server.engine.scheduler import BatchLimits
from patchclamp_server.engine.worker import Worker
from patchclamp_server.errors import FailedPrecondition, TooLarge
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.ops import (
    Ablate,
    Add,
    Comparison,
    Condition,
    Freeze,
    FromRun,
    Intervention,
    Replace,
    Target,
    UnembedRow,
    Zero,
)
from patchclamp_server.interventions.sources import required_sources
from patchclamp_server.positions import Positions, Span

LOGITS = LogitsSpec(Positions())
PROMPT, OTHER, LONGER = (5, 17, 3, 40, 11), (9, 33, 21, 4, 48), (50, 1, 44, 44, 7, 19)
# Float32 through a few dozen sums in another order, values below 30.
ROUNDING = 2e-5


def model(name: str = "llama") -> Resident:
    return resident(family_named(name))


def run(
    ids: tuple[int, ...], *edits: Intervention, baseline: bool = False, reads: tuple[ReadSpec, ...] = ()
) -> RunSpec:
    sources = required_sources(edits, model().facts.site_info)
    return RunSpec(ids, reads, LOGITS, interventions=edits, sources=sources, baseline=baseline)


def add(layer: int, strength: float, seed: int = 0) -> Intervention:
    vector = torch.randn(model().facts.dims.d_model, generator=torch.Generator().manual_seed(seed))
    return Intervention(Add(Target((HookPoint(Site.RESID_POST, layer),)), vector, strength))


def patch(source: int, site: Site = Site.RESID_PRE, layer: int = 1) -> Intervention:
    return Intervention(Replace(Target((HookPoint(site, layer),)), FromRun(source)))


@pytest.fixture
def worker() -> Iterator[Worker]:
    one, reports = Worker(lambda progress: model(), BatchLimits(max_tokens=1024, max_rows=16)), Reports()
    one.start(reports)
    reports.settled()
    yield one
    one.stop(PATIENCE)
    assert hooks_on(model().runner) == 0


def submit(worker: Worker, *runs: RunSpec) -> Mailbox:
    mailbox = Mailbox()
    worker.submit(job(runs=runs), mailbox)
    return mailbox


def outputs(worker: Worker, *runs: RunSpec) -> list[RunOutput]:
    mailbox = submit(worker, *runs)
    assert not mailbox.failed, mailbox.failed
    return [mailbox.finished[index].output for index in range(len(runs))]


def logits(output: RunOutput) -> torch.Tensor:
    assert output.logits is not None
    assert output.logits.values is not None
    return output.logits.values


def test_an_edit_changes_its_own_run_and_no_neighbour(worker: Worker) -> None:
    plain, edited, neighbour = outputs(worker, run(PROMPT), run(PROMPT, add(0, 3.0)), run(OTHER))
    alone = outputs(worker, run(PROMPT, add(0, 3.0)))[0]
    stranger = outputs(worker, run(OTHER))[0]
    assert not torch.allclose(logits(plain), logits(edited), atol=0.1)
    torch.testing.assert_close(logits(edited), logits(alone), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(logits(neighbour), logits(stranger), rtol=0, atol=ROUNDING)
    (receipt,) = edited.receipts
    assert (receipt.rows_selected, receipt.rows_fired, receipt.rows_changed) == (5, 5, 5)
    assert plain.receipts == ()


def test_a_baseline_is_the_run_without_its_edits(worker: Worker) -> None:
    plain, edited = outputs(worker, run(PROMPT), run(PROMPT, add(0, 3.0), baseline=True))
    assert edited.baseline is not None
    assert edited.baseline.values is not None
    torch.testing.assert_close(edited.baseline.values, logits(plain), rtol=0, atol=ROUNDING)
    assert not torch.allclose(edited.baseline.values, logits(edited), atol=0.1)


def test_reads_see_the_edited_run(worker: Worker) -> None:
    read = ReadSpec(Site.RESID_POST, (0,))
    plain, edited = outputs(worker, run(PROMPT, reads=(read,)), run(PROMPT, add(0, 3.0), reads=(read,)))
    vector = torch.randn(model().facts.dims.d_model, generator=torch.Generator().manual_seed(0))
    difference = edited.reads[0].values - plain.reads[0].values
    torch.testing.assert_close(difference, (3.0 * vector).expand_as(difference), rtol=0, atol=ROUNDING)


def test_edits_run_also_where_nothing_is_read_behind_them(worker: Worker) -> None:
    early = RunSpec(PROMPT, (ReadSpec(Site.RESID_PRE, (0,)),), interventions=(add(1, 1.0),))
    assert outputs(worker, early)[0].receipts[0].rows_changed == 5


def test_a_run_patched_with_itself_is_unchanged(worker: Worker) -> None:
    plain, patched = outputs(worker, run(PROMPT), run(PROMPT, patch(0), patch(0, Site.ATTN_Z), patch(0, Site.MLP_OUT)))
    torch.testing.assert_close(logits(patched), logits(plain), rtol=0, atol=ROUNDING)
    assert [receipt.rows_selected for receipt in patched.receipts] == [5, 5, 5]


def test_a_patch_of_the_whole_stream_reproduces_the_other_run(worker: Worker) -> None:
    # The target comes first in the request: it has to wait for its source.
    patched, source = outputs(worker, run(PROMPT, patch(1, layer=0)), run(OTHER))
    torch.testing.assert_close(logits(patched), logits(source), rtol=0, atol=ROUNDING)


def test_sources_may_be_edited_and_form_chains(worker: Worker) -> None:
    steered, patched, last = outputs(
        worker, run(OTHER, add(0, 2.0)), run(PROMPT, patch(0, layer=1)), run(LONGER[:5], patch(1, layer=1))
    )
    torch.testing.assert_close(logits(patched), logits(steered), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(logits(last), logits(steered), rtol=0, atol=ROUNDING)


def test_a_source_of_another_length_gives_the_rows_that_are_asked_for(worker: Worker) -> None:
    op = Replace(Target((HookPoint(Site.RESID_PRE, 1),)), FromRun(1), source_positions=Positions((-1,)))
    read = ReadSpec(Site.RESID_PRE, (1,))
    patched, source = outputs(
        worker,
        run(PROMPT, Intervention(op, Positions((2,))), reads=(read,)),
        run(LONGER, reads=(read,)),
    )
    assert torch.equal(patched.reads[0].values[2], source.reads[0].values[-1])


def test_frozen_to_itself_a_run_is_unchanged_and_frozen_to_another_keeps_its_patterns(worker: Worker) -> None:
    everything = Intervention(Freeze(FromRun(0), attention=True, norms=True, mlps=True))
    pattern = ReadSpec(Site.ATTN_PATTERN, (0, 1))
    attention = Intervention(Freeze(FromRun(0), attention=True))
    plain, frozen, other = outputs(
        worker, run(PROMPT, reads=(pattern,)), run(PROMPT, everything), run(OTHER, attention, reads=(pattern,))
    )
    torch.testing.assert_close(logits(frozen), logits(plain), rtol=0, atol=ROUNDING)
    for own, given in zip(other.reads, plain.reads, strict=True):
        assert torch.equal(own.values, given.values)


def test_an_unembedding_row_is_found_by_the_engine(worker: Worker) -> None:
    (top,) = (int(logits(output)[-1].argmax()) for output in outputs(worker, run(PROMPT)))
    target = Target((HookPoint(Site.LN_FINAL, None),))
    plain, steered = outputs(worker, run(PROMPT), run(PROMPT, Intervention(Add(target, UnembedRow(3), 5.0))))
    assert logits(steered)[-1, 3] > logits(plain)[-1, 3]
    ablated = outputs(worker, run(PROMPT, Intervention(Ablate(target, UnembedRow(top)))))[0]
    # Nothing is left along the direction that the token is read with.
    assert logits(ablated)[-1, top].abs() < ROUNDING * 10


def test_an_edit_that_selects_nothing_fails_its_run_alone(worker: Worker) -> None:
    generated = Intervention(Zero(Target((HookPoint(Site.MLP_OUT, 0),))), Positions(Span.GENERATED))
    mailbox = submit(worker, run(PROMPT, generated), run(OTHER, add(0, 1.0)))
    assert mailbox.finished.keys() == {1}
    error = mailbox.failed[0].error
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "INTERVENTION_NEVER_FIRED"
    allowed = Intervention(generated.op, generated.positions, allow_never_fired=True)
    (output,) = outputs(worker, run(PROMPT, allowed))
    assert output.receipts[0].rows_selected == 0


def test_a_condition_that_is_never_met_is_reported_and_fails_nothing(worker: Worker) -> None:
    direction = torch.ones(model().facts.dims.d_model)
    when = Condition(HookPoint(Site.RESID_PRE, 0), direction, Comparison.GREATER, 1e6)
    edit = Intervention(add(0, 3.0).op, when=when)
    plain, edited = outputs(worker, run(PROMPT), run(PROMPT, edit))
    assert (edited.receipts[0].rows_selected, edited.receipts[0].rows_fired) == (5, 0)
    torch.testing.assert_close(logits(edited), logits(plain), rtol=0, atol=ROUNDING)


def test_a_failed_source_fails_the_runs_that_wait_for_it(worker: Worker) -> None:
    generated = Intervention(Zero(Target((HookPoint(Site.MLP_OUT, 0),))), Positions(Span.GENERATED))
    mailbox = submit(worker, run(PROMPT, generated), run(OTHER, patch(0)), run(OTHER, patch(1)), run(OTHER))
    assert mailbox.finished.keys() == {3}
    assert {index: event.error.reason for index, event in mailbox.failed.items()} == {
        0: "INTERVENTION_NEVER_FIRED",
        1: "SOURCE_RUN_FAILED",
        2: "SOURCE_RUN_FAILED",
    }
    assert mailbox.failed[2].error.metadata == {"source_run": "0"}


def test_values_are_let_go_when_the_last_taker_is_done() -> None:
    runs = (run(PROMPT), run(OTHER, patch(0)), run(OTHER, patch(0)), run(OTHER, patch(1)))
    exchange = Exchange.of(runs)
    point = HookPoint(Site.RESID_PRE, 1)
    assert [set(exchange.wanted(index)) for index in range(3)] == [{point}, {point}, set()]
    exchange.put(0, point, torch.ones(1))
    assert exchange.finish(0) == (1, 2)
    assert exchange.finish(2) == ()
    assert exchange.values
    assert exchange.finish(1) == (3,)
    assert not exchange.values
    assert exchange.fail(0) == ()


def test_a_run_that_an_edit_makes_overflow_fails_alone(worker: Worker) -> None:
    zeroed = Intervention(Zero(Target((HookPoint(Site.LN1_SCALE, 1),))))
    mailbox = submit(worker, run(PROMPT, zeroed), run(OTHER, add(0, 1.0)))
    assert mailbox.finished.keys() == {1}
    assert mailbox.failed[0].error.reason == "NOT_FINITE"
    # What it read is for the caller to look at, when no logits are asked for.
    reads = RunSpec(PROMPT, (ReadSpec(Site.RESID_POST, (1,)),), interventions=(zeroed,))
    assert outputs(worker, reads)[0].reads[0].values.isnan().any()


def test_edits_that_would_fill_the_tables_are_refused_alone(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "_MOST_GATES", 9)
    mailbox = submit(worker, run(PROMPT, add(0, 1.0), add(1, 1.0)), run(OTHER, add(0, 1.0)))
    assert mailbox.finished.keys() == {1}
    error = mailbox.failed[0].error
    assert isinstance(error, TooLarge)
    assert error.metadata == {"limit": "9", "demand": "10"}
