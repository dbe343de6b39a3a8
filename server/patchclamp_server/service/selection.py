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
class Selection:
    """Positions, how many rows they are on their run, and whether results can tell them by their two ends."""

    positions: Positions
    rows: int
    consecutive: bool


LAST_ROW = Selection(LAST, 1, consecutive=True)


def are_consecutive(positions: tuple[int, ...]) -> bool:
    """Whether positions ascend without a gap; none do not."""
    return bool(positions) and positions == tuple(range(positions[0], positions[0] + len(positions)))


def parse_positions(wire: hook_point_pb2.Positions, path: str, length: int, found: Violations) -> Selection | None:
    """The selection on a run of `length` tokens, one row at least; None when invalid."""
    selector = _selector(wire, path, length, found)
    excluded = _inside(wire.exclude, f"{path}.exclude", length, found)
    if selector is None or not excluded:
        return None
    positions = Positions(selector, tuple(wire.exclude))
    resolved = positions.resolve(length)
    if not resolved:
        found.add(path, f"selects no position of a run of {length} tokens")
        return None
    return Selection(positions, len(resolved), are_consecutive(resolved))


def _selector(
    wire: hook_point_pb2.Positions, path: str, length: int, found: Violations
) -> Span | Range | tuple[int, ...] | None:
    match wire.WhichOneof("selector"):
        case "span":
            span = _SPANS.get(wire.span)
            if span is None:
                found.add(f"{path}.span", f"{wire.span} is not a span: ALL, PROMPT, GENERATED or LAST")
            return span
        case "indices":
            return _indices(wire.indices.indices, f"{path}.indices.indices", length, found)
        case "range":
            return _range(wire.range, f"{path}.range", length, found)
        case _:
            return Span.ALL


def _indices(wire: Sequence[int], path: str, length: int, found: Violations) -> tuple[int, ...] | None:
    if not wire:
        found.add(path, "at least one position is needed")
        return None
    if not _inside(wire, path, length, found):
        return None
    twice = _duplicate(position % length for position in wire)
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


def _range(wire: hook_point_pb2.PositionRange, path: str, length: int, found: Violations) -> Range | None:
    start = wire.start if wire.HasField("start") else None
    stop = wire.stop if wire.HasField("stop") else None
    ends = {"start": start, "stop": stop}
    outside = {name: end for name, end in ends.items() if end is not None and not -length <= end <= length}
    for name, end in outside.items():
        found.add(f"{path}.{name}", f"{end} is outside a run of {length} tokens: {-length} .. {length}")
    return None if outside else Range(start, stop)


def _inside(wire: Sequence[int], path: str, length: int, found: Violations) -> bool:
    """Whether all positions are on the run."""
    valid = True
    for index, position in enumerate(wire):
        if not -length <= position < length:
            found.add(f"{path}[{index}]", f"{position} is outside a run of {length} tokens: {-length} .. {length - 1}")
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
    return heads if _are_heads(heads, where, info.axis(axis), one, found) else None


def head_axis(info: SiteInfo) -> str | None:
    """`head` or `kv_head` where this model's site has one value per head, else None."""
    return next((name for name, _ in info.axes if name in ("head", "kv_head")), None)


def _are_heads(heads: tuple[int, ...], path: str, n_heads: int, one: bool, found: Violations) -> bool:
    valid = True
    for index, head in enumerate(heads):
        if head >= n_heads:
            found.add(path if one else f"{path}[{index}]", f"{head} is not a head of this site: 0 .. {n_heads - 1}")
            valid = False
    twice = _duplicate(heads)
    if twice is not None:
        found.add(path, f"no duplicates: head {twice} is there more than once")
        valid = False
    return valid
