"""From the messages that a run's stream brings to results. Does no I/O; both clients use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp._results import Activation, Activations, Run, RunSummary, Tokens, TopToken, probability
from patchclamp._status import error_of_run
from patchclamp._tensors import IncomingTensor, TensorAssembler, damaged
from patchclamp.errors import Error
from patchclamp.v1 import model_pb2, prompt_pb2, read_pb2, run_pb2

_REDUCTIONS = {"top_k": "topk"}
_WITHOUT_POSITIONS = ("last", "mean", "moments")


def tokens_of(response: model_pb2.TokenizeResponse, request: model_pb2.TokenizeRequest) -> list[Tokens]:
    """What Tokenize answered, one per prompt."""
    if len(response.prompts) != len(request.prompts):
        raise damaged(f"{len(response.prompts)} of {len(request.prompts)} prompts were tokenized")
    return [_tokens(prompt.tokens, prompt.text) for prompt in response.prompts]


class RunStream:
    """Takes the messages of one stream as they come; `results` gives the runs, or their errors, in request order."""

    def __init__(self, request: run_pb2.RunRequest) -> None:
        self._request = request
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
            self._arrived[index] = error_of_run(result.failure)
            return
        self._arrived[index] = _ArrivingRun(result, self._request.runs[index], self._tensors)


def _present(arrived: _ArrivingRun | Error | None) -> _ArrivingRun | Error:
    if arrived is None:
        raise damaged("a run's result never came")
    return arrived


@dataclass(frozen=True)
class _ArrivingRead:
    """A read of which chunks may still come."""

    name: str
    reduce: str | None
    positions: tuple[int, ...]
    values: IncomingTensor
    indices: IncomingTensor | None

    def finish(self) -> Activation:
        return Activation.of(
            self.values.array(),
            self.name,
            reduce=self.reduce,
            positions=self.positions,
            indices=None if self.indices is None else self.indices.array(),
        )


class _ArrivingRun:
    """A run's result of which chunks may still come."""

    def __init__(self, result: run_pb2.RunResult, asked: run_pb2.RunSpec, tensors: TensorAssembler) -> None:
        self._tokens = _tokens(result.tokens, result.text)
        self._reads = [_arriving_read(read, asked, tensors, len(result.tokens)) for read in result.reads]
        self._positions = tuple(result.logits.positions)
        self._top = _rows([_top_token(top) for top in result.logits.top], len(self._positions))
        self._logits = tensors.open(result.logits.values) if result.logits.HasField("values") else None
        self._logprobs = tensors.open(result.logits.logprobs) if result.logits.HasField("logprobs") else None
        self._loss = tensors.open(result.loss) if result.HasField("loss") else None

    def finish(self, summary: RunSummary) -> Run:
        return Run(
            tokens=self._tokens,
            reads=Activations([read.finish() for read in self._reads]),
            logits=self._logits_array(),
            logit_positions=self._positions,
            top_rows=self._top,
            logprobs=None if self._logprobs is None else self._logprobs.array(),
            loss=None if self._loss is None else self._loss.array(),
            receipts=(),
            summary=summary,
        )

    def _logits_array(self) -> Activation | None:
        if self._logits is None:
            return None
        return Activation.of(self._logits.array(), "logits", positions=self._positions)


def _arriving_read(
    read: read_pb2.ReadResult, asked: run_pb2.RunSpec, tensors: TensorAssembler, length: int
) -> _ArrivingRead:
    if read.read_index >= len(asked.reads):
        raise damaged(f"a result of read {read.read_index}, which was not asked for")
    kind = asked.reads[read.read_index].reduction.WhichOneof("kind")
    return _ArrivingRead(
        name=read.name,
        reduce=None if kind is None else _REDUCTIONS.get(kind, kind),
        positions=() if kind in _WITHOUT_POSITIONS else _positions(read, length),
        values=tensors.open(read.values),
        indices=tensors.open(read.indices) if read.HasField("indices") else None,
    )


def _positions(read: read_pb2.ReadResult, length: int) -> tuple[int, ...]:
    """Positions of a read's rows: consecutive ones come as a range."""
    if not read.HasField("position_range"):
        return tuple(read.positions)
    start, stop = read.position_range.start, read.position_range.stop
    if not 0 <= start <= stop <= length:
        raise damaged(f"positions {start} to {stop} of {length}")
    return tuple(range(start, stop))


def _rows(top: list[TopToken], rows: int) -> tuple[tuple[TopToken, ...], ...]:
    """The tokens, which come row by row, as rows."""
    if not top:
        return ()
    if not rows or len(top) % rows:
        raise damaged(f"{len(top)} top tokens for {rows} rows")
    k = len(top) // rows
    return tuple(tuple(top[start : start + k]) for start in range(0, len(top), k))


def _top_token(message: run_pb2.TokenProbability) -> TopToken:
    return TopToken(message.text, probability(message.logprob), message.id, message.logprob, message.logit)


def _tokens(messages: Sequence[prompt_pb2.Token], text: str) -> Tokens:
    return Tokens(
        ids=tuple(token.id for token in messages),
        strings=tuple(token.text for token in messages),
        offsets=tuple((token.start, token.end) for token in messages),
        text=text,
    )
