"""Execution: one batch of runs through the runner, from specs to outputs on the host.

The logits that runs ask for in any form (rows, top-k, log-probabilities, loss, reads of the site `logits`) are computed
once per row and position, then each form is taken from them on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from patchclamp_server.engine.messages import LogitsOutput, LogitsSpec, RunOutput, RunSpec
from patchclamp_server.engine.reading import Captures, ReadPlan, plan_reads
from patchclamp_server.engine.runner import Batch, Forward, Runner
from patchclamp_server.hookpoints import HookPoint, Site

_LOGITS = HookPoint(Site.LOGITS)


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
    chosen = rows.take(logits, row, positions)  # [rows, d_vocab]
    logprobs = chosen.float().log_softmax(-1) if spec.top_k or spec.logprob_tokens else None
    top = chosen.float().topk(spec.top_k, dim=-1) if spec.top_k else None
    return LogitsOutput(
        positions=positions,
        values=chosen.to(spec.dtype).cpu() if spec.values else None,
        top_ids=top.indices.int().cpu() if top else None,
        top_logprobs=logprobs.gather(-1, top.indices).cpu() if top and logprobs is not None else None,
        top_logits=top.values.cpu() if top else None,
        logprobs=logprobs[:, list(spec.logprob_tokens)].cpu() if spec.logprob_tokens and logprobs is not None else None,
    )


def _loss(row: int, run: RunSpec, rows: LogitRows, logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of tokens 1, 2, .. given those before, in nats. float32 [pos - 1]"""
    if len(run.token_ids) < 2:
        return torch.empty(0)
    predictions = rows.take(logits, row, range(len(run.token_ids) - 1)).float()
    targets = torch.tensor(run.token_ids[1:], device=logits.device)
    return functional.cross_entropy(predictions, targets, reduction="none").cpu()


def _unembed_row(runner: Runner) -> Callable[[int], torch.Tensor]:
    weight = runner.adapter.unembed.head.weight
    assert isinstance(weight, torch.Tensor)
    return lambda token_id: weight[token_id]
