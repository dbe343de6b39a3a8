"""Execution: one batch of runs through the runner, from specs to outputs on the host.

The logits that runs ask for in any form (rows, top-k, log-probabilities, loss, reads of the site `logits`) are computed
once per row and position, then each form is taken from them on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from patchclamp_server.engine.messages import LogitsOutput, LogitsSpec, RunOutput, RunSpec
from patchclamp_server.engine.reading import Captures, ReadPlan, plan_reads
from patchclamp_server.engine.runner import Batch, Forward, Runner
from patchclamp_server.hookpoints import HookPoint, Site

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

    def take(self, logits: torch.Tensor, row: int, positions: Sequence[int]) -> torch.Tensor:
        """The logits of one run's positions, [positions, d_vocab]."""
        index = torch.tensor([self.index[row, position] for position in positions], device=logits.device)
        return logits.index_select(0, index)


def execute(runner: Runner, runs: Sequence[RunSpec], check: Callable[[], None] | None = None) -> tuple[RunOutput, ...]:
    """Runs a batch. `check` is called before every block and may raise to abort."""
    reads = plan_reads(runs)
    rows = LogitRows.of(runs, reads)
    captures = Captures(reads, runner.adapter.unembed.logits, _unembed_row(runner))
    logits = runner.run(
        Forward(
            Batch.of([run.token_ids for run in runs], runner.input_device),
            reads=reads.hook_points,
            capture=captures.take,
            logit_rows=rows.pairs,
            check=check,
        )
    )
    for request in reads.requests.get(_LOGITS, ()):
        captures.take_rows(request, rows.take(logits, request.row, request.positions))
    return tuple(_output(row, run, rows, logits, captures) for row, run in enumerate(runs))


def _output(row: int, run: RunSpec, rows: LogitRows, logits: torch.Tensor, captures: Captures) -> RunOutput:
    return RunOutput(
        reads=captures.of_row(row),
        logits=_logits(row, run, run.logits, rows, logits) if run.logits else None,
        loss=_loss(row, run, rows, logits) if run.loss else None,
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


def _unembed_row(runner: Runner) -> Callable[[int], torch.Tensor]:
    weight = runner.adapter.unembed.head.weight
    assert isinstance(weight, torch.Tensor)
    return lambda token_id: weight[token_id]
