"""Reads of a request, checked against the model and priced in bytes as their results will travel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from patchclamp.v1 import read_pb2
from patchclamp_server.adapters.facts import ModelFacts
from patchclamp_server.engine.messages import (
    LastRow,
    LogitLens,
    Mean,
    Moments,
    Norm,
    Project,
    ReadSpec,
    Reduction,
    TopK,
)
from patchclamp_server.hookpoints import Site, SiteInfo
from patchclamp_server.interventions.ops import UnembedRow
from patchclamp_server.service.selection import Extent, head_axis, parse_heads, parse_positions
from patchclamp_server.service.sites import parse_site
from patchclamp_server.service.tensors import RESULT_DTYPES
from patchclamp_server.service.vectors import VectorParser
from patchclamp_server.service.violations import Violations

MOST_PROJECTIONS = 256
_INDEX_BYTES = 4
_NOT_OF_SCORES = ("mean", "norm", "moments", "top_k.by_magnitude")


@dataclass(frozen=True, eq=False)
class PricedRead:
    """A read, and in all layers together: the bytes of its results, and the positions that they list one by one."""

    spec: ReadSpec
    result_bytes: int
    listed_positions: int


class ReadParser:
    """Turns the reads of one request into specs; notes what is wrong with them."""

    def __init__(self, facts: ModelFacts, found: Violations) -> None:
        self._facts = facts
        self._found = found
        self._vectors = VectorParser(facts.dims.d_model, facts.dims.d_vocab, found)

    def parse(self, wire: read_pb2.Read, path: str, extent: Extent | None) -> PricedRead | None:
        """One read of a run of that extent (None: its prompt is invalid); None when invalid."""
        length = None if extent is None else extent.length
        dtype = RESULT_DTYPES.get(wire.dtype)
        if dtype is None:
            self._found.add(f"{path}.dtype", "must be float32, bfloat16 or float16")
        site = parse_site(wire.hook_point, f"{path}.hook_point", self._facts, self._found)
        selection = extent and parse_positions(wire.positions, f"{path}.positions", extent, self._found)
        if site is None:
            return None
        info, layers = site
        heads = parse_heads(wire.heads, wire.hook_point, path, info, self._found)
        reduction = self._reduction(wire.reduction, f"{path}.reduction", info, length)
        if not length or not selection or dtype is None:
            return None
        listed = 0 if selection.consecutive or drops_positions(reduction) else len(layers) * selection.rows
        spec = ReadSpec(info.site, layers, selection.positions, heads, reduction, dtype)
        return PricedRead(spec, result_bytes(spec, info, selection.rows, length), listed)

    def _reduction(self, wire: read_pb2.Reduction, path: str, info: SiteInfo, length: int | None) -> Reduction | None:
        """The reduction; None where the rows themselves are asked for, or when invalid."""
        if info.site is Site.ATTN_SCORES:
            self._refuse_of_scores(wire, path)
        match wire.WhichOneof("kind"):
            case "last":
                return LastRow()
            case "mean":
                return Mean()
            case "norm":
                return Norm()
            case "moments":
                return Moments()
            case "top_k":
                return self._top_k(wire.top_k, f"{path}.top_k.k", info, length)
            case "project":
                return self._project(wire.project, f"{path}.project.onto", info)
            case "logit_lens":
                return self._logit_lens(wire.logit_lens, f"{path}.logit_lens", info)
            case _:
                return None

    def _refuse_of_scores(self, wire: read_pb2.Reduction, path: str) -> None:
        """Sums over masked entries are -inf or NaN, and the largest magnitudes are the masked entries'."""
        kind = wire.WhichOneof("kind")
        if kind == "top_k" and wire.top_k.by_magnitude:
            kind = "top_k.by_magnitude"
        if kind in _NOT_OF_SCORES:
            text = f"not for {Site.ATTN_SCORES}, whose masked entries are -inf: reduce {Site.ATTN_PATTERN} instead"
            self._found.add(f"{path}.{kind}", text)

    def _top_k(self, wire: read_pb2.TopKReduction, path: str, info: SiteInfo, length: int | None) -> TopK | None:
        width = info.width or length
        if width is None or not 1 <= wire.k <= width:
            self._found.add(path, f"{wire.k} is not 1 .. {width}, the size of the last axis of {info.site}")
            return None
        return TopK(wire.k, wire.by_magnitude)

    def _project(self, wire: read_pb2.ProjectReduction, path: str, info: SiteInfo) -> Project | None:
        if not info.width:
            self._found.add(path, f"the last axis of {info.site} depends on the prompt: no vector fits it")
            return None
        if not wire.onto:
            self._found.add(path, "at least one vector is needed")
            return None
        if len(wire.onto) > MOST_PROJECTIONS:
            self._found.add(path, f"at most {MOST_PROJECTIONS} vectors, there are {len(wire.onto)}")
            return None
        parsed = [self._vectors.parse(source, f"{path}[{i}]", info.width) for i, source in enumerate(wire.onto)]
        onto = tuple(rows for rows in parsed if rows is not None)
        if len(onto) < len(parsed):
            return None
        if _count(onto) > MOST_PROJECTIONS:
            self._found.add(path, f"at most {MOST_PROJECTIONS} vectors in all, there are {_count(onto)}")
            return None
        return Project(onto)

    def _logit_lens(self, wire: read_pb2.LogitLensReduction, path: str, info: SiteInfo) -> LogitLens | None:
        if tuple(name for name, _ in info.axes) != ("pos", "d_model"):
            axes = ", ".join(name for name, _ in info.axes)
            self._found.add(path, f"needs rows of the residual stream, [pos, d_model]; {info.site} has [{axes}]")
            return None
        if not 1 <= wire.k <= self._facts.dims.d_vocab:
            self._found.add(f"{path}.k", f"{wire.k} is not 1 .. {self._facts.dims.d_vocab}, the vocabulary")
            return None
        return LogitLens(wire.k)


def drops_positions(reduction: Reduction | None) -> bool:
    """Whether results have no position axis any more."""
    return isinstance(reduction, LastRow | Mean | Moments)


def _count(onto: tuple[torch.Tensor | UnembedRow, ...]) -> int:
    return sum(1 if isinstance(rows, UnembedRow) else len(rows) for rows in onto)


def _selected_shape(info: SiteInfo, rows: int, length: int, heads: tuple[int, ...] | None) -> tuple[list[int], int]:
    """The shape of the selected rows in one layer, and which of its axes is the positions'."""
    known = {"pos": rows, "query": rows, "key": length}
    axis = head_axis(info)
    if heads is not None and axis is not None:
        known[axis] = len(heads)
    names = [name for name, _ in info.axes]
    position_axis = names.index("query" if "query" in names else "pos")
    return [known.get(name, size) for name, size in info.axes], position_axis


def result_bytes(spec: ReadSpec, info: SiteInfo, rows: int, length: int) -> int:
    """Bytes of what a read gives of so many rows, one at least, of a run of that length: in all layers together."""
    shape = _selected_shape(info, rows, length, spec.heads)
    return len(spec.layers) * _layer_bytes(shape, spec.reduction, spec.dtype)


def _layer_bytes(selected: tuple[list[int], int], reduction: Reduction | None, dtype: torch.dtype) -> int:
    """Bytes of one layer's result."""
    shape, position_axis = selected
    everything, width, size = math.prod(shape), shape[-1], dtype.itemsize
    match reduction:
        case LastRow() | Mean():
            return everything // shape[position_axis] * size
        case Moments():
            return 2 * everything // shape[position_axis] * size
        case Norm():
            return everything // width * size
        case TopK(k=k) | LogitLens(k=k):
            return everything // width * k * (size + _INDEX_BYTES)
        case Project(onto=onto):
            return everything // width * _count(onto) * size
        case _:
            return everything * size
