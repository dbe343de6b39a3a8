"""A plan that is not specialised compiles once: other edits are other contents of the same buffers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from interventions.running import CPU, model
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.compiling import compile_row
from patchclamp_server.interventions.ops import (
    Ablate,
    Add,
    Clamp,
    Comparison,
    Condition,
    Intervention,
    Knockout,
    Mean,
    Op,
    RowEdits,
    Scale,
    Target,
    Unit,
    Zero,
)
from patchclamp_server.interventions.plan import Plan
from patchclamp_server.positions import Positions, Span

STREAM, HEADS, SCORES = HookPoint(Site.RESID_PRE, 1), HookPoint(Site.ATTN_Z, 0), HookPoint(Site.ATTN_SCORES, 0)
ROWS, LENGTH = 3, 8


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edits(turn: int) -> list[RowEdits]:
    """Rows whose operations fit the phases of the first turn: vectors, numbers, heads and positions all differ."""
    stream, heads = Target((STREAM,)), Target((HEADS,), (turn % 4,))
    when = Condition(STREAM, noise(turn, 32), list(Comparison)[turn % 2], 0.1 * turn)
    low_rank: list[Op] = [
        Add(stream, noise(turn, 32), turn),
        Ablate(stream, noise(turn + 1, 1 + turn % 2, 32)),
        Clamp(stream, noise(turn + 2, 32), low=-1.0),
        Scale(heads, noise(turn + 3, 8), 2.0),
    ]
    rows: list[list[Op]] = [
        [low_rank[turn % 4], Zero(stream), low_rank[(turn + 1) % 4]],
        [low_rank[(turn + 2) % 4], Mean(stream, noise(turn, 32))],
        [Add(stream, noise(turn, 32), 1.0, Unit.NORM_FRACTION), Knockout(0, ((turn % 4 + 2, turn % 3),))],
    ]
    positions = [Positions(), Positions(Span.GENERATED), Positions((turn % 4 + 2, 5))]
    return [
        RowEdits(tuple(Intervention(op, positions[row], when if row == 0 else None) for op in ops), 4, LENGTH)
        for row, ops in enumerate(rows)
    ]


def compiled(function: Callable[..., object], counted: list[int]) -> Callable[..., object]:
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        counted.append(len(inputs))
        return graph.forward

    return torch.compile(function, fullgraph=True, backend=backend)


# Dynamo's own, on importing what it traces through.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_edits_are_not_compiled_again() -> None:
    torch._dynamo.reset()
    plan = Plan(
        model().facts.site_info,
        rows=ROWS,
        max_length=LENGTH,
        device=CPU,
        dtype=torch.float32,
        specialise=False,
        slots=32,
    )
    everything = [compile_row(row, plan.sites) for turn in range(6) for row in edits(turn)]
    plan.reserve(everything)
    functions = plan.edits()
    assert set(functions) == {STREAM, HEADS, SCORES}
    counted: list[int] = []
    fast = {point: compiled(edit, counted) for point, edit in functions.items()}
    values = {STREAM: noise(9, ROWS, 1, 32), HEADS: noise(8, ROWS, 1, 4, 8), SCORES: noise(7, ROWS, 4, 1, LENGTH)}
    changed = 0
    for turn in range(6):
        for row, planned in enumerate(edits(turn)):
            plan.place(row, compile_row(planned, plan.sites))
        for position in range(4, LENGTH):
            for point, value in values.items():
                plan.step(torch.full((ROWS, 1), position))
                found = fast[point](value)
                plan.step(torch.full((ROWS, 1), position))
                expected = functions[point](value)
                assert isinstance(found, torch.Tensor) and torch.equal(found, expected)
                changed += not torch.equal(expected, value)
        if not turn:
            first = len(counted)
        for row in range(ROWS):
            plan.release(row)
    assert first == len(counted) == len(values)
    assert changed > 6 * 4
