"""Compiling: the edits of one run as parts, the actions at each site in the order of application.

Everything here is on the CPU and knows of one run only; `plan` lays the parts of many runs into the tables of a batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.interventions.actions import (
    Action,
    Cut,
    Gate,
    Overwrite,
    Part,
    ReadCondition,
    Shift,
    Update,
)
from patchclamp_server.interventions.expansion import Sites, expanded, hook_points
from patchclamp_server.interventions.geometry import Geometry, fitted
from patchclamp_server.interventions.ops import (
    Ablate,
    Add,
    Captured,
    Clamp,
    Inline,
    Intervention,
    Knockout,
    Mean,
    Replace,
    RowEdits,
    Scale,
    SetCoordinate,
    SiteOp,
    Target,
    Unit,
    Vectors,
    Zero,
)
from patchclamp_server.interventions.problems import InvalidInterventions, Problem, absolute, selected


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The compiled edits of one run."""

    edits: RowEdits
    parts: Mapping[HookPoint, tuple[Part, ...]]
    conditions: tuple[ReadCondition, ...]

    def rows_selected(self, intervention: int, length: int | None = None) -> int:
        """Rows that an intervention selects in a run of some length, the longest possible if None."""
        gates = (p.gate for parts in self.parts.values() for p in parts if p.intervention == intervention and p.lead)
        return sum(int(gate.positions[:length].sum()) for gate in gates)

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether the prompt has to pass in one forward, as its mean is taken."""
        actions = (part.action for parts in self.parts.values() for part in parts)
        return any(isinstance(action, Overwrite) and action.pool is not None for action in actions)

    @property
    def never_fired(self) -> tuple[int, ...]:
        """Interventions that select nothing although they have to: empty by their own terms, before anything runs.

        Those that only select positions which the run, stopping early, does not come to generate are not among them.
        """
        return tuple(
            index
            for index, intervention in enumerate(self.edits.interventions)
            if not intervention.allow_never_fired and not self.rows_selected(index)
        )


def compile_row(edits: RowEdits, sites: Sites) -> RowPlan:
    """Compiles valid and resolved edits. Raises InvalidInterventions where a captured source has too few rows."""
    parts: dict[HookPoint, list[Part]] = defaultdict(list)
    conditions: list[ReadCondition] = []
    for index, intervention in enumerate(edits.interventions):
        if intervention.when is not None:
            when = intervention.when
            unit = _unit(_tensor(when.direction).reshape(-1))
            conditions.append(ReadCondition(when.hook_point, unit, when.comparison, when.threshold))
        condition = len(conditions) - 1 if intervention.when is not None else None
        for op in expanded(intervention.op, sites):
            for point in hook_points(op):
                one = _Compiler(index, intervention, edits, Geometry.of(sites[point.site]), condition)
                parts[point] += one.parts(op, point)
    return RowPlan(edits, {point: tuple(found) for point, found in parts.items()}, tuple(conditions))


@dataclass(frozen=True, eq=False)
class _Compiler:
    """Compiles one intervention at one site."""

    index: int
    intervention: Intervention
    row: RowEdits
    geometry: Geometry
    condition: int | None

    def parts(self, op: SiteOp, point: HookPoint) -> Iterator[Part]:
        positions = selected(self.intervention, self.row)
        heads = op.heads if isinstance(op, Knockout) else op.target.heads
        match op:
            case Knockout():
                cut = self.cut(op, positions)
                gate = Gate(cut.queries.any(0), heads, self.condition)
                yield Part(self.index, gate, cut)
            case Replace():
                rows, index = self.replacement(op, point, positions)
                gate = Gate(index > 0, heads, self.condition)
                yield Part(self.index, gate, Overwrite(rows, index, neurons=op.target.neurons))
            case _:
                gate = Gate(self.mask(positions), heads, self.condition)
                for number, action in enumerate(self.actions(op, positions)):
                    yield Part(self.index, gate, action, lead=number == 0)

    def actions(
        self, op: Add | Ablate | SetCoordinate | Clamp | Scale | Zero | Mean, positions: tuple[int, ...]
    ) -> Iterator[Action]:
        match op:
            case Add():
                yield self.addition(op)
            case Ablate():
                for u in _basis(self.fitted(op.directions, op.target).reshape(-1, self.geometry.width)):
                    yield Update(u, u, beta=1.0)
            case SetCoordinate():
                u = self.direction(op.direction, op.target)
                yield Update(u, u, c=op.value, beta=1.0)
            case Scale():
                u = self.direction(op.direction, op.target)
                yield Update(u, u, alpha=op.factor, beta=1.0)
            case Clamp(low=low, high=high):
                u = self.direction(op.direction, op.target)
                bounds = (-math.inf if low is None else low, math.inf if high is None else high)
                yield Update(u, u, alpha=1.0, beta=1.0, low=bounds[0], high=bounds[1])
            case Zero():
                yield Overwrite(self.no_rows(), self.everywhere(0), neurons=op.target.neurons)
            case Mean(target, None):
                pool = self.mask(p for p in positions if p < self.row.prompt_length)
                yield Overwrite(self.no_rows(), self.everywhere(0), pool, target.neurons)
            case Mean():
                assert op.mean is not None
                rows = self.placed(self.fitted(op.mean, op.target).reshape(1, -1, self.geometry.width), op.target)
                yield Overwrite(rows, self.everywhere(1), neurons=op.target.neurons)

    def addition(self, op: Add) -> Update | Shift:
        vector = self.fitted(op.vector, op.target).reshape(-1)
        b = vector if op.unit is Unit.ABSOLUTE else _unit(vector)
        relative = op.unit is Unit.NORM_FRACTION
        if relative or op.keep_norm:
            return Shift(b, op.strength, relative, math.inf if op.cap is None else op.cap, op.keep_norm)
        return Update(b, c=op.strength)

    def replacement(
        self, op: Replace, point: HookPoint, positions: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [n, groups, width] and which of them goes to each position."""
        given = self.source_rows(op, point)  # [rows, groups of the target or all, width of the target or all]
        if op.source_positions is not None:
            rows = self.resolve_source(op, given.shape[0])
        elif isinstance(op.source, Inline):
            rows = tuple(range(given.shape[0]))
        else:
            missing = next((p for p in positions if given.shape[0] <= p < self.row.prompt_length), None)
            if missing is not None:
                raise self.refused(op, "positions", f"the source has {given.shape[0]} rows, none at {missing}")
            # Generated rows that the other run does not have stay as they are.
            positions = rows = tuple(p for p in positions if p < given.shape[0])
        if len(rows) != len(positions):
            text = f"{len(rows)} rows of the source for {len(positions)} selected positions"
            raise self.refused(op, "source_positions", text)
        index = self.everywhere(0)
        index[list(positions)] = torch.arange(1, len(positions) + 1)
        chosen = given[torch.tensor(rows, dtype=torch.long, device=given.device)]
        return self.placed(chosen, op.target), index

    def source_rows(self, op: Replace, point: HookPoint) -> torch.Tensor:
        if isinstance(op.source, Inline):
            value = op.source.rows
        else:
            assert isinstance(op.source, Captured), "sources are resolved before they are compiled"
            value = op.source.values[point]
        rows = self.geometry.rows(value.unsqueeze(0))[0]
        if isinstance(op.source, Captured):
            rows = rows[:, list(op.target.heads)] if op.target.heads else rows
            rows = rows[..., list(op.target.neurons)] if op.target.neurons else rows
        return rows

    def resolve_source(self, op: Replace, rows: int) -> tuple[int, ...]:
        assert op.source_positions is not None
        try:
            return op.source_positions.resolve(rows)
        except IndexError as fault:
            raise self.refused(op, "source_positions", str(fault)) from None

    def placed(self, rows: torch.Tensor, target: Target) -> torch.Tensor:
        """Rows of the target [n, target groups or 1, target width or width] as [n, groups, width]."""
        width = rows.shape[-1] if self.geometry.of_keys else self.geometry.width
        wide = fitted(rows, target, width)
        assert wide is not None
        full = wide.new_zeros(wide.shape[0], self.geometry.groups, width)
        full[:, list(target.heads) if target.heads else slice(None)] = wide
        return full

    def cut(self, op: Knockout, positions: tuple[int, ...]) -> Cut:
        """The edges, with queries that lose the same keys in one term."""
        allowed, keys_of = set(positions), defaultdict(set)
        for query, key in (absolute(edge, self.row) for edge in op.edges):
            if query in allowed:
                keys_of[query].add(key)
        queries_of: dict[frozenset[int], list[int]] = defaultdict(list)
        for query, keys in keys_of.items():
            queries_of[frozenset(keys)].append(query)
        none = torch.zeros(0, self.row.max_length, dtype=torch.bool)
        return Cut(
            torch.stack([self.mask(queries) for queries in queries_of.values()]) if queries_of else none,
            torch.stack([self.mask(keys) for keys in queries_of]) if queries_of else none,
        )

    def fitted(self, vectors: Vectors, target: Target) -> torch.Tensor:
        fits = fitted(_tensor(vectors), target, self.geometry.width)
        assert fits is not None, "edits are validated before they are compiled"
        return fits

    def direction(self, vectors: Vectors, target: Target) -> torch.Tensor:
        return _unit(self.fitted(vectors, target).reshape(-1))

    def no_rows(self) -> torch.Tensor:
        return torch.zeros(0, self.geometry.groups, self.geometry.width)

    def mask(self, positions: Iterator[int] | tuple[int, ...] | list[int] | frozenset[int]) -> torch.Tensor:
        mask = torch.zeros(self.row.max_length, dtype=torch.bool)
        mask[list(positions)] = True
        return mask

    def everywhere(self, index: int) -> torch.Tensor:
        return torch.full((self.row.max_length,), index, dtype=torch.long)

    def refused(self, op: Replace, field: str, text: str) -> InvalidInterventions:
        path = field if field == "positions" else f"{op.arm}.{field}"
        return InvalidInterventions([Problem(self.index, path, text)])


def _tensor(vectors: Vectors) -> torch.Tensor:
    assert isinstance(vectors, torch.Tensor), "vectors are resolved before they are compiled"
    return vectors


def _unit(vector: torch.Tensor) -> torch.Tensor:
    """The vector at unit length, in float64."""
    wide = vector.double()
    # In two steps: the square of a tiny number is zero.
    wide = wide / wide.abs().max()
    return wide / wide.norm()


def _basis(directions: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis [rank, width] of the span of directions [n, width]."""
    units = torch.stack([_unit(direction) for direction in directions])
    if len(units) == 1:
        return units
    _, sizes, basis = torch.linalg.svd(units, full_matrices=False)
    # What float32 directions differ by in their last bits is no dimension of its own.
    return basis[sizes > 1e-6 * sizes[0]]
