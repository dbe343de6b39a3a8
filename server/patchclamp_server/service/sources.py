"""Sources: values that edits take from other runs of the request, or that it brings along.

Runs are named by their index in the request. What they may take depends on how long the others are, so edits are looked
at when every prompt of the request is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter

import torch

from patchclamp.v1 import intervention_pb2, tensor_pb2
from patchclamp_server.adapters.facts import ModelFacts
from patchclamp_server.errors import NotServed
from patchclamp_server.hookpoints import HookPoint, SiteInfo
from patchclamp_server.interventions.expansion import expanded, hook_points
from patchclamp_server.interventions.ops import Freeze, FromRun, Inline, Replace
from patchclamp_server.interventions.sources import drawn
from patchclamp_server.positions import Positions
from patchclamp_server.service.inline import parse_inline
from patchclamp_server.service.selection import Extent, head_axis, parse_positions
from patchclamp_server.service.targets import NOWHERE, Aim
from patchclamp_server.service.tensors import INLINE_BYTES
from patchclamp_server.service.violations import Violations

Selected = tuple[int, ...] | None
"""The positions that an edit selects; None where they are invalid."""

_HELD = {
    "attention": Freeze(FromRun(0), attention=True),
    "norms": Freeze(FromRun(0), norms=True),
    "mlps": Freeze(FromRun(0), mlps=True),
}
_ALONE = {
    "patch": "a generation is one run: there is no other run to take values from, give them as a tensor instead",
    "resample": "a generation is one run: there is no other run to draw values from",
    "freeze": "a generation is one run: there is no other run to hold these parts to",
}


class SourceParser:
    """Turns what edits replace rows by into operations; notes what is wrong, and which run takes from which.

    `lengths` are those of all runs of the request, None where the prompt is invalid. `alone`: it is a generation, which
    has no runs to take from.
    """

    def __init__(
        self, facts: ModelFacts, lengths: Sequence[int | None], found: Violations, *, alone: bool = False
    ) -> None:
        self._alone = alone
        self._facts = facts
        self._lengths = lengths
        self._found = found
        self._takes: dict[tuple[int, int], str] = {}

    def patch(
        self, wire: intervention_pb2.PatchEdit, path: str, run: int, aim: Aim, selected: Selected
    ) -> Replace | None:
        """Rows of another run or of a tensor; None when invalid."""
        match wire.WhichOneof("source"):
            case None:
                self._found.add(path, f"a source is needed: set {'' if self._alone else 'source_run or '}tensor")
                return None
            case "handle":
                raise NotServed("interventions.patch.handle")
            case "tensor":
                return self._inline(wire, path, run, aim, selected)
            case _:
                return self._from_run(wire, path, run, aim, selected)

    def _from_run(
        self, wire: intervention_pb2.PatchEdit, path: str, run: int, aim: Aim, selected: Selected
    ) -> Replace | None:
        where = f"{path}.source_run"
        if self._refused_alone("patch", where) or not self._known(wire.source_run, where, run):
            return None
        source = FromRun(wire.source_run)
        length = self._lengths[source.run]
        if aim.info is not None and _over_keys(aim.info):
            self._as_long(source, where, run)
        if not wire.HasField("source_positions"):
            self._reaches(source, f"{path}.source_positions", selected)
            return Replace(aim.target, source)
        if length is None:
            return None
        rows = self._rows(wire, path, length, selected)
        return None if rows is None else Replace(aim.target, source, rows)

    def _rows(self, wire: intervention_pb2.PatchEdit, path: str, length: int, selected: Selected) -> Positions | None:
        """Rows of a source that has `length` of them, as many as are replaced."""
        path = f"{path}.source_positions"
        rows = parse_positions(wire.source_positions, path, Extent(length), self._found, empty=True)
        if rows is None or selected is None:
            return None
        if rows.rows != len(selected):
            self._found.add(path, f"as many rows as are replaced are needed: {len(selected)}, not {rows.rows}")
            return None
        return rows.positions

    def _inline(
        self, wire: intervention_pb2.PatchEdit, path: str, run: int, aim: Aim, selected: Selected
    ) -> Replace | None:
        shape, chooses = list(wire.tensor.shape), wire.HasField("source_positions")
        if aim.info is None or aim.target is NOWHERE or selected is None:
            self._brought(wire.tensor, f"{path}.tensor", shape_fault="")
            return None
        axis = aim.info.site.position_axis
        # Where rows are chosen of those brought along, any number may come.
        brought = shape[axis] if chooses and len(shape) > axis and shape[axis] > 0 else len(selected)
        rows = self._brought(wire.tensor, f"{path}.tensor", self._shape_fault(shape, aim, brought, run))
        if rows is None or not chooses:
            return None if rows is None else Replace(aim.target, Inline(rows))
        positions = self._rows(wire, path, brought, selected)
        return None if positions is None else Replace(aim.target, Inline(rows), positions)

    def _shape_fault(self, shape: list[int], aim: Aim, rows: int, run: int) -> str:
        assert aim.info is not None
        sizes = {"pos": rows, "query": rows, "key": self._lengths[run] or 0}
        axis = head_axis(aim.info)
        if axis is not None and aim.target.heads:
            sizes[axis] = len(aim.target.heads)
        names = [name for name, _ in aim.info.axes]
        wanted = [sizes.get(name, size) for name, size in aim.info.axes]
        wanted[-1] = aim.neurons or wanted[-1]
        if shape == wanted:
            return ""
        return f"must be {wanted}, [{', '.join(names)}] as they are selected; it is {shape[:8]}"

    def _brought(self, wire: tensor_pb2.Tensor, path: str, shape_fault: str) -> torch.Tensor | None:
        if len(wire.inline) > INLINE_BYTES:
            instead = "" if self._alone else ": patch from another run instead"
            self._found.add(f"{path}.inline", f"at most {INLINE_BYTES} bytes, there are {len(wire.inline)}{instead}")
            return None
        tensor = parse_inline(wire, path, shape_fault, self._found)
        if tensor is None:
            return None
        rows = tensor.float()
        if not bool(torch.isfinite(rows).all()):
            self._found.add(path, "all values must be finite in float32: there are NaN or infinite ones")
            return None
        return rows

    def resample(
        self, wire: intervention_pb2.ResampleEdit, path: str, run: int, aim: Aim, selected: Selected
    ) -> Replace | None:
        """The rows of the run that is drawn. Every run that might be has to fit: a request that is valid with one seed
        is so with any."""
        path = f"{path}.source_runs"
        if self._refused_alone("resample", path):
            return None
        if not wire.source_runs:
            self._found.add(path, "at least one run to draw from is needed")
            return None
        named = [self._known(source, f"{path}[{i}]", run) for i, source in enumerate(wire.source_runs)]
        if not all(named):
            return None
        for index, source in enumerate(wire.source_runs):
            if aim.info is not None and _over_keys(aim.info):
                self._as_long(FromRun(source), f"{path}[{index}]", run)
            else:
                self._reaches(FromRun(source), f"{path}[{index}]", selected)
        return Replace(aim.target, FromRun(drawn(tuple(wire.source_runs), wire.seed, run)), arm="resample")

    def freeze(self, wire: intervention_pb2.FreezeEdit, path: str, run: int) -> Freeze | None:
        """Parts held to another run."""
        if not (wire.attention or wire.norms or wire.mlps):
            self._found.add(path, "at least one of attention, norms and mlps must be held")
        sites = self._facts.site_info
        for part, alone in _HELD.items():
            if getattr(wire, part) and not any(hook_points(op) for op in expanded(alone, sites)):
                self._found.add(f"{path}.{part}", "this model lets no such site be written; Describe says why")
        where = f"{path}.source_run"
        if self._refused_alone("freeze", where) or not self._known(wire.source_run, where, run):
            return None
        source = FromRun(wire.source_run)
        self._as_long(source, where, run)
        return Freeze(source, wire.attention, wire.norms, wire.mlps)

    def _refused_alone(self, arm: str, path: str) -> bool:
        """Whether there are no other runs to take from, which is noted."""
        if self._alone:
            self._found.add(path, _ALONE[arm])
        return self._alone

    def _known(self, source: int, path: str, run: int) -> bool:
        """Whether an index names another run."""
        if source >= len(self._lengths):
            self._found.add(path, f"{source} is not a run of this request: 0 .. {len(self._lengths) - 1}")
        elif source == run:
            self._found.add(path, f"{source} is this run itself, and a run cannot take from itself: name another")
        else:
            self._takes.setdefault((run, source), path)
            return True
        return False

    def _as_long(self, source: FromRun, path: str, run: int) -> None:
        theirs, own = self._lengths[source.run], self._lengths[run]
        if theirs is not None and own is not None and theirs != own:
            text = f"runs[{source.run}] must be as long as this run: it has {theirs} tokens, this one {own}"
            self._found.add(path, text)

    def _reaches(self, source: FromRun, path: str, selected: Selected) -> None:
        """Whether the source has the same positions."""
        length = self._lengths[source.run]
        if length is not None and selected and max(selected) >= length:
            text = f"runs[{source.run}] has {length} tokens, and none at position {max(selected)}, which is replaced"
            self._found.add(path, text)

    def refuse_cycles(self) -> None:
        """Notes runs that would wait for themselves."""
        waits: dict[int, set[int]] = {}
        for run, source in self._takes:
            waits.setdefault(run, set()).add(source)
        while waits:
            try:
                TopologicalSorter(waits).prepare()
            except CycleError as fault:
                # Each of these is taken from by the next; the last is the first again.
                cycle: list[int] = fault.args[1][::-1]
                names = " -> ".join(f"runs[{run}]" for run in cycle)
                text = f"runs that take from one another would wait for ever: {names}"
                self._found.add(self._takes[cycle[0], cycle[1]], text)
                waits = {run: sources - set(cycle) for run, sources in waits.items() if run not in cycle}
            else:
                return


def held_bytes(sources: Iterable[tuple[int, HookPoint]], lengths: Sequence[int], facts: ModelFacts) -> int:
    """Bytes of the values that are kept for other runs, each once however many take it."""
    return sum(_value_bytes(facts.site_info[point.site], lengths[run], facts.dtype) for run, point in set(sources))


def _value_bytes(info: SiteInfo, length: int, dtype: torch.dtype) -> int:
    return math.prod(size or length for _, size in info.axes) * dtype.itemsize


def _over_keys(info: SiteInfo) -> bool:
    return not info.width
