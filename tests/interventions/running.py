"""Runs under interventions: as a batch through a plan, and each alone through the naive definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from engine.models import resident, unpadded
from families import family_named
from interventions.naive import Naive
from patchclamp_server.engine.loading import Resident
from patchclamp_server.engine.runner import Batch, Capture, Edit, Forward
from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.interventions.compiling import compile_row
from patchclamp_server.interventions.ops import Intervention, Op, RowEdits
from patchclamp_server.interventions.plan import Plan, compile_batch
from patchclamp_server.interventions.validation import validate
from patchclamp_server.positions import ALL, Positions

# Three prompts of different lengths: two rows are padded.
PROMPTS = ((5, 17, 3, 40, 11, 17, 29), (9, 33, 21, 4, 48), (50, 1, 44, 44, 7, 19))
CPU = torch.device("cpu")
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox", "qwen3_moe")


# A float32 forward alone and as part of a batch: values below some tens, sums in another order. The engine's own bound
# for unedited models is 2e-5; edits here make values up to ten times as large.
ROUNDING = 2e-4


@cache
def model(name: str = "llama", dtype: torch.dtype = torch.float32) -> Resident:
    return resident(family_named(name), "cpu", dtype)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a batch gave: every edit's [batch, *axes] before and after, values read, each row's logits [pos, d_vocab].

    Edits and the conditions that they wait for are in the order of the forward; a condition has no value after.
    """

    edits: list[tuple[HookPoint, torch.Tensor, torch.Tensor | None]]
    values: dict[HookPoint, torch.Tensor]
    logits: tuple[torch.Tensor, ...]


def edits_of(prompt: Sequence[int], *edits: Op | Intervention, positions: Positions = ALL) -> RowEdits:
    """The edits of a run that reads a prompt and generates nothing."""
    interventions = tuple(edit if isinstance(edit, Intervention) else Intervention(edit, positions) for edit in edits)
    return RowEdits(interventions, len(prompt), len(prompt))


def places(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Absolute positions [batch, pos] of whole prompts, -1 for padding."""
    longest = max(map(len, prompts))
    return torch.tensor([[p if p < len(prompt) else -1 for p in range(longest)] for prompt in prompts])


def forward(
    resident: Resident,
    prompts: Sequence[Sequence[int]],
    edits: Mapping[HookPoint, Edit],
    observed: Iterable[HookPoint] = (),
    observe: Capture = lambda point, value: None,
    reads: Iterable[HookPoint] = (),
) -> Outcome:
    """One forward of whole prompts through the runner. Edits work in the element type that they are given here."""
    seen: list[tuple[HookPoint, torch.Tensor, torch.Tensor | None]] = []
    values: dict[HookPoint, torch.Tensor] = {}

    def noted(point: HookPoint, edit: Edit) -> Edit:
        def run(value: torch.Tensor) -> torch.Tensor:
            given = value.double()
            new = edit(given)
            seen.append((point, given, new))
            return new.to(value.dtype)

        return run

    def capture(point: HookPoint, value: torch.Tensor) -> None:
        if point in observed:
            seen.append((point, value.double(), None))
            observe(point, value.double())
        values[point] = value.clone()

    logits = resident.runner.run(
        Forward(
            Batch.of(prompts, CPU),
            reads=frozenset(reads) | frozenset(observed),
            capture=capture,
            edits={point: noted(point, edit) for point, edit in edits.items()},
            logit_rows=[(row, p) for row, prompt in enumerate(prompts) for p in range(len(prompt))],
        )
    )
    return Outcome(seen, values, logits.split([len(prompt) for prompt in prompts]))


def run_plan(
    resident: Resident, plan: Plan, prompts: Sequence[Sequence[int]], reads: Iterable[HookPoint] = ()
) -> Outcome:
    plan.step(places(prompts))
    return forward(resident, prompts, plan.edits(), plan.condition_reads(), plan.observe, reads)


def run_naive(resident: Resident, edits: RowEdits, prompt: Sequence[int]) -> Outcome:
    """One run alone under the naive definitions."""
    naive = Naive(edits)
    points = naive.points()
    observed = naive.condition_points() - points
    return forward(resident, [prompt], {point: naive.edit(point) for point in points}, observed, naive.observe)


def captured(resident: Resident, prompt: Sequence[int], points: Iterable[HookPoint]) -> dict[HookPoint, torch.Tensor]:
    """The values of hook points in an unedited run."""
    return {point: value[0] for point, value in forward(resident, [prompt], {}, reads=points).values.items()}


def planned(resident: Resident, rows: Sequence[RowEdits], dtype: torch.dtype = torch.float64) -> Plan:
    """A plan for valid edits, computing in float64."""
    sites = resident.facts.site_info
    for row in rows:
        assert validate(row, sites) == ()
    return compile_batch(rows, sites, device=CPU, dtype=dtype)


def planned_in_turn(resident: Resident, rows: Sequence[RowEdits]) -> Plan:
    """A general plan that learns of its rows one by one."""
    sites, longest = resident.facts.site_info, max(row.max_length for row in rows)
    plan = Plan(sites, rows=len(rows), max_length=longest, device=CPU, dtype=torch.float64, specialise=False, slots=1)
    for row, edits in reversed(list(enumerate(rows))):
        plan.place(row, compile_row(edits, sites))
    return plan


def agree(
    resident: Resident,
    rows: Sequence[RowEdits],
    prompts: Sequence[Sequence[int]] = PROMPTS,
    make: Callable[[Resident, Sequence[RowEdits]], Plan] = planned,
) -> Outcome:
    """Holds a batch under a plan to the naive definitions, at every site on the values that arrived there.

    Both compute in float64, on values below a thousand; 1e-9 leaves room for the order of sums over some dozen
    operations. The receipts have to agree with the naive counts.
    """
    plan = make(resident, rows)
    outcome = run_plan(resident, plan, prompts)
    for row, (edits, prompt) in enumerate(zip(rows, prompts, strict=True)):
        naive = Naive(edits)
        for point, given, new in outcome.edits:
            before = unpadded(point.site, given[row], len(prompt))[None]
            if new is None:
                naive.observe(point, before)
                continue
            expected = naive.edit(point)(before)[0]
            found = unpadded(point.site, new[row], len(prompt))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=str(point))
        answered(plan, row, naive)
    return outcome


def answered(plan: Plan, row: int, naive: Naive) -> None:
    """Holds the receipts of a row to the counts of the naive definitions."""
    for index, receipt in enumerate(plan.receipts(row)):
        counts = naive.counts[index]
        assert (receipt.rows_selected, receipt.rows_fired) == (counts.selected, counts.fired), index
        if not counts.close:
            assert (receipt.rows_changed, receipt.clipped) == (counts.changed, counts.clipped), index
            assert receipt.no_effect == (counts.fired > 0 and counts.changed == 0)
        mean = sum(counts.deltas) / max(len(counts.deltas), 1)
        # Norms of vectors, from squares and through a root: half of the digits of float64 where they are small.
        assert abs(receipt.mean_delta - mean) <= 1e-6, index
        assert abs(receipt.max_delta - max(counts.deltas, default=0.0)) <= 1e-6, index
