"""Interventions of a request as operations, checked against the model and the runs of the request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from patchclamp.v1 import hook_point_pb2, intervention_pb2, vector_pb2
from patchclamp_server.adapters.facts import ModelFacts
from patchclamp_server.errors import NotServed, TooLarge
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.ops import (
    Ablate,
    AblateEverywhere,
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
    SetCoordinate,
    UnembedRow,
    Unit,
    Vectors,
    Zero,
)
from patchclamp_server.interventions.problems import Problem
from patchclamp_server.interventions.validation import validate
from patchclamp_server.positions import Positions
from patchclamp_server.service.selection import Extent, are_indices, parse_heads, parse_positions
from patchclamp_server.service.sites import parse_site
from patchclamp_server.service.sources import Selected, SourceParser
from patchclamp_server.service.targets import NOWHERE, Aim, parse_target
from patchclamp_server.service.vectors import VectorParser
from patchclamp_server.service.violations import Violations

MOST_DIRECTIONS = 256
# Each is looked at once for every head.
MOST_EDGES = 65_536
_UNITS: dict[int, Unit] = {
    int(intervention_pb2.STRENGTH_UNIT_UNSPECIFIED): Unit.ABSOLUTE,
    int(intervention_pb2.STRENGTH_UNIT_ABSOLUTE): Unit.ABSOLUTE,
    int(intervention_pb2.STRENGTH_UNIT_DIRECTION): Unit.DIRECTION,
    int(intervention_pb2.STRENGTH_UNIT_NORM_FRACTION): Unit.NORM_FRACTION,
}
_COMPARISONS: dict[int, Comparison] = {
    int(intervention_pb2.COMPARISON_GREATER): Comparison.GREATER,
    int(intervention_pb2.COMPARISON_LESS): Comparison.LESS,
}
# Stand for what is invalid, and noted, so that the rest of an edit can be looked at: a vector that nothing is wrong
# with, positions that overlap with none.
_ANY_VECTOR = UnembedRow(0)
_NO_POSITIONS = Positions(())


class InterventionParser:
    """Turns the interventions of one request's runs into operations; notes what is wrong with them.

    `extents` are those of all runs of the request, None where the prompt is invalid. `alone`: it is a generation, which
    has no runs to take from.
    """

    def __init__(
        self, facts: ModelFacts, extents: Sequence[Extent | None], found: Violations, *, alone: bool = False
    ) -> None:
        self._facts = facts
        self._extents = extents
        self._found = found
        self._vectors = VectorParser(facts.dims.d_model, facts.dims.d_vocab, found)
        lengths = [None if extent is None else extent.length for extent in extents]
        self._sources = SourceParser(facts, lengths, found, alone=alone)

    def parse(self, wires: Sequence[intervention_pb2.Intervention], path: str, run: int) -> tuple[Intervention, ...]:
        """The edits of one run, for use only if nothing was noted."""
        extent = self._extents[run]
        edges = sum(len(wire.knockout.edges) for wire in wires)
        if edges > MOST_EDGES:
            raise TooLarge("attention edges of one run's knockouts", limit=MOST_EDGES, demand=edges)
        ops = [self._intervention(wire, f"{path}[{index}]", run) for index, wire in enumerate(wires)]
        if extent is not None:
            problems = validate(RowEdits(tuple(ops), extent.prompt, extent.length), self._facts.site_info)
            for problem in problems:
                self._note(problem, f"{path}[{problem.index}]", wires[problem.index])
        return tuple(ops)

    def refuse_cycles(self) -> None:
        """Notes runs that would wait for themselves; asked once all are parsed."""
        self._sources.refuse_cycles()

    def _note(self, problem: Problem, path: str, wire: intervention_pb2.Intervention) -> None:
        """Notes a problem that only the edits as a whole show; one that is noted in more detail is not told twice."""
        part, _, rest = problem.field.partition(".")
        ours = part in (wire.WhichOneof("op"), "positions", "when")
        field = f"{path}.{part}.target" if rest.startswith("target.") else f"{path}.{problem.field}"
        if ours and not self._found.names(field):
            self._found.add(f"{path}.{problem.field}", problem.text)

    def _intervention(self, wire: intervention_pb2.Intervention, path: str, run: int) -> Intervention:
        self._check_numbers(wire, path)
        positions, selected = self._positions(wire.positions, f"{path}.positions", self._extents[run])
        op = self._op(wire, path, run, selected)
        when = self._condition(wire.when, f"{path}.when") if wire.HasField("when") else None
        return Intervention(op or Zero(NOWHERE), positions, when, wire.allow_never_fired)

    def _check_numbers(self, message: Message, path: str) -> None:
        """Every number of an edit, however deep, fits into float32."""
        for field, value in message.ListFields():
            where = f"{path}.{field.name}"
            if field.type == FieldDescriptor.TYPE_DOUBLE:
                if not abs(value) <= torch.finfo(torch.float32).max:
                    self._found.add(where, f"must be finite in float32, not {value}")
            elif field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
                self._check_numbers(value, where)

    def _positions(
        self, wire: hook_point_pb2.Positions, path: str, extent: Extent | None
    ) -> tuple[Positions, Selected]:
        """The positions selected; none at all is not invalid, such a run fails alone if it may not."""
        found = None if extent is None else parse_positions(wire, path, extent, self._found, empty=True)
        if extent is None or found is None:
            return _NO_POSITIONS, None
        return found.positions, found.positions.resolve(extent.prompt, extent.generated)

    def _op(self, wire: intervention_pb2.Intervention, path: str, run: int, selected: Selected) -> Op | None:
        """The operation; None when it has no use any more."""
        arm = wire.WhichOneof("op")
        path = f"{path}.{arm}"
        match arm:
            case None:
                self._found.add(path.removesuffix(".None"), "an intervention needs an op: set exactly one")
                return None
            case "add":
                return self._add(wire.add, path)
            case "ablate":
                aim = self._aim(wire.ablate.target, path)
                return Ablate(aim.target, self._directions(wire.ablate.directions, path, aim))
            case "ablate_everywhere":
                return self._everywhere(wire.ablate_everywhere, path)
            case "set_coordinate":
                aim = self._aim(wire.set_coordinate.target, path)
                direction = self._direction(wire.set_coordinate.direction, path, aim)
                return SetCoordinate(aim.target, direction, wire.set_coordinate.value)
            case "clamp":
                return self._clamp(wire.clamp, path)
            case "scale":
                aim = self._aim(wire.scale.target, path)
                return Scale(aim.target, self._direction(wire.scale.direction, path, aim), wire.scale.factor)
            case "zero":
                return Zero(self._aim(wire.zero.target, path).target)
            case "mean":
                aim = self._aim(wire.mean.target, path)
                given = wire.mean.HasField("mean")
                return Mean(aim.target, self._vector(wire.mean.mean, f"{path}.mean", aim) if given else None)
            case "resample":
                aim = self._aim(wire.resample.target, path)
                return self._sources.resample(wire.resample, path, run, aim, selected)
            case "knockout":
                return self._knockout(wire.knockout, path)
            case "patch":
                aim = self._aim(wire.patch.target, path)
                return self._sources.patch(wire.patch, path, run, aim, selected)
            case "freeze":
                return self._sources.freeze(wire.freeze, path, run)
            case _:
                raise NotServed(f"interventions.{arm}")

    def _aim(self, wire: intervention_pb2.Target, path: str) -> Aim:
        return parse_target(wire, f"{path}.target", self._facts, self._found)

    def _vector(self, wire: vector_pb2.VectorSource, path: str, aim: Aim) -> Vectors:
        """Rows as wide as the target, or as its site."""
        if not aim.width:
            return _ANY_VECTOR
        rows = self._vectors.parse(wire, path, aim.width, aim.neurons)
        return _ANY_VECTOR if rows is None else rows

    def _direction(self, wire: vector_pb2.VectorSource, path: str, aim: Aim) -> Vectors:
        return self._vector(wire, f"{path}.direction", aim)

    def _directions(self, wire: vector_pb2.VectorSource, path: str, aim: Aim) -> Vectors:
        rows = self._vector(wire, f"{path}.directions", aim)
        if isinstance(rows, torch.Tensor) and len(rows) > MOST_DIRECTIONS:
            self._found.add(f"{path}.directions", f"at most {MOST_DIRECTIONS} directions, there are {len(rows)}")
            return _ANY_VECTOR
        return rows

    def _add(self, wire: intervention_pb2.AddEdit, path: str) -> Add | None:
        aim = self._aim(wire.target, path)
        vector = self._vector(wire.vector, f"{path}.vector", aim)
        unit = _UNITS.get(wire.unit)
        if unit is None:
            self._found.add(f"{path}.unit", f"{wire.unit} is not a unit: ABSOLUTE, DIRECTION or NORM_FRACTION")
            return None
        strength = wire.strength if wire.HasField("strength") else 1.0
        cap = wire.cap if wire.HasField("cap") else None
        return Add(aim.target, vector, strength, unit, cap, wire.keep_norm)

    def _everywhere(self, wire: intervention_pb2.AblateEverywhereEdit, path: str) -> AblateEverywhere:
        stream = Aim(self._facts.site_info[Site.EMBED], NOWHERE, neurons=0)
        return AblateEverywhere(self._directions(wire.directions, path, stream))

    def _clamp(self, wire: intervention_pb2.ClampEdit, path: str) -> Clamp:
        aim = self._aim(wire.target, path)
        low = wire.min if wire.HasField("min") else None
        high = wire.max if wire.HasField("max") else None
        return Clamp(aim.target, self._direction(wire.direction, path, aim), low, high)

    def _knockout(self, wire: intervention_pb2.KnockoutEdit, path: str) -> Knockout | None:
        scores = self._facts.site_info.get(Site.ATTN_SCORES)
        if scores is None or not scores.writable:
            reason = "has none" if scores is None else f"lets none be written: {scores.read_only_reason}"
            self._found.add(path, f"attention scores are masked, and this model {reason}")
            return None
        point = hook_point_pb2.HookPoint(site=hook_point_pb2.SITE_ATTN_SCORES, layer=wire.layer)
        known = parse_site(point, path, self._facts, self._found) is not None
        valid = are_indices(wire.heads, f"{path}.heads", scores.axis("head"), "head", self._found)
        if not (known and valid):
            return None
        return Knockout(wire.layer, tuple((edge.query, edge.key) for edge in wire.edges), tuple(wire.heads))

    def _condition(self, wire: intervention_pb2.Condition, path: str) -> Condition | None:
        comparison = _COMPARISONS.get(wire.comparison)
        if comparison is None:
            self._found.add(f"{path}.comparison", "must be GREATER or LESS")
        site = parse_site(wire.hook_point, f"{path}.hook_point", self._facts, self._found)
        if site is None:
            return None
        info, layers = site
        parse_heads((), wire.hook_point, path, info, self._found)
        if len(layers) > 1:
            text = f"a condition reads one layer: one of {', '.join(map(str, layers))} is needed"
            self._found.add(f"{path}.hook_point.layer", text)
        direction = self._direction(wire.direction, path, Aim(info, NOWHERE, neurons=0))
        if comparison is None or len(layers) > 1:
            return None
        return Condition(HookPoint(info.site, layers[0]), direction, comparison, wire.threshold)
