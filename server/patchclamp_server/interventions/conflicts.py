"""Conflicts: edits of one run that cannot have been meant together.

An operation that undoes the one before it is taken for a mistake: the same coordinate set twice, or a target replaced
twice in the same way, at rows that overlap. Where either is conditional, the two may be the arms of one decision and
are let pass. Knockouts that together leave a query without a key would make its attention undefined.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch.nn import functional

from patchclamp_server.hookpoints import Site
from patchclamp_server.interventions.expansion import Sites
from patchclamp_server.interventions.geometry import Geometry
from patchclamp_server.interventions.ops import (
    Intervention,
    Knockout,
    Mean,
    Op,
    Replace,
    RowEdits,
    SetCoordinate,
    Target,
    Zero,
)
from patchclamp_server.interventions.problems import Problem, absolute, selected


@dataclass(frozen=True, eq=False)
class _Overwriter:
    """An edit that leaves nothing of what was there before: `bits` are its positions, as bits of a number.

    `direction` is the unit direction of a coordinate that is set, None where the whole target is replaced.
    """

    index: int
    intervention: Intervention
    target: Target
    bits: int
    direction: torch.Tensor | None


def undone(row: RowEdits) -> Iterator[Problem]:
    """Operations that undo an earlier one of the same kind."""
    kinds: dict[type[Op], list[_Overwriter]] = defaultdict(list)
    for one in _overwriters(row):
        kinds[type(one.intervention.op)].append(one)
    for found in kinds.values():
        for first, second in combinations(found, 2):
            if first.bits & second.bits and _overlap(first.target, second.target) and _same_effect(first, second):
                text = f"undoes what interventions[{first.index}] does to the same rows"
                yield Problem(second.index, second.intervention.op.arm, text)


def _overwriters(row: RowEdits) -> Iterator[_Overwriter]:
    for index, intervention in enumerate(row.interventions):
        op = intervention.op
        if intervention.when is not None or not isinstance(op, Zero | Mean | Replace | SetCoordinate):
            continue
        direction = op.direction if isinstance(op, SetCoordinate) else None
        if isinstance(op, SetCoordinate) and not isinstance(direction, torch.Tensor):
            continue
        unit = functional.normalize(direction.reshape(-1), dim=0) if isinstance(direction, torch.Tensor) else None
        try:
            yield _Overwriter(index, intervention, op.target, _bits(selected(intervention, row), row.max_length), unit)
        except IndexError:
            continue


def _bits(positions: Sequence[int], length: int) -> int:
    marks = bytearray(length)
    for position in positions:
        marks[position] = 1
    # A byte of eight bits each is more than is needed, and the quickest that there is.
    return int.from_bytes(marks, "little")


def _overlap(a: Target, b: Target) -> bool:
    return (
        not set(a.hook_points).isdisjoint(b.hook_points)
        and (not a.heads or not b.heads or not set(a.heads).isdisjoint(b.heads))
        and (not a.neurons or not b.neurons or not set(a.neurons).isdisjoint(b.neurons))
    )


def _same_effect(first: _Overwriter, second: _Overwriter) -> bool:
    if first.direction is None or second.direction is None:
        return True
    same_shape = first.direction.shape == second.direction.shape
    return same_shape and abs(float(first.direction @ second.direction)) > 1 - 1e-6


def silenced(row: RowEdits, sites: Sites) -> Iterator[Problem]:
    """Queries that all knockouts of a run together leave without a key."""
    if Site.ATTN_SCORES not in sites:
        return
    n_heads = Geometry.of(sites[Site.ATTN_SCORES]).groups
    cut: dict[tuple[int, int, int], set[int]] = defaultdict(set)
    for index, intervention in enumerate(row.interventions):
        op = intervention.op
        if not isinstance(op, Knockout):
            continue
        try:
            positions = set(selected(intervention, row))
            edges = [absolute(edge, row) for edge in op.edges]
        except IndexError:
            continue
        silenced = set()
        for query, key in edges:
            for head in (op.heads or range(n_heads)) if query in positions else ():
                keys = cut[op.layer, head, query]
                keys.add(key)
                if len(keys) > query:
                    silenced.add(query)
        for query in sorted(silenced):
            yield Problem(index, "knockout.edges", f"position {query} would have nothing left to attend to")
