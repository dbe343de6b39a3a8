"""Positions and heads of a request, checked against the run and the site that they select from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from patchclamp.v1 import hook_point_pb2
from patchclamp_server.hookpoints import SiteInfo
from patchclamp_server.positions import LAST, Positions, Range, Span
from patchclamp_server.service.violations import Violations

_SPANS: dict[int, Span] = {
    int(hook_point_pb2.POSITION_SPAN_UNSPECIFIED): Span.ALL,
    int(hook_point_pb2.POSITION_SPAN_ALL): Span.ALL,
    int(hook_point_pb2.POSITION_SPAN_PROMPT): Span.PROMPT,
    int(hook_point_pb2.POSITION_SPAN_GENERATED): Span.GENERATED,
    int(hook_point_pb2.POSITION_SPAN_LAST): Span.LAST,
}


@dataclass(frozen=True)
class Extent:
    """Where positions may lie: on the prompt, and on as many generated tokens as a forward can see at most."""

    prompt: int
    generated: int = 0

    @property
    def length(self) -> int:
        return self.prompt + self.generated

    def absolute(self, position: int) -> int:
        """The position from the start."""
        return position + self.prompt if position < 0 else position

    def __str__(self) -> str:
        if not self.generated:
            return f"a run of {self.prompt} tokens"
        return f"a prompt of {self.prompt} tokens with {self.generated} generated ones to be seen"


@dataclass(frozen=True)
class Selection:
    """Positions, how many rows they are on their run, and whether results can tell them by their two ends."""

    positions: Positions
    rows: int
    consecutive: bool


LAST_ROW = Selection(LAST, 1, consecutive=True)


def are_consecutive(positions: tuple[int, ...]) -> bool:
    """Whether positions ascend without a gap; none do not."""
    return bool(positions) and positions == tuple(range(positions[0], positions[0] + len(positions)))


def parse_positions(
    wire: hook_point_pb2.Positions, path: str, extent: Extent, found: Violations, *, empty: bool = False
) -> Selection | None:
    """The selection within `extent`, one row at least unless it may be `empty`; None when invalid."""
    selector = _selector(wire, path, extent, found)
    excluded = _inside(wire.exclude, f"{path}.exclude", extent, found)
    if selector is None or not excluded:
        return None
    positions = Positions(selector, tuple(wire.exclude))
    resolved = positions.resolve(extent.prompt, extent.generated)
    if not resolved and not empty:
        found.add(path, f"selects no position of {extent}")
        return None
    return Selection(positions, len(resolved), are_consecutive(resolved))


def _selector(
    wire: hook_point_pb2.Positions, path: str, extent: Extent, found: Violations
) -> Span | Range | tuple[int, ...] | None:
    match wire.WhichOneof("selector"):
        case "span":
            span = _SPANS.get(wire.span)
            if span is None:
                found.add(f"{path}.span", f"{wire.span} is not a span: ALL, PROMPT, GENERATED or LAST")
            return span
        case "indices":
            return _indices(wire.indices.indices, f"{path}.indices.indices", extent, found)
        case "range":
            return _range(wire.range, f"{path}.range", extent, found)
        case _:
            return Span.ALL


def _indices(wire: Sequence[int], path: str, extent: Extent, found: Violations) -> tuple[int, ...] | None:
    if not wire:
        found.add(path, "at least one position is needed")
        return None
    if not _inside(wire, path, extent, found):
        return None
    twice = _duplicate(map(extent.absolute, wire))
    if twice is not None:
        found.add(path, f"no duplicates: position {twice} is there more than once")
        return None
    return tuple(wire)


def _duplicate(values: Iterable[int]) -> int | None:
    """The first value that was there before."""
    seen: set[int] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _range(wire: hook_point_pb2.PositionRange, path: str, extent: Extent, found: Violations) -> Range | None:
    start = wire.start if wire.HasField("start") else None
    stop = wire.stop if wire.HasField("stop") else None
    ends = {"start": start, "stop": stop}
    first, last = -extent.prompt, extent.length
    outside = {name: end for name, end in ends.items() if end is not None and not first <= end <= last}
    for name, end in outside.items():
        found.add(f"{path}.{name}", f"{end} is outside {extent}: {first} .. {last}")
    return None if outside else Range(start, stop)


def _inside(wire: Sequence[int], path: str, extent: Extent, found: Violations) -> bool:
    """Whether all positions are on the run."""
    valid, first, last = True, -extent.prompt, extent.length - 1
    for index, position in enumerate(wire):
        if not first <= position <= last:
            found.add(f"{path}[{index}]", f"{position} is outside {extent}: {first} .. {last}")
            valid = False
    return valid


def parse_heads(
    wire: Sequence[int], hook_point: hook_point_pb2.HookPoint, path: str, info: SiteInfo, found: Violations
) -> tuple[int, ...] | None:
    """The heads asked for, by the read at `path` or by its hook point; None for all of them, or when invalid."""
    one = hook_point.HasField("head")
    if one and wire:
        found.add(f"{path}.heads", "set either heads or hook_point.head")
        return None
    if not one and not wire:
        return None
    heads, where = ((hook_point.head,), f"{path}.hook_point.head") if one else (tuple(wire), f"{path}.heads")
    axis = head_axis(info)
    if axis is None:
        found.add(where, f"{info.site} has no head axis, its axes are {', '.join(name for name, _ in info.axes)}")
        return None
    site_heads = info.axis(axis)
    if not one:
        return heads if are_indices(heads, where, site_heads, "head", found) else None
    if heads[0] < site_heads:
        return heads
    found.add(where, _stranger(heads[0], site_heads, "head"))
    return None


def head_axis(info: SiteInfo) -> str | None:
    """`head` or `kv_head` where this model's site has one value per head, else None."""
    return next((name for name, _ in info.axes if name in ("head", "kv_head")), None)


def are_indices(values: Sequence[int], path: str, size: int, what: str, found: Violations) -> bool:
    """Whether values are distinct heads or neurons of a site that has `size` of them."""
    valid = True
    for index, value in enumerate(values):
        if value >= size:
            found.add(f"{path}[{index}]", _stranger(value, size, what))
            valid = False
    twice = _duplicate(values)
    if twice is not None:
        found.add(path, f"no duplicates: {what} {twice} is there more than once")
        valid = False
    return valid


def _stranger(value: int, size: int, what: str) -> str:
    return f"{value} is not a {what} of this site: 0 .. {size - 1}"
