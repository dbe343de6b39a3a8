"""From the messages that a run's stream brings to results. Does no I/O; both clients use it."""

from __future__ import annotations

from collections.abc import Sequence

from patchclamp._arriving import arriving_read, tokens, top_token
from patchclamp._handles import Handle
from patchclamp._receipts import Edits
from patchclamp._results import (
    Activation,
    Activations,
    Baseline,
    FloatArray,
    Handles,
    Run,
    RunSummary,
    Tokens,
    TopToken,
)
from patchclamp._status import error_of_run
from patchclamp._tensors import TensorAssembler, damaged
from patchclamp.errors import Error
from patchclamp.v1 import logits_pb2, model_pb2, run_pb2


def tokens_of(response: model_pb2.TokenizeResponse, request: model_pb2.TokenizeRequest) -> list[Tokens]:
    """What Tokenize answered, one per prompt."""
    if len(response.prompts) != len(request.prompts):
        raise damaged(f"{len(response.prompts)} of {len(request.prompts)} prompts were tokenized")
    return [tokens(prompt.tokens, prompt.text) for prompt in response.prompts]


class RunStream:
    """Takes the messages of one stream as they come; `results` gives the runs, or their errors, in request order.

    `edits` are the interventions of each run, as they were written.
    """

    def __init__(self, request: run_pb2.RunRequest, edits: Sequence[Edits]) -> None:
        self._request = request
        self._edits = edits
        self._tensors = TensorAssembler()
        self._arrived: list[_ArrivingRun | Error | None] = [None] * len(request.runs)
        self._summary: RunSummary | None = None

    def take(self, response: run_pb2.RunResponse) -> None:
        """One message."""
        match response.WhichOneof("event"):
            case "result":
                self._take_result(response.result)
            case "chunk":
                self._tensors.add(response.chunk)
        if response.HasField("summary"):
            summary = response.summary
            self._summary = RunSummary(
                summary.prompt_tokens, summary.queue_seconds, summary.engine_seconds, summary.fingerprint
            )

    def results(self) -> list[Run | Error]:
        """What every run gave, once the stream has ended."""
        if self._summary is None:
            raise damaged("the stream ended early")
        return [
            arrived.finish(self._summary) if isinstance(arrived, _ArrivingRun) else arrived
            for arrived in map(_present, self._arrived)
        ]

    def runs(self) -> list[Run]:
        """What every run gave; raises the first failure, which then carries all results."""
        results = self.results()
        failures = [result for result in results if isinstance(result, Error)]
        if failures:
            failures[0].results = tuple(results)
            raise failures[0]
        return [result for result in results if isinstance(result, Run)]

    def _take_result(self, result: run_pb2.RunResult) -> None:
        index = result.run_index
        if index >= len(self._arrived) or self._arrived[index] is not None:
            raise damaged(f"an unexpected result of run {index}")
        if result.HasField("failure"):
            self._arrived[index] = self._edits[index].explain(error_of_run(result.failure))
            return
        self._arrived[index] = _ArrivingRun(result, self._request.runs[index], self._edits[index], self._tensors)


def _present(arrived: _ArrivingRun | Error | None) -> _ArrivingRun | Error:
    if arrived is None:
        raise damaged("a run's result never came")
    return arrived


class _ArrivingLogits:
    """A run's logits of which chunks may still come."""

    def __init__(self, result: logits_pb2.LogitsResult, tensors: TensorAssembler) -> None:
        self.positions = tuple(result.positions)
        self.top = _rows([top_token(top) for top in result.top], len(self.positions))
        self._values = tensors.open(result.values) if result.HasField("values") else None
        self._logprobs = tensors.open(result.logprobs) if result.HasField("logprobs") else None

    def values(self) -> Activation | None:
        if self._values is None:
            return None
        return Activation.of(self._values.array(), "logits", positions=self.positions)

    def logprobs(self) -> FloatArray | None:
        return None if self._logprobs is None else self._logprobs.array()

    def as_baseline(self) -> Baseline:
        return Baseline(self.values(), self.positions, self.top, self.logprobs())


class _ArrivingRun:
    """A run's result of which chunks may still come."""

    def __init__(
        self, result: run_pb2.RunResult, asked: run_pb2.RunSpec, edits: Edits, tensors: TensorAssembler
    ) -> None:
        self._tokens = tokens(result.tokens, result.text)
        self._reads = [arriving_read(read, asked.reads, tensors, len(result.tokens)) for read in result.reads]
        self._logits = _ArrivingLogits(result.logits, tensors)
        self._baseline = (
            _ArrivingLogits(result.baseline_logits, tensors) if result.HasField("baseline_logits") else None
        )
        self._loss = tensors.open(result.loss) if result.HasField("loss") else None
        self._receipts = edits.receipts(result.receipts)
        self._handles = _handles(result, asked)

    def finish(self, summary: RunSummary) -> Run:
        return Run(
            tokens=self._tokens,
            reads=Activations([read.finish() for read in self._reads]),
            logits=self._logits.values(),
            logit_positions=self._logits.positions,
            top_rows=self._logits.top,
            logprobs=self._logits.logprobs(),
            loss=None if self._loss is None else self._loss.array(),
            receipts=self._receipts,
            summary=summary,
            baseline=None if self._baseline is None else self._baseline.as_baseline(),
            handles=self._handles,
        )


def _handles(result: run_pb2.RunResult, asked: run_pb2.RunSpec) -> Handles:
    """What is kept of a run, in the order asked for."""
    for handle in result.handles:
        if handle.keep_index >= len(asked.keep):
            raise damaged(f"a handle of keep {handle.keep_index}, which was not asked for")
    return Handles([Handle.from_message(handle) for handle in sorted(result.handles, key=lambda h: h.keep_index)])


def _rows(top: list[TopToken], rows: int) -> tuple[tuple[TopToken, ...], ...]:
    """The tokens, which come row by row, as rows."""
    if not top:
        return ()
    if not rows or len(top) % rows:
        raise damaged(f"{len(top)} top tokens for {rows} rows")
    k = len(top) // rows
    return tuple(tuple(top[start : start + k]) for start in range(0, len(top), k))
