"""Execution: one batch of runs through the runner, from specs to outputs on the host.

A run is prepared on its own, so that what is wrong with its edits concerns no other; prepared runs share a forward. A
run that asks for its baseline is in the batch twice. The logits that runs ask for in any form (rows, top-k,
log-probabilities, loss, reads of the site `logits`) are computed once per row and position, then each form is taken
from them on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from patchclamp_server.engine.editing import Editing, compile_edits
from patchclamp_server.engine.exchange import Exchange
from patchclamp_server.engine.faults import NotFinite
from patchclamp_server.engine.messages import LogitsOutput, LogitsSpec, RunOutput, RunSpec
from patchclamp_server.engine.reading import Captures, ReadPlan, plan_reads
from patchclamp_server.engine.runner import Batch, Forward, Runner
from patchclamp_server.errors import Error
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.compiling import RowPlan
from patchclamp_server.interventions.ops import RowEdits
from patchclamp_server.interventions.plan import Plan

_LOGITS = HookPoint(Site.LOGITS)
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class LogitRows:
    """Which (row, position) pairs of a batch need logits, and where each is in the result."""

    pairs: tuple[tuple[int, int], ...]
    index: dict[tuple[int, int], int]

    @classmethod
    def of(cls, runs: Sequence[RunSpec], reads: ReadPlan) -> LogitRows:
        pairs: dict[tuple[int, int], int] = {}
        for row, run in enumerate(runs):
            length = len(run.token_ids)
            wanted = set(run.logits.positions.resolve(length)) if run.logits else set()
            wanted.update(range(length - 1) if run.loss else ())
            for position in sorted(wanted):
                pairs.setdefault((row, position), len(pairs))
        for request in reads.requests.get(_LOGITS, ()):
            for position in request.positions:
                pairs.setdefault((request.row, position), len(pairs))
        return cls(tuple(pairs), pairs)

    def finite(self, logits: torch.Tensor, row: int) -> bool:
        """Whether all logits of one run are numbers; -inf is one that never comes."""
        places = [place for pair, place in self.index.items() if pair[0] == row]
        chosen = logits[torch.tensor(places, dtype=torch.long, device=logits.device)]
        return bool((chosen.isfinite() | (chosen == float("-inf"))).all())

    def take(self, logits: torch.Tensor, row: int, positions: Sequence[int]) -> torch.Tensor:
        """The logits of one run's positions, [positions, d_vocab]."""
        index = torch.tensor([self.index[row, position] for position in positions], device=logits.device)
        return logits.index_select(0, index)


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A run with its edits compiled, and what other runs of its job will take from it.

    `keep` gets each value that is `wanted`, `[*axes]` without padding.
    """

    run: RunSpec
    edits: RowPlan
    wanted: frozenset[HookPoint] = frozenset()
    keep: Callable[[HookPoint, torch.Tensor], None] | None = None


def prepare(runner: Runner, run: RunSpec, exchange: Exchange | None = None, index: int = 0) -> PreparedRun:
    """Compiles the edits of run `index` of a job. Raises FailedPrecondition for one that selects no row."""
    exchange = exchange or Exchange()
    length = len(run.token_ids)
    named = RowEdits(run.interventions, prompt_length=length, max_length=length)
    edits = compile_edits(runner.adapter, named, exchange.take)
    return PreparedRun(run, edits, exchange.wanted(index), lambda point, value: exchange.put(index, point, value))


def execute(runner: Runner, runs: Sequence[RunSpec], check: Callable[[], None] | None = None) -> tuple[RunOutput, ...]:
    """Runs a batch of runs that take nothing from each other. Raises the error of the first that failed."""
    results = execute_prepared(runner, [prepare(runner, run) for run in runs], check)
    for result in results:
        if isinstance(result, Error):
            raise result
    return tuple(result for result in results if isinstance(result, RunOutput))


def execute_prepared(
    runner: Runner, prepared: Sequence[PreparedRun], check: Callable[[], None] | None = None
) -> tuple[RunOutput | Error, ...]:
    """Runs a batch; a run that fails does so alone. `check` is called before every block and may raise to abort."""
    baselines = {index: len(prepared) + n for n, index in enumerate(_with_baseline(prepared))}
    runs = [*(one.run for one in prepared), *(_baseline(prepared[index].run) for index in baselines)]
    batch = Batch.of([run.token_ids for run in runs], runner.input_device)
    reads = plan_reads(runs)
    rows = LogitRows.of(runs, reads)
    captures = Captures(reads, runner.adapter.unembed.logits, runner.adapter.unembed.row)
    plan = _plan(runner, prepared, batch)
    editing = Editing(plan)
    watch = _Watch(captures, prepared, editing)
    logits = runner.run(
        Forward(
            batch,
            reads=watch.hook_points,
            capture=watch.take,
            edits=editing.edits,
            logit_rows=rows.pairs,
            check=check,
        )
    )
    for request in reads.requests.get(_LOGITS, ()):
        captures.take_rows(request, rows.take(logits, request.row, request.positions))
    return tuple(_output(row, runs, rows, logits, captures, plan, baselines.get(row)) for row in range(len(prepared)))


def _with_baseline(prepared: Sequence[PreparedRun]) -> Iterator[int]:
    return (index for index, one in enumerate(prepared) if one.run.baseline)


def _baseline(run: RunSpec) -> RunSpec:
    """The run without its edits, for its logits alone."""
    return RunSpec(run.token_ids, logits=run.logits)


def _plan(runner: Runner, prepared: Sequence[PreparedRun], batch: Batch) -> Plan | None:
    """The edits of a batch, at the tokens where its rows have them; None where no row has any."""
    if not any(one.run.interventions for one in prepared):
        return None
    n_rows, n_positions = batch.input_ids.shape
    device, dtype = runner.input_device, runner.adapter.probes.dtype
    plan = Plan(runner.adapter.site_info, rows=n_rows, max_length=n_positions, device=device, dtype=dtype)
    plan.reserve([one.edits for one in prepared])
    for row, one in enumerate(prepared):
        plan.place(row, one.edits)
    positions = torch.arange(n_positions, device=device).expand(n_rows, n_positions)  # [batch, pos]
    lengths = torch.tensor(batch.lengths, device=device)[:, None]
    plan.step(torch.where(positions < lengths, positions, -1))
    return plan


class _Watch:
    """What a forward shows, and to whom: reads, conditions of edits, and other runs of a job."""

    def __init__(self, captures: Captures, prepared: Sequence[PreparedRun], editing: Editing) -> None:
        self._captures = captures
        self._prepared = prepared
        self._editing = editing
        wanted = frozenset[HookPoint]().union(*(one.wanted for one in prepared))
        self.hook_points = captures.plan.hook_points | editing.conditions | wanted

    def take(self, point: HookPoint, value: torch.Tensor) -> None:
        self._editing.observe(point, value)
        for row, one in enumerate(self._prepared):
            if point in one.wanted and one.keep is not None:
                one.keep(point, _whole(point, value[row], len(one.run.token_ids)))
        if point in self._captures.plan.hook_points:
            self._captures.take(point, value)


def _whole(point: HookPoint, value: torch.Tensor, length: int) -> torch.Tensor:
    """A copy of one run's value `[*axes]` without its padding: later layers may write in place."""
    axis = point.site.position_axis
    kept = value.narrow(axis, 0, length)
    return (kept[..., :length] if axis else kept).clone()


def _output(
    row: int,
    runs: Sequence[RunSpec],
    rows: LogitRows,
    logits: torch.Tensor,
    captures: Captures,
    plan: Plan | None,
    baseline: int | None,
) -> RunOutput | Error:
    run = runs[row]
    if run.interventions and not rows.finite(logits, row):
        return NotFinite("the logits of this run")
    return RunOutput(
        reads=captures.of_row(row),
        logits=_logits(row, run, run.logits, rows, logits) if run.logits else None,
        loss=_loss(row, run, rows, logits) if run.loss else None,
        receipts=plan.receipts(row) if plan is not None else (),
        baseline=_logits(baseline, run, run.logits, rows, logits) if baseline is not None and run.logits else None,
    )


def _logits(row: int, run: RunSpec, spec: LogitsSpec, rows: LogitRows, logits: torch.Tensor) -> LogitsOutput:
    positions = spec.positions.resolve(len(run.token_ids))
    parts = [_part(rows.take(logits, row, some), spec) for some in _slices(positions)]
    columns = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
    return LogitsOutput(positions, *columns)


def _part(chosen: torch.Tensor, spec: LogitsSpec) -> tuple[torch.Tensor | None, ...]:
    """The forms asked for of some rows [rows, d_vocab], on the host, in the order of LogitsOutput's fields."""
    # What turns logits into log-probabilities, [rows, 1]: one number a row instead of another whole vocabulary.
    total = chosen.float().logsumexp(-1, keepdim=True)
    top = chosen.float().topk(spec.top_k, dim=-1) if spec.top_k else None
    return (
        chosen.to(spec.dtype).cpu() if spec.values else None,
        top.indices.int().cpu() if top else None,
        (top.values - total).cpu() if top else None,
        top.values.cpu() if top else None,
        (chosen[:, list(spec.logprob_tokens)].float() - total).cpu() if spec.logprob_tokens else None,
    )


def _loss(row: int, run: RunSpec, rows: LogitRows, logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of tokens 1, 2, .. given those before, in nats. float32 [pos - 1]"""
    losses = [torch.empty(0)]
    for some in _slices(range(len(run.token_ids) - 1)):
        targets = torch.tensor([run.token_ids[position + 1] for position in some], device=logits.device)
        predictions = rows.take(logits, row, some).float()
        losses.append(functional.cross_entropy(predictions, targets, reduction="none").cpu())
    return torch.cat(losses)


def _slices(positions: Sequence[int]) -> Iterator[Sequence[int]]:
    """Positions, some at a time: copies of their logits are as wide as the vocabulary."""
    return (positions[start : start + _ROWS_AT_ONCE] for start in range(0, len(positions), _ROWS_AT_ONCE))
