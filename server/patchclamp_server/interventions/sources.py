"""Sources: what interventions need from elsewhere before they can be compiled.

Unembedding rows lie with the model; patched, resampled and frozen values come from other runs of the request, which
have to be captured before the run that uses them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.interventions.expansion import Sites, expanded, hook_points
from patchclamp_server.interventions.ops import (
    Ablate,
    AblateEverywhere,
    Add,
    Captured,
    Condition,
    Freeze,
    FromRun,
    Intervention,
    Knockout,
    Mean,
    Op,
    Replace,
    RowEdits,
    UnembedRow,
    Vectors,
    Zero,
)

UnembedRows = Callable[[int], torch.Tensor]
"""The unembedding row `[d_model]` of a token id."""

Captures = Callable[[int, HookPoint], torch.Tensor]
"""The value `[*axes]` of a hook point in a run of the request, without padding."""


def required_sources(interventions: Iterable[Intervention], sites: Sites) -> frozenset[tuple[int, HookPoint]]:
    """The (run, hook point) pairs whose whole values these interventions use."""
    return frozenset(
        (op.source.run, point)
        for intervention in interventions
        for op in expanded(intervention.op, sites)
        if isinstance(op, Replace) and isinstance(op.source, FromRun)
        for point in hook_points(op)
    )


def resolved(row: RowEdits, sites: Sites, unembed_rows: UnembedRows, captures: Captures) -> RowEdits:
    """The edits of a run with tensors in place of everything that they only name."""

    def vector(vectors: Vectors) -> Vectors:
        return unembed_rows(vectors.token_id).float().cpu() if isinstance(vectors, UnembedRow) else vectors

    def captured(op: Op, named: FromRun) -> Captured:
        points = (point for written in expanded(op, sites) for point in hook_points(written))
        return Captured({point: captures(named.run, point) for point in points})

    def operation(op: Op) -> Op:
        match op:
            case Add():
                return replace(op, vector=vector(op.vector))
            case Ablate() | AblateEverywhere():
                return replace(op, directions=vector(op.directions))
            case Mean():
                return op if op.mean is None else replace(op, mean=vector(op.mean))
            case Replace(source=FromRun() as named) | Freeze(source=FromRun() as named):
                return replace(op, source=captured(op, named))
            case Replace() | Freeze() | Zero() | Knockout():
                return op
            case _:
                return replace(op, direction=vector(op.direction))

    def condition(when: Condition | None) -> Condition | None:
        return None if when is None else replace(when, direction=vector(when.direction))

    edits = (replace(edit, op=operation(edit.op), when=condition(edit.when)) for edit in row.interventions)
    return replace(row, interventions=tuple(edits))


def drawn(source_runs: Sequence[int], seed: int, run: int) -> int:
    """The run that a resample ablation takes its values from: one draw for each seed and run."""
    return random.Random(f"resample/{seed}/{run}").choice(source_runs)
