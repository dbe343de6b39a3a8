"""Interventions as their definitions say it: one run, one row at a time, in plain loops over plain tensors.

`Naive` edits the values of one run alone in its batch, position by position and head by head, and counts what it did.
Nothing of the package computes here; only the names of the operations are used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.ops import (
    Ablate,
    Add,
    Captured,
    Clamp,
    Comparison,
    Inline,
    Knockout,
    Mean,
    Op,
    Replace,
    RowEdits,
    Scale,
    SetCoordinate,
    Unit,
    Zero,
)


@dataclass
class Counts:
    """What one intervention did."""

    selected: int = 0
    fired: int = 0
    changed: int = 0
    clipped: int = 0
    deltas: list[float] = field(default_factory=list)
    # Rounding may decide: a coordinate lies on a bound, or the change is no larger than an error.
    close: bool = False


class Naive:
    """The edits of one run. Rows are [pos, group, width] whatever the site."""

    def __init__(self, row: RowEdits) -> None:
        self.row = row
        self.met: dict[int, list[bool]] = {}
        self.counts = defaultdict[int, Counts](Counts)

    def points(self) -> set[HookPoint]:
        return {point for intervention in self.row.interventions for point in _points(intervention.op)}

    def condition_points(self) -> set[HookPoint]:
        return {edit.when.hook_point for edit in self.row.interventions if edit.when is not None}

    def observe(self, point: HookPoint, value: torch.Tensor) -> None:
        """Takes the value [1, pos, width] of a site, before any edit there."""
        for index, intervention in enumerate(self.row.interventions):
            when = intervention.when
            if when is not None and when.hook_point == point:
                unit = _unit(_vector(when.direction, value))
                projections = [float(row @ unit) for row in value[0]]
                greater = when.comparison is Comparison.GREATER
                self.met[index] = [p > when.threshold if greater else p < when.threshold for p in projections]

    def edit(self, point: HookPoint) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(value: torch.Tensor) -> torch.Tensor:
            if point in self.condition_points():
                self.observe(point, value)
            return _value(point.site, self.rows(point, _rows(point.site, value)), value)

        return run

    def rows(self, point: HookPoint, given: torch.Tensor) -> torch.Tensor:
        """The rows of a site after all interventions there, in their order."""
        h = given.clone()
        moved: list[tuple[int, int]] = []
        for index, intervention in enumerate(self.row.interventions):
            op = intervention.op
            if point not in _points(op):
                continue
            before, counts = h.clone(), self.counts[index]
            positions = intervention.positions.resolve(
                self.row.prompt_length, self.row.max_length - self.row.prompt_length
            )
            selected = [p for p in dict.fromkeys(positions) if p < len(h) and self._has_source(op, point, p)]
            if isinstance(op, Knockout):
                queries = {_from_start(query, self.row) for query, _ in op.edges}
                selected = [p for p in selected if p in queries]
            fired = [p for p in selected if index not in self.met or self.met[index][p]]
            heads = _heads(op, h)
            for p in fired:
                clipped = [self._apply(index, point, h, before, p, g, positions) for g in heads]
                counts.clipped += any(clipped)
                norm = float(_finite(given[p, heads]).norm())
                delta = float(_finite(torch.where(h[p] != before[p], h[p] - before[p], 0.0)).norm())
                if isinstance(op, Knockout):
                    delta = float(_finite(torch.where(h[p] != before[p], before[p], 0.0)).norm())
                counts.close |= 0 < delta < 1e-9
                counts.deltas.append(delta / norm if norm else float(delta > 0))
                if not torch.equal(h[p], before[p]):
                    moved.append((index, p))
            counts.selected += len(selected)
            counts.fired += len(fired)
        for index, p in moved:
            self.counts[index].changed += not torch.equal(h[p], given[p])
        return h

    def _has_source(self, op: Op, point: HookPoint, position: int) -> bool:
        """Generated positions that another run does not reach are left alone."""
        if not isinstance(op, Replace) or op.source_positions is not None or not isinstance(op.source, Captured):
            return True
        return position < op.source.values[point].shape[point.site.position_axis]

    def _apply(
        self, index: int, point: HookPoint, h: torch.Tensor, before: torch.Tensor, p: int, g: int,
        positions: tuple[int, ...],
    ) -> bool:  # fmt: skip
        """Changes one row in place; tells whether a bound or cap was met."""
        op = self.row.interventions[index].op
        row = h[p, g]  # [width], a view
        neurons = list(op.target.neurons) if not isinstance(op, Knockout) and op.target.neurons else None  # type: ignore[union-attr]
        some = slice(None) if neurons is None else neurons
        clipped = False
        match op:
            case Add():
                v = _restricted(_vector(op.vector, row), neurons)
                norm = row.norm()
                strength: torch.Tensor | float = op.strength
                if op.unit is not Unit.ABSOLUTE:
                    v = _unit(v)
                if op.unit is Unit.NORM_FRACTION:
                    clipped = op.cap is not None and float(norm) > op.cap
                    strength = op.strength * (norm if op.cap is None else norm.clamp(max=op.cap))
                row += strength * v
                if op.keep_norm and float(row.norm()):
                    row *= norm / row.norm()
            case Ablate():
                assert isinstance(op.directions, torch.Tensor)
                d = torch.stack([_restricted(v.to(row.dtype), neurons) for v in op.directions.reshape(-1, len(row))])
                row -= d.T @ torch.linalg.lstsq(d.T, row[:, None], driver="gelsd").solution[:, 0]
            case SetCoordinate():
                u = _unit(_restricted(_vector(op.direction, row), neurons))
                row += (op.value - row @ u) * u
            case Scale():
                u = _unit(_restricted(_vector(op.direction, row), neurons))
                row += (op.factor - 1) * (row @ u) * u
            case Clamp():
                u = _unit(_restricted(_vector(op.direction, row), neurons))
                z = float(row @ u)
                low = float("-inf") if op.low is None else op.low
                high = float("inf") if op.high is None else op.high
                clipped = not low <= z <= high
                self.counts[index].close |= min(abs(z - low), abs(z - high)) < 1e-9
                if clipped:
                    row += (min(max(z, low), high) - z) * u
            case Zero():
                row[some] = torch.where(self._forbidden(point, row, p)[some], row[some], 0.0)
            case Mean(mean=None):
                prompt = [q for q in dict.fromkeys(positions) if q < self.row.prompt_length]
                row[some] = before[prompt, g].mean(0)[some]
            case Mean():
                assert isinstance(op.mean, torch.Tensor)
                mean = op.mean if op.mean.ndim == 1 or len(op.mean) == 1 else op.mean[_heads(op, h).index(g)]
                row[some] = mean.reshape(-1).to(row.dtype)[some]
            case Replace():
                new = self._source(op, point, p, g, positions, _heads(op, h)).to(row.dtype)
                new = torch.cat([new, new.new_zeros(max(len(row) - len(new), 0))])[: len(row)]
                new = new if neurons is None or isinstance(op.source, Inline) else new[neurons]
                row[some] = torch.where(self._forbidden(point, row, p)[some], row[some], new[: row[some].shape[0]])
            case Knockout():
                for query, key in op.edges:
                    if _from_start(query, self.row) == p:
                        row[_from_start(key, self.row)] = float("-inf")
            case _:
                raise NotImplementedError(op)
        return clipped

    def _forbidden(self, point: HookPoint, row: torch.Tensor, p: int) -> torch.Tensor:
        """Keys that a query may not attend to, in rows over keys."""
        if not point.site.position_axis:
            return torch.zeros_like(row, dtype=torch.bool)
        return row.isneginf() | (torch.arange(len(row)) > p)

    def _source(
        self, op: Replace, point: HookPoint, p: int, g: int, positions: tuple[int, ...], heads: list[int]
    ) -> torch.Tensor:
        """The row that goes to a position and head."""
        if isinstance(op.source, Inline):
            rows = _rows(point.site, op.source.rows[None])
            number = positions.index(p)
            group = heads.index(g)
        else:
            assert isinstance(op.source, Captured)
            rows = _rows(point.site, op.source.values[point][None])
            number, group = p, g
        if op.source_positions is not None:
            number = op.source_positions.resolve(len(rows))[positions.index(p)]
        return rows[number, group]


def _points(op: Op) -> tuple[HookPoint, ...]:
    if isinstance(op, Knockout):
        return (HookPoint(Site.ATTN_SCORES, op.layer),)
    return op.target.hook_points  # type: ignore[union-attr]


def _heads(op: Op, h: torch.Tensor) -> list[int]:
    named = op.heads if isinstance(op, Knockout) else op.target.heads  # type: ignore[union-attr]
    return list(named) or list(range(h.shape[1]))


def _rows(site: Site, value: torch.Tensor) -> torch.Tensor:
    """A value [1, *axes] as [pos, group, width]."""
    if site.position_axis:
        return value[0].transpose(0, 1)
    return value[0] if value.ndim == 4 else value[0].unsqueeze(1)


def _value(site: Site, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (rows.transpose(0, 1) if site.position_axis else rows).reshape(like.shape)


def _finite(rows: torch.Tensor) -> torch.Tensor:
    return torch.where(rows.isinf(), 0.0, rows)


def _from_start(position: int, row: RowEdits) -> int:
    return position + row.prompt_length if position < 0 else position


def _vector(given: object, like: torch.Tensor) -> torch.Tensor:
    assert isinstance(given, torch.Tensor)
    return given.reshape(-1).to(like.dtype)


def _restricted(vector: torch.Tensor, neurons: list[int] | None) -> torch.Tensor:
    return vector if neurons is None else torch.zeros_like(vector).index_copy(0, torch.tensor(neurons), vector[neurons])


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()
