"""One plan serves a whole forward, chunks of it and single tokens, whichever rows take part and wherever they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from interventions.running import CPU, model
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.compiling import compile_row
from patchclamp_server.interventions.ops import (
    Ablate,
    Add,
    Captured,
    Clamp,
    Comparison,
    Condition,
    Intervention,
    Knockout,
    Mean,
    Replace,
    RowEdits,
    Scale,
    Target,
    Unit,
    Zero,
)
from patchclamp_server.interventions.plan import Plan, compile_batch
from patchclamp_server.interventions.receipts import Receipt
from patchclamp_server.positions import LAST, Positions, Range, Span

LENGTH = 9
STREAM, READ = HookPoint(Site.RESID_PRE, 1), HookPoint(Site.MLP_OUT, 0)
HEADS, PATTERN, SCORES = (HookPoint(site, 0) for site in (Site.ATTN_Z, Site.ATTN_PATTERN, Site.ATTN_SCORES))
POINTS = (READ, SCORES, PATTERN, HEADS, STREAM)  # in the order of a forward


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(point: HookPoint, *heads: int) -> Target:
    return Target((point,), heads)


def run(prompt: int, *interventions: Intervention) -> RowEdits:
    return RowEdits(interventions, prompt, LENGTH)


def rows() -> list[RowEdits]:
    """Edits of every kind, with prompts of six, four and five tokens."""
    when = Condition(READ, noise(0, 32), Comparison.GREATER, 0.0)
    source = Captured({PATTERN: noise(1, 4, 7, 7).softmax(-1), HEADS: noise(2, 6, 4, 8)})
    return [
        run(
            6,
            Intervention(Add(on(STREAM), noise(3, 32), 0.5, Unit.NORM_FRACTION, 3.0, True), Positions(Span.PROMPT)),
            Intervention(Clamp(on(STREAM), noise(4, 32), 0.1, 0.2), Positions(Span.GENERATED), when),
            Intervention(Replace(on(PATTERN), source)),
            Intervention(Knockout(0, ((5, 1), (7, 2), (7, 6), (-1, 0)), (1, 3))),
        ),
        run(
            4,
            Intervention(Zero(on(STREAM)), LAST),
            Intervention(Ablate(on(STREAM), noise(5, 2, 32)), Positions(exclude=(0, -1))),
            Intervention(Scale(on(HEADS, 2), noise(6, 8), 3.0), when=when),
            Intervention(Zero(on(SCORES, 0)), Positions((2, 8))),
        ),
        run(
            5,
            Intervention(Replace(on(HEADS, 1, 0), source), Positions(Range(2))),
            Intervention(Mean(on(STREAM), noise(7, 32)), Positions((0, 7, 3))),
        ),
    ]  # fmt: skip


def values() -> dict[HookPoint, torch.Tensor]:
    """What a forward over all positions has at the sites."""
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    scores = noise(10, 3, 4, LENGTH, LENGTH).double().masked_fill(~causal, float("-inf"))
    return {
        READ: noise(11, 3, LENGTH, 32).double(),
        SCORES: scores,
        PATTERN: scores.softmax(-1),
        HEADS: noise(12, 3, LENGTH, 4, 8).double(),
        STREAM: noise(13, 3, LENGTH, 32).double(),
    }


def part(point: HookPoint, value: torch.Tensor, row: int, places: list[int], keys: int) -> torch.Tensor:
    """One row's value at some positions (-1: some padding), as a forward over just these has it."""
    index = [place % LENGTH for place in places]
    return value[row][:, index, :keys] if point.site.position_axis else value[row][index]


def apply(plan: Plan, given: dict[HookPoint, torch.Tensor]) -> dict[HookPoint, torch.Tensor]:
    edits, observed = plan.edits(), plan.condition_reads()
    found = {}
    for point in POINTS:
        if point in observed:
            plan.observe(point, given[point])
        found[point] = edits[point](given[point]) if point in edits else given[point]
    return found


def stepwise(plan: Plan, schedule: list[dict[int, list[int]]]) -> dict[HookPoint, torch.Tensor]:
    """The values after forwards over some positions of some rows, put together."""
    full = values()
    result = {point: value.clone() for point, value in full.items()}
    for step in schedule:
        longest = max(map(len, step.values()))
        padded = {row: places + [-1] * (longest - len(places)) for row, places in step.items()}
        keys = max(max(places) for places in step.values()) + 1
        whole = list(step) == [0, 1, 2]
        plan.step(torch.tensor(list(padded.values())), None if whole else torch.tensor(list(step)))
        given = {
            point: torch.stack([part(point, value, row, places, keys) for row, places in padded.items()])
            for point, value in full.items()
        }
        for point, new in apply(plan, given).items():
            for index, (row, places) in enumerate(step.items()):
                if point.site.position_axis:
                    result[point][row][:, places, :keys] = new[index][:, : len(places)]
                else:
                    result[point][row][places] = new[index][: len(places)]
    return result


def fresh() -> Plan:
    return compile_batch(rows(), model().facts.site_info, device=CPU, dtype=torch.float64)


ALL = list(range(LENGTH))
SCHEDULES: dict[str, list[dict[int, list[int]]]] = {
    "chunks": [dict.fromkeys(range(3), ALL[start : start + 4]) for start in (0, 4, 8)],
    "prompts, then tokens": [
        {0: ALL[:6], 1: ALL[:4], 2: ALL[:5]},
        *({0: [6 + t], 1: [4 + t], 2: [5 + t]} for t in range(3)),
        {1: [7], 2: [8]},
        {1: [8]},
    ],
    "rows that join later": [
        {1: ALL[:4]},
        {1: [4]},
        {2: ALL[:3], 0: ALL[:6]},
        {0: [6], 1: [5], 2: [3, 4]},
        {2: ALL[5:], 1: ALL[6:], 0: ALL[7:]},
    ],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_way_a_run_is_cut_into_forwards_changes_nothing(name: str) -> None:
    """Values and receipts, in float64: 1e-12 is for sums of some dozen terms in another order."""
    whole, cut = fresh(), fresh()
    expected = stepwise(whole, [dict.fromkeys(range(3), ALL)])
    found = stepwise(cut, SCHEDULES[name])
    for point in POINTS:
        assert not torch.equal(expected[point], values()[point]) or point == READ
        torch.testing.assert_close(found[point], expected[point], rtol=0, atol=1e-12, msg=str(point))
    for row in range(3):
        same_receipts(whole.receipts(row), cut.receipts(row))


def same_receipts(found: tuple[Receipt, ...], expected: tuple[Receipt, ...]) -> None:
    """The same counts, and means up to the order of their sums."""
    for one, other in zip(found, expected, strict=True):
        assert replace(one, mean_delta=0.0, max_delta=0.0) == replace(other, mean_delta=0.0, max_delta=0.0)
        assert abs(one.mean_delta - other.mean_delta) < 1e-12 and abs(one.max_delta - other.max_delta) < 1e-12


def test_generated_rows_get_the_mean_of_the_prompt() -> None:
    plan = Plan(model().facts.site_info, rows=1, max_length=LENGTH, device=CPU, dtype=torch.float64)
    own_mean = run(4, Intervention(Mean(on(STREAM)), Positions(Range(1))))
    plan.place(0, compile_row(own_mean, plan.sites))
    value = values()[STREAM][:1]
    plan.step(torch.tensor([ALL[:4]]))
    prompt = plan.edits()[STREAM](value[:, :4])
    expected = value[0, 1:4].mean(0)
    torch.testing.assert_close(prompt[0, 1:], expected.expand(3, -1), rtol=0, atol=1e-12)
    plan.step(torch.tensor([[4]]))
    assert torch.equal(plan.edits()[STREAM](value[:, 4:5])[0, 0], prompt[0, 1])


def test_a_forward_that_was_abandoned_leaves_no_trace_in_the_receipts() -> None:
    once, again = fresh(), fresh()
    again.step(torch.tensor([ALL] * 3))
    apply(again, values())
    again.abandon()
    for plan in (once, again):
        stepwise(plan, [dict.fromkeys(range(3), ALL)])
    assert [once.receipts(row) for row in range(3)] == [again.receipts(row) for row in range(3)]


def test_a_site_that_the_forward_did_not_reach_has_fired_nothing() -> None:
    plan = fresh()
    plan.step(torch.tensor([ALL] * 3))
    apply(plan, values())
    before = [receipt.rows_fired for row in range(3) for receipt in plan.receipts(row)]
    plan.step(torch.tensor([ALL] * 3))
    plan.edits()[SCORES](values()[SCORES])
    after = [receipt.rows_fired for row in range(3) for receipt in plan.receipts(row)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 0, 0, 2, 0, 0, 0, 2, 0, 0]


def rotations(edits: list[RowEdits]) -> Iterator[list[RowEdits]]:
    return (edits[turn:] + edits[:turn] for turn in range(len(edits)))


def test_a_row_is_swapped_without_touching_its_neighbours() -> None:
    """Rows come and go in a plan in use; each has the values and the receipts that it has in a plan of its own."""
    sites = model().facts.site_info
    plan = Plan(sites, rows=3, max_length=LENGTH, device=CPU, dtype=torch.float64)
    edits = rows()
    for turn, some in enumerate(rotations(edits)):
        alone = compile_batch(some, sites, device=CPU, dtype=torch.float64)
        for row in range(3):
            if turn:
                plan.release(row)
            plan.place(row, compile_row(some[row], sites))
            # In between, the rows that stayed are at work.
            plan.step(torch.tensor([ALL] * 3))
            apply(plan, values())
            plan.abandon()
        schedule = [dict.fromkeys(range(3), ALL)]
        found, expected = stepwise(plan, schedule), stepwise(alone, schedule)
        for point in POINTS:
            torch.testing.assert_close(found[point], expected[point], rtol=0, atol=1e-12, msg=str(point))
        for row in range(3):
            assert [r.rows_changed for r in plan.receipts(row)] == [r.rows_changed for r in alone.receipts(row)]


def test_rows_that_come_back_find_their_room_again() -> None:
    sites = model().facts.site_info
    plan = Plan(sites, rows=3, max_length=LENGTH, device=CPU, dtype=torch.float64)
    widths = []
    for some in [*rotations(rows())] * 2:
        for row in range(3):
            plan.place(row, compile_row(some[row], sites))
        widths.append((plan.columns.count, plan.vectors_held))
        for row in range(3):
            plan.release(row)
        assert plan.edits() == {} and plan.condition_reads() == frozenset() and plan.vectors_held == 0
    assert widths[2:] == [widths[2]] * 4


def test_a_row_keeps_nothing_of_the_run_before() -> None:
    """Neither whose mean was taken, nor the mean itself, nor which edges were cut."""
    sites = model().facts.site_info
    first = run(
        4, Intervention(Mean(on(STREAM)), Positions((0, 2))), Intervention(Knockout(0, ((5, 1), (6, 2), (8, 3))))
    )
    second = run(4, Intervention(Mean(on(STREAM)), Positions((1, 3, 5))), Intervention(Knockout(0, ((8, 4),))))
    plan = Plan(sites, rows=1, max_length=LENGTH, device=CPU, dtype=torch.float64)
    given = {point: value[:1] for point, value in values().items()}
    plan.place(0, compile_row(first, sites))
    plan.step(torch.tensor([ALL]))
    apply(plan, given)
    plan.release(0)
    plan.place(0, compile_row(second, sites))
    plan.step(torch.tensor([[5]]))
    assert not plan.edits()[STREAM](given[STREAM][:, 5:6]).any()  # its own prompt has not passed yet
    plan.step(torch.tensor([ALL]))
    alone = compile_batch([second], sites, device=CPU, dtype=torch.float64)
    alone.step(torch.tensor([ALL]))
    found, expected = apply(plan, given), apply(alone, given)
    assert all(torch.equal(found[point], expected[point]) for point in POINTS)


def test_a_longer_plan_takes_over_in_the_middle_of_a_run() -> None:
    """Edits, receipts and the means of prompts go on as if nothing had happened."""
    sites = model().facts.site_info
    own_mean = run(4, Intervention(Mean(on(STREAM)), Positions(Range(1))))
    edits = [rows()[0], own_mean, rows()[1]]
    given = values()
    short = compile_batch(edits, sites, device=CPU, dtype=torch.float64)
    alone = compile_batch(edits, sites, device=CPU, dtype=torch.float64)
    longer = Plan(sites, rows=4, max_length=2 * LENGTH, device=CPU, dtype=torch.float64)
    for plan in (short, alone):
        plan.step(torch.tensor([ALL[:4]] * 3))
        apply(plan, {point: chunk(point, value, ALL[:4]) for point, value in given.items()})
    for row in range(3):
        longer.adopt(3 - row, short, row)
    rest = {point: chunk(point, value, ALL[4:]) for point, value in given.items()}
    alone.step(torch.tensor([ALL[4:]] * 3))
    longer.step(torch.tensor([ALL[4:]] * 3), torch.tensor([3, 2, 1]))
    found, expected = apply(longer, rest), apply(alone, rest)
    for point in POINTS:
        torch.testing.assert_close(found[point], expected[point], rtol=0, atol=1e-12, msg=str(point))
    for row in range(3):
        same_receipts(longer.receipts(3 - row), alone.receipts(row))


def chunk(point: HookPoint, value: torch.Tensor, places: list[int]) -> torch.Tensor:
    return value[:, :, places, : places[-1] + 1] if point.site.position_axis else value[:, places]


def test_a_row_without_edits_may_stand_for_several() -> None:
    plan = Plan(model().facts.site_info, rows=4, max_length=LENGTH, device=CPU, dtype=torch.float64)
    plan.place(1, compile_row(rows()[0], plan.sites))
    plan.step(torch.tensor([ALL] * 3), torch.tensor([3, 1, 3]))
    given = values()
    found = apply(plan, given)
    for point in POINTS:
        assert torch.equal(found[point][[0, 2]], given[point][[0, 2]])
    assert plan.receipts(1)[0].rows_changed == 6
