"""Validation: what is wrong with the edits of a run, as far as it can be told without running the model.

All problems are collected, each with the index of its intervention and the path of the field, so that a caller learns
of every one at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from patchclamp_server.hookpoints import Site
from patchclamp_server.interventions.conflicts import silenced, undone
from patchclamp_server.interventions.expansion import Sites, expanded, hook_points
from patchclamp_server.interventions.flow import known_before
from patchclamp_server.interventions.geometry import Geometry, fitted
from patchclamp_server.interventions.ops import (
    Ablate,
    AblateEverywhere,
    Add,
    Clamp,
    Condition,
    Freeze,
    Inline,
    Intervention,
    Knockout,
    Mean,
    Replace,
    RowEdits,
    Scale,
    SetCoordinate,
    Target,
    Unit,
    Vectors,
    Zero,
)
from patchclamp_server.interventions.problems import Problem, absolute, selected

Found = Iterator[tuple[str, str]]
"""Pairs of a field's path below the intervention and what is wrong with it."""


def validate(row: RowEdits, sites: Sites) -> tuple[Problem, ...]:
    """Everything that is wrong with the edits of a run."""
    found = [
        Problem(index, field, text)
        for index, intervention in enumerate(row.interventions)
        for field, text in _Check(intervention, row, sites).all()
    ]
    return (*found, *undone(row), *silenced(row, sites))


class _Check:
    """What is wrong with one intervention on its own."""

    def __init__(self, intervention: Intervention, row: RowEdits, sites: Sites) -> None:
        self.intervention, self.row, self.sites = intervention, row, sites
        self.positions: tuple[int, ...] | None = None

    def all(self) -> Found:
        op = self.intervention.op
        try:
            self.positions = selected(self.intervention, self.row)
        except IndexError as fault:
            yield "positions", str(fault)
        for field, text in self.operation():
            yield field if field == "positions" else ".".join(filter(None, (op.arm, field))), text
        if self.intervention.when is not None:
            for field, text in self.condition(self.intervention.when):
                yield f"when.{field}", text

    def operation(self) -> Found:
        op = self.intervention.op
        match op:
            case Knockout():
                yield from self.knockout(op)
                return
            case Freeze():
                if not (op.attention or op.norms or op.mlps):
                    yield "", "at least one of attention, norms and mlps must be held"
                return
            case AblateEverywhere():
                yield from self.vectors("directions", op.directions, self.sites[Site.EMBED].width, stack=True)
                return
        problems = list(self.target(op.target))
        yield from problems
        if problems:
            return
        for geometry in {Geometry.of(self.sites[point.site]): None for point in op.target.hook_points}:
            if geometry.of_keys and not isinstance(op, Zero | Replace):
                yield "target.hook_point", "attention scores and patterns can be zeroed, replaced or knocked out"
            else:
                yield from self.values(op, geometry)

    def values(
        self, op: Add | Ablate | SetCoordinate | Clamp | Scale | Zero | Mean | Replace, geometry: Geometry
    ) -> Found:
        width = geometry.width
        match op:
            case Add():
                yield from self.addition(op, width)
            case Ablate():
                yield from self.vectors("directions", op.directions, width, op.target, stack=True)
            case SetCoordinate():
                yield from self.vectors("direction", op.direction, width, op.target)
                yield from _finite("value", op.value)
            case Scale():
                yield from self.vectors("direction", op.direction, width, op.target)
                yield from _finite("factor", op.factor)
            case Clamp():
                yield from self.vectors("direction", op.direction, width, op.target)
                yield from _bounds(op)
            case Mean():
                yield from self.mean(op, geometry)
            case Replace():
                yield from self.replacement(op, geometry)

    def target(self, target: Target) -> Found:
        if not target.hook_points:
            yield "target.hook_point", "no layer of this model has the site"
        for point in target.hook_points:
            info = self.sites.get(point.site)
            if info is None or (point.site.in_block and point.layer not in info.layers):
                yield "target.hook_point", f"this model has no {point}"
                return
            if not info.writable:
                yield "target.hook_point", f"{point} is read-only: {info.read_only_reason}"
            geometry = Geometry.of(info)
            if target.heads and not geometry.has_heads:
                yield "target.heads", f"{point} has no head axis"
            elif target.heads:
                yield from _indices("target.heads", target.heads, geometry.groups, "head")
            if target.neurons and geometry.of_keys:
                yield "target.neurons", f"the last axis of {point} is over keys: use a knockout"
            elif target.neurons:
                yield from _indices("target.neurons", target.neurons, geometry.width, "neuron")

    def addition(self, op: Add, width: int) -> Found:
        yield from self.vectors("vector", op.vector, width, op.target, zero=op.unit is Unit.ABSOLUTE)
        yield from _finite("strength", op.strength)
        if op.cap is not None and op.unit is not Unit.NORM_FRACTION:
            yield "cap", "it bounds the row norm of the unit norm fraction, which is not this edit's"
        elif op.cap is not None and not (math.isfinite(op.cap) and op.cap > 0):
            yield "cap", "must be finite and greater than 0"
        if op.keep_norm and op.target.neurons:
            yield "keep_norm", "it would rescale entries beyond the target's neurons"

    def mean(self, op: Mean, geometry: Geometry) -> Found:
        if op.mean is None:
            if self.positions is not None and not any(p < self.row.prompt_length for p in self.positions):
                yield "positions", "select a position of the prompt to take the mean over, or give the mean"
            return
        rows = geometry.target_groups(op.target)
        yield from self.vectors("mean", op.mean, geometry.width, op.target, stack=True, zero=True)
        if isinstance(op.mean, torch.Tensor) and op.mean.ndim == 2 and op.mean.shape[0] not in (1, rows):
            yield "mean", f"must be one row, or {rows}: one for each head of the target"

    def replacement(self, op: Replace, geometry: Geometry) -> Found:
        in_order = op.source_positions is not None or isinstance(op.source, Inline)
        if in_order and self.positions is not None and len(set(self.positions)) < len(self.positions):
            yield "positions", "a position is selected twice, for two rows of the source"
        if not isinstance(op.source, Inline):
            return
        rows = op.source.rows
        axis = 1 if geometry.of_keys else 0
        groups = (geometry.target_groups(op.target),) if geometry.grouped else ()
        others = (*groups, "keys") if geometry.of_keys else (*groups, geometry.target_width(op.target))
        if rows.ndim != len(others) + 1:
            yield "tensor", f"must have {len(others) + 1} axes, as the selected rows have; it has {rows.ndim}"
            return
        actual = [size for i, size in enumerate(rows.shape) if i != axis]
        if any(want not in ("keys", size) for want, size in zip(others, actual, strict=True)):
            yield "tensor", f"must be {list(others)} beside its rows, as the target is; it is {actual}"
        elif geometry.of_keys and actual[-1] > self.row.max_length:
            yield "tensor", f"has {actual[-1]} keys, the run has at most {self.row.max_length} positions"
        if not bool(torch.isfinite(rows).all()):
            yield "tensor", "all values must be finite"
        yield from self.counts(op, rows.shape[axis])

    def counts(self, op: Replace, rows: int) -> Found:
        """Whether a source of some rows has one for each position."""
        if self.positions is None:
            return
        try:
            taken = op.source_positions.resolve(rows) if op.source_positions is not None else range(rows)
        except IndexError as fault:
            yield "source_positions", str(fault)
            return
        if len(taken) != len(self.positions):
            yield "source_positions", f"{len(taken)} rows of the source for {len(self.positions)} selected positions"

    def knockout(self, op: Knockout) -> Found:
        info = self.sites.get(Site.ATTN_SCORES)
        if info is None or op.layer not in info.layers:
            yield "layer", f"this model has no attention scores in layer {op.layer}"
        else:
            yield from _indices("heads", op.heads, Geometry.of(info).groups, "head")
        if not op.edges:
            yield "edges", "at least one is needed"
        for number, edge in enumerate(op.edges):
            try:
                query, key = absolute(edge, self.row)
            except IndexError as fault:
                yield f"edges[{number}]", str(fault)
                continue
            if key > query:
                yield f"edges[{number}]", f"position {query} does not attend to {key}, which comes after it"

    def condition(self, when: Condition) -> Found:
        yield from _finite("threshold", when.threshold)
        info, point = self.sites.get(when.hook_point.site), when.hook_point
        if info is None or (point.site.in_block and point.layer not in info.layers):
            yield "hook_point", f"this model has no {point}"
            return
        geometry = Geometry.of(info)
        if geometry.grouped or point.site is Site.LOGITS:
            yield "hook_point", f"a condition reads a site with one row for each token, which {point} is not"
            return
        yield from self.vectors("direction", when.direction, geometry.width)
        edits = expanded(self.intervention.op, self.sites)
        for edited in (point for op in edits for point in hook_points(op)):
            if not known_before(point, edited):
                yield "hook_point", f"{point} is not known before the edit of {edited}"
                return

    def vectors(
        self, field: str, given: Vectors, width: int, target: Target | None = None, *, stack: bool = False,
        zero: bool = False,
    ) -> Found:  # fmt: skip
        """One vector, or a `stack`; `zero` tells whether it may be zero."""
        if not isinstance(given, torch.Tensor):
            return
        fits = fitted(given, target or Target(()), width) if given.ndim in (1, 2) else None
        if fits is None:
            yield field, f"must be {width} wide, as the site's last axis is; its shape is {list(given.shape)}"
        elif given.ndim == 2 and given.shape[0] != 1 and not stack:
            yield field, f"one vector is needed, there are {given.shape[0]}"
        elif not bool(torch.isfinite(fits).all()):
            yield field, "all values must be finite"
        elif not zero and not bool(fits.any(-1).all()):
            yield field, "must not be zero"


def _finite(field: str, value: float) -> Found:
    if not abs(value) <= torch.finfo(torch.float32).max:
        yield field, "must be finite in float32"


def _bounds(op: Clamp) -> Found:
    for field, bound in (("min", op.low), ("max", op.high)):
        if bound is not None:
            yield from _finite(field, bound)
    if op.low is None and op.high is None:
        yield "min", "at least one bound is needed"
    elif op.low is not None and op.high is not None and op.low > op.high:
        yield "min", f"must not be above the upper bound: {op.low} > {op.high}"


def _indices(field: str, given: Sequence[int], count: int, what: str) -> Found:
    named: set[int] = set()
    for number, index in enumerate(given):
        if not 0 <= index < count:
            yield f"{field}[{number}]", f"there is no {what} {index}: 0 .. {count - 1}"
        elif index in named:
            yield f"{field}[{number}]", f"{what} {index} is named twice"
        named.add(index)
