"""Reading: what the runs of a batch want from each hook point, and taking it.

Planned outside the forward: for every hook point, the requests of all rows with their positions resolved. Taken inside:
select rows, reduce, cast, copy; what leaves the hook is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from patchclamp_server.engine.messages import (
    LastRow,
    LogitLens,
    Mean,
    Moments,
    Norm,
    Project,
    ReadOutput,
    ReadSpec,
    Reduction,
    RunSpec,
    TopK,
)
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.ops import UnembedRow

# Rows whose logits are computed at once by a logit lens: bounds its memory at rows x d_vocab.
_LENS_ROWS = 256


@dataclass(frozen=True, eq=False)
class Request:
    """One read of one run in one layer: which row of the batch, and where the result goes."""

    row: int
    length: int
    read_index: int
    read: ReadSpec
    positions: tuple[int, ...]
    hook_point: HookPoint

    @cached_property
    def _span(self) -> slice | None:
        """The positions as a slice, where they are consecutive: a view instead of a gather."""
        first, count = self.positions[0], len(self.positions)
        return slice(first, first + count) if self.positions == tuple(range(first, first + count)) else None

    def select(self, value: torch.Tensor) -> torch.Tensor:
        """This request's rows of a site's `[batch, *axes]`: positions, then heads, without padding."""
        site = self.hook_point.site
        rows = value[self.row]
        if site.position_axis:
            rows = rows[..., : self.length]
        if self._span is not None:
            rows = rows.narrow(site.position_axis, self._span.start, len(self.positions))
        else:
            index = torch.tensor(self.positions, device=rows.device)
            rows = rows.index_select(site.position_axis, index)
        if self.read.heads is not None:
            index = torch.tensor(self.read.heads, device=rows.device)
            rows = rows.index_select(site.axes.index(site.head_axis or "head"), index)
        return rows


@dataclass(frozen=True, eq=False)
class ReadPlan:
    """The requests of a batch, by hook point."""

    requests: dict[HookPoint, tuple[Request, ...]]

    @property
    def hook_points(self) -> frozenset[HookPoint]:
        return frozenset(self.requests)


@dataclass(eq=False)
class Captures:
    """What the reads of one batch gave, by row. Filled by hooks while the forward runs."""

    plan: ReadPlan
    lens: Callable[[torch.Tensor], torch.Tensor]
    unembed_row: Callable[[int], torch.Tensor]
    found: dict[int, list[ReadOutput]] = field(default_factory=dict)

    def take(self, hook_point: HookPoint, value: torch.Tensor) -> None:
        """Serves every request at a hook point from its `[batch, *axes]` value."""
        for request in self.plan.requests[hook_point]:
            self.take_rows(request, request.select(value))

    def take_rows(self, request: Request, rows: torch.Tensor) -> None:
        """Serves one request from its selected rows."""
        values, indices = self._reduced(rows, request.read.reduction, request.hook_point.site)
        output = ReadOutput(
            request.read_index,
            request.hook_point,
            _detached(values, request.read.dtype),
            None if indices is None else _detached(indices, torch.int32),
            request.positions,
        )
        self.found.setdefault(request.row, []).append(output)

    def of_row(self, row: int) -> tuple[ReadOutput, ...]:
        """One run's results on the host: reads in request order, layers ascending."""
        outputs = sorted(self.found.get(row, ()), key=lambda o: (o.read_index, o.hook_point.layer or 0))
        return tuple(map(_on_host, outputs))

    def _reduced(
        self, rows: torch.Tensor, reduction: Reduction | None, site: Site
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(reduction, LogitLens):
            return self._lens(rows, reduction.k)
        if isinstance(reduction, Project):
            onto = [self._vectors(source, rows) for source in reduction.onto]
            return rows.float() @ torch.cat(onto).T, None
        return reduce(rows, reduction, site.position_axis)

    def _vectors(self, source: torch.Tensor | UnembedRow, rows: torch.Tensor) -> torch.Tensor:
        vectors = self.unembed_row(source.token_id)[None] if isinstance(source, UnembedRow) else source
        return vectors.to(rows.device, torch.float32)

    def _lens(self, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k most probable tokens of each row, [pos, k]: log-probabilities and ids."""
        tops = [self.lens(part).float().log_softmax(-1).topk(k) for part in rows.split(_LENS_ROWS)]
        return torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])


def plan_reads(runs: Sequence[RunSpec]) -> ReadPlan:
    """The requests of a batch whose row i is runs[i]."""
    requests: dict[HookPoint, list[Request]] = {}
    for row, run in enumerate(runs):
        length = len(run.token_ids)
        for index, read in enumerate(run.reads):
            positions = read.positions.resolve(length)
            for layer in read.layers:
                point = HookPoint(read.site, layer)
                requests.setdefault(point, []).append(Request(row, length, index, read, positions, point))
    return ReadPlan({point: tuple(found) for point, found in requests.items()})


def reduce(rows: torch.Tensor, reduction: Reduction | None, axis: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A reduction of the selected rows and, for top-k, the indices. `axis` is the position axis."""
    match reduction:
        case None:
            return rows, None
        case LastRow():
            return rows.select(axis, -1), None
        case Mean():
            return rows.float().mean(axis), None
        case Norm():
            return rows.float().norm(dim=-1), None
        case Moments():
            whole = rows.float()
            return torch.stack([whole.mean(axis), whole.var(axis, correction=0)]), None
        case TopK(k, by_magnitude):
            top = (rows.float().abs() if by_magnitude else rows.float()).topk(k, dim=-1)
            return rows.float().gather(-1, top.indices), top.indices
        case other:
            raise TypeError(f"{type(other).__name__} needs the model")


def _detached(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in the dtype asked for, cast on its device: later layers may write in place, and a view would keep the
    whole batch's activations alive. What is one value repeated (a stream per head) stays so."""
    copy = _once(value).to(dtype, copy=True, memory_format=torch.contiguous_format)
    return copy if copy.shape == value.shape else copy.expand(value.shape)


def _on_host(output: ReadOutput) -> ReadOutput:
    if output.values.device.type == "cpu":
        return output
    values = _once(output.values).cpu().expand(output.values.shape)
    indices = None if output.indices is None else output.indices.cpu()
    return replace(output, values=values, indices=indices)


def _once(value: torch.Tensor) -> torch.Tensor:
    """A view without the repetitions of an expanded tensor."""
    strides = value.stride()
    if 0 not in strides:
        return value
    return value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
