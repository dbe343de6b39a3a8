"""Receipts say what was done: the counts of the naive definitions are held elsewhere, for all operations; here is what
is counted, and what is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from interventions.running import CPU, PROMPTS, edits_of, model, planned, run_plan
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.compiling import compile_row
from patchclamp_server.interventions.ops import (
    Ablate,
    AblateEverywhere,
    Add,
    Clamp,
    Comparison,
    Condition,
    Intervention,
    Knockout,
    Op,
    RowEdits,
    Target,
    Zero,
)
from patchclamp_server.interventions.plan import Plan, compile_batch
from patchclamp_server.interventions.receipts import Receipt
from patchclamp_server.positions import Positions, Range, Span

POINT = HookPoint(Site.RESID_PRE, 0)
STREAM = Target((POINT,))
E0 = torch.eye(32)[0]


def after(value: torch.Tensor, *edits: Op | Intervention, dtype: torch.dtype = torch.float64) -> tuple[Receipt, ...]:
    """The receipts of one run whose stream has this value [pos, 32]."""
    row = edits_of(range(len(value)), *edits)
    plan = compile_batch([row], model().facts.site_info, device=CPU, dtype=dtype)
    plan.step(torch.arange(len(value))[None])
    plan.edits()[POINT](value[None])
    return plan.receipts(0)


def rows(*lengths: float) -> torch.Tensor:
    """Rows that point along the first two axes, as long as said."""
    return torch.tensor(lengths, dtype=torch.float64)[:, None] * torch.eye(32, dtype=torch.float64)[:2].sum(0) / 2**0.5


def test_a_change_is_measured_against_the_row_as_the_model_computed_it() -> None:
    first, second = after(rows(1.0, 2.0), Add(STREAM, E0, 3.0), Add(STREAM, E0, -6.0))
    assert math.isclose(first.mean_delta, (3 + 1.5) / 2) and math.isclose(first.max_delta, 3)
    assert math.isclose(second.mean_delta, (6 + 3) / 2) and math.isclose(second.max_delta, 6)
    assert (first.rows_selected, first.rows_fired, first.rows_changed, first.clipped) == (2, 2, 2, 0)


def test_a_row_that_was_zero_changes_by_one() -> None:
    (receipt,) = after(rows(0.0, 0.0), Add(STREAM, E0, 7.0))
    assert receipt.mean_delta == receipt.max_delta == 1.0


def test_ablating_a_subspace_is_one_edit_of_each_row() -> None:
    (receipt,) = after(rows(3.0), Ablate(STREAM, torch.eye(32)[:4]))
    assert (receipt.rows_fired, receipt.rows_changed) == (1, 1) and math.isclose(receipt.max_delta, 1.0)


def test_an_edit_that_finds_nothing_to_change_has_no_effect() -> None:
    (receipt,) = after(rows(1.0, 2.0), Ablate(STREAM, torch.eye(32)[5]))
    assert receipt.no_effect and receipt.rows_fired == 2 and receipt.max_delta == 0
    kept, bound = after(rows(1.0, 2.0), Clamp(STREAM, E0, -5.0, 5.0), Clamp(STREAM, E0, high=1.0))
    assert kept.no_effect and kept.clipped == 0
    assert not bound.no_effect and bound.clipped == bound.rows_changed == 1


def test_an_edit_below_the_rounding_of_the_model_has_no_effect() -> None:
    """In bfloat16 a thousandth of a row's own length is nothing: the value leaves the site as it came."""
    value = rows(8.0).bfloat16()
    (small,) = after(value, Add(STREAM, E0, 1e-3), dtype=torch.bfloat16)
    (large,) = after(value, Add(STREAM, E0, 1e-1), dtype=torch.bfloat16)
    assert small.no_effect and small.max_delta > 0
    assert not large.no_effect


def test_a_condition_that_is_never_met_is_no_failure() -> None:
    when = Condition(POINT, E0, Comparison.GREATER, 100.0)
    row = edits_of(PROMPTS[0], Intervention(Zero(STREAM), when=when))
    plan = planned(model(), [row])
    run_plan(model(), plan, PROMPTS[:1])
    (receipt,) = plan.receipts(0)
    assert (receipt.rows_selected, receipt.rows_fired, receipt.no_effect) == (7, 0, False)
    assert compile_row(row, model().facts.site_info).never_fired == ()


def test_what_selects_nothing_by_its_own_terms_is_known_before_the_run() -> None:
    nothing = Positions(Range(3, 3))
    edits = edits_of(
        PROMPTS[0],
        Intervention(Zero(STREAM), nothing),
        Intervention(Zero(Target((HookPoint(Site.RESID_PRE, 1),))), nothing, allow_never_fired=True),
        Intervention(Add(STREAM, E0), Positions(Span.GENERATED)),
        Intervention(Knockout(0, ((5, 2),)), Positions((4,))),
        Intervention(Add(STREAM, E0)),
    )
    assert compile_row(edits, model().facts.site_info).never_fired == (0, 2, 3)


def test_an_edit_of_tokens_that_were_not_generated_is_reported() -> None:
    """The run might have generated five tokens, and stopped at once: one position was selected, none was seen."""
    row = RowEdits((Intervention(Zero(STREAM), Positions(Span.GENERATED)),), 7, 11)
    plan = planned(model(), [row])
    assert compile_row(row, model().facts.site_info).never_fired == ()
    run_plan(model(), plan, PROMPTS[:1])
    assert plan.receipts(0, length=7) == (Receipt(0, 0, 0, 0, 0.0, 0.0, 0),)
    assert plan.receipts(0)[0].rows_selected == 4


def test_rows_are_counted_at_every_place_and_never_at_padding() -> None:
    resident = model("gpt2")
    everywhere = AblateEverywhere(torch.eye(32)[:2])
    plan = planned(resident, [edits_of(PROMPTS[0]), edits_of(PROMPTS[1], everywhere)])
    run_plan(resident, plan, PROMPTS[:2])
    places = 2 + 2 * resident.facts.dims.n_layers  # two embeddings, and two writes in each layer
    (receipt,) = plan.receipts(1)
    assert (receipt.rows_selected, receipt.rows_fired, receipt.rows_changed) == (5 * places,) * 3
    assert plan.receipts(0) == ()


def test_no_step_waits_for_the_device() -> None:
    """Nothing in a forward, nor in adding it up, asks for a number on the host."""
    row = edits_of(PROMPTS[0], Add(STREAM, E0), Ablate(STREAM, torch.eye(32)[:2]), Zero(STREAM))
    plan = Plan(model().facts.site_info, rows=1, max_length=7, device=CPU, dtype=torch.float32)
    plan.place(0, compile_row(row, plan.sites))
    waits = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Watch():
        for _ in range(2):
            plan.step(torch.arange(7)[None])
            plan.edits()[POINT](torch.zeros(1, 7, 32))
        plan.settle()
    assert "baddbmm" in seen and not set(waits) & set(seen)
    plan.receipts(0)
