"""Filling: where the parts of a run go in the phases of a site, and how one part is written into its column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.interventions.actions import Action, Cut, Overwrite, Part, Shift, Update
from patchclamp_server.interventions.compiling import RowPlan
from patchclamp_server.interventions.tables import (
    Columns,
    CutPhase,
    Number,
    OverwritePhase,
    Phase,
    SiteTables,
    UpdatePhase,
)


def align(parts: Sequence[Part], phases: Sequence[tuple[type[Action], float]]) -> list[tuple[int, int]]:
    """For each part, in order, the first phase that has room and the stage there.

    Phases are given by their kind and how many stages they have. Those past the end are named where there is no room;
    they take any number of updates that follow each other.
    """
    rooms, at, used = list(phases), 0, 0
    found = []
    for part in parts:
        kind = type(part.action)
        while at < len(rooms) and not (rooms[at][0] is kind and used < rooms[at][1]):
            at, used = at + 1, 0
        if at == len(rooms):
            rooms.append((kind, float("inf") if kind is Update else 1))
        found.append((at, used))
        used += 1
    return found


def needed(plans: Sequence[RowPlan]) -> dict[HookPoint, list[tuple[type[Action], int]]]:
    """The phases that hold some runs, with just the stages that these have."""
    sizes: dict[HookPoint, list[tuple[type[Action], int]]] = {}
    for point, parts in ((point, parts) for plan in plans for point, parts in plan.parts.items()):
        rooms = sizes.setdefault(point, [])
        unlimited = [(kind, float("inf") if kind is Update else 1) for kind, _ in rooms]
        for part, (at, stage) in zip(parts, align(parts, unlimited), strict=True):
            rooms[at:] = rooms[at:] or [(type(part.action), 0)]
            rooms[at] = (rooms[at][0], max(rooms[at][1], stage + 1))
    return sizes


def fill(
    content: Columns, column: int, row: int, part: Part, site: SiteTables, phase: Phase, met: Mapping[int, int]
) -> list[int]:
    """Writes a part into a column of a table row; gives the slots that it has acquired.

    `met` tells where each condition of the run is found among those of the plan.
    """
    gate, action = part.gate, part.action
    content.gate[: gate.positions.shape[0], column] = gate.positions
    content.heads[list(gate.heads) if gate.heads else slice(None), column] = True
    phase.headed |= bool(gate.heads)
    if gate.condition is not None:
        content.condition[column] = met[gate.condition]
        phase.conditional = True
    numbers, slots = content.numbers[:, column], content.slots[:, column]
    match action, phase:
        case Update(), UpdatePhase():
            return _update(action, phase, numbers, slots)
        case Shift(), _:
            return _shift(action, phase, numbers, slots)
        case Overwrite(), OverwritePhase():
            return _overwrite(action, phase, site, row)
        case Cut(), CutPhase():
            _cut(action, phase, row)
    return []


def relate(phase: UpdatePhase, row: int, slots: torch.Tensor) -> None:
    """Writes the Gram matrix of a row's slots [2, stage]."""
    a, b = phase.bank.vectors[slots.to(phase.gram.device)]  # [stage, width]
    phase.gram[row] = a @ b.T


def _update(action: Update, phase: UpdatePhase, numbers: torch.Tensor, slots: torch.Tensor) -> list[int]:
    b = phase.bank.acquire(action.b[None])
    a = [0] if action.a is None else phase.bank.acquire(action.a[None])
    slots[0], slots[1] = a[0], b[0]
    _write(
        numbers,
        {
            Number.C: action.c,
            Number.ALPHA: action.alpha,
            Number.BETA: action.beta,
            Number.LOW: action.low,
            Number.HIGH: action.high,
            Number.B_NORM: float(action.b.norm()),
        },
    )
    phase.reads |= action.a is not None
    phase.clips |= action.low > -float("inf") or action.high < float("inf")
    return [*a, *b]


def _write(numbers: torch.Tensor, given: Mapping[Number, float]) -> None:
    numbers.copy_(torch.tensor([given.get(number, 0.0) for number in Number], dtype=numbers.dtype))


def _shift(action: Shift, phase: Phase, numbers: torch.Tensor, slots: torch.Tensor) -> list[int]:
    acquired = phase.bank.acquire(action.b[None])
    slots[1] = acquired[0]
    given = {Number.RELATIVE: float(action.relative), Number.KEEP_NORM: float(action.keep_norm)}
    _write(numbers, {Number.C: action.c, Number.CAP: action.cap, **given})
    return acquired


def _overwrite(action: Overwrite, phase: OverwritePhase, site: SiteTables, row: int) -> list[int]:
    width = phase.bank.vectors.shape[1] // site.geometry.groups
    rows = functional.pad(action.rows, (0, width - action.rows.shape[-1]))
    acquired = phase.bank.acquire(rows.flatten(1))
    length = action.index.shape[0]
    phase.index[row] = 0
    phase.index[row, :length] = torch.tensor([0, *acquired])[action.index].to(phase.index.device)
    phase.pools[row] = action.pool is not None
    phase.pool[row] = False
    if action.pool is not None:
        if not phase.pooled:
            phase.memory = phase.bank.vectors.new_zeros(phase.index.shape[0], phase.bank.vectors.shape[1])
        phase.pool[row, :length] = action.pool.to(phase.pool.device)
        phase.memory[row] = 0
        phase.pooled = True
    phase.neurons[row] = not action.neurons
    phase.neurons[row, list(action.neurons)] = True
    phase.partial |= bool(action.neurons)
    return acquired


def _cut(action: Cut, phase: CutPhase, row: int) -> None:
    terms, length = action.queries.shape
    missing = terms - phase.queries.shape[1]
    if missing > 0:
        phase.queries = functional.pad(phase.queries, (0, 0, 0, missing))
        phase.keys = functional.pad(phase.keys, (0, 0, 0, missing))
    for table, given in ((phase.queries, action.queries), (phase.keys, action.keys)):
        table[row] = False
        table[row, :terms, :length] = given.to(table.device)
