"""From the messages that a generation's stream brings to tokens and results. Does no I/O; both clients use it."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from patchclamp._arriving import WITHOUT_POSITIONS, ArrivingRead, arriving_read, tokens, top_token
from patchclamp._generation import (
    FinishReason,
    GeneratedToken,
    Generation,
    GenerationSummary,
    Sample,
    behind,
    position_axis,
)
from patchclamp._receipts import Edits, Receipt
from patchclamp._results import Activation, Activations, Tokens
from patchclamp._rpc import Deadline
from patchclamp._status import error_of_run
from patchclamp._tensors import TensorAssembler, damaged
from patchclamp.errors import Error, InvalidArgument, Unavailable
from patchclamp.v1 import generation_pb2 as pb

# How often a broken stream is taken up again, and how many seconds pass before the first time; twice that before the
# second, and so on.
RESUMPTIONS = 4
_FIRST_PAUSE = 0.2

# Reductions over the rows of one forward, which cannot be cut afterwards.
_REDUCED = ("mean", "moments")

_FINISHES: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CONTEXT: "context",
    pb.FINISH_REASON_ERROR: "error",
}


@dataclass
class _ArrivingSample:
    """A sample of which tokens may still come."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    announced: int = 0
    parts: dict[tuple[int, int], list[Activation]] = field(default_factory=dict)
    finish: FinishReason | None = None
    receipts: tuple[Receipt, ...] = ()
    error: Error | None = None

    def finished(self) -> Sample:
        """What came of it so far."""
        return Sample(
            text="".join(token.text for token in self.tokens),
            tokens=tuple(token.id for token in self.tokens),
            strings=tuple(token.string for token in self.tokens),
            logprobs=np.array([token.logprob for token in self.tokens], np.float32),
            top=tuple(token.top for token in self.tokens) if any(token.top for token in self.tokens) else (),
            finish_reason=self.finish,
            receipts=self.receipts,
            error=self.error,
            _parts=tuple(tuple(self.parts[key]) for key in sorted(self.parts)),
        )


@dataclass(frozen=True)
class _ArrivingToken:
    """A token of whose reads chunks may still come."""

    message: pb.GeneratedToken
    reads: list[tuple[tuple[int, int], ArrivingRead]]

    @property
    def complete(self) -> bool:
        return all(read.complete for _, read in self.reads)


class GenerationState:
    """Takes the messages of one generation as they come, over all the streams that it needs.

    `edits` are the interventions as they were written. A token counts as received when all of its reads are there: what
    broke off before is sent again.
    """

    def __init__(self, request: pb.GenerateRequest, edits: Edits) -> None:
        self.request = request
        self._edits = edits
        self._samples = [_ArrivingSample() for _ in range(request.sampling.samples)]
        self._prompt: Tokens | None = None
        self._seed = 0
        self._summary: GenerationSummary | None = None
        self._complete = False
        self._resumptions = 0
        # The server tells nothing of a sample that had ended before: then each goes back by one token.
        self._overlapping = False
        self._reduced_over_positions = any(read.reduction.WhichOneof("kind") in _REDUCED for read in request.reads)
        self._begin()

    def _begin(self) -> None:
        """Forgets what belongs to one stream alone."""
        self._started = False
        self._tensors = TensorAssembler()
        self._arriving: deque[_ArrivingToken | pb.SampleEnd] = deque()
        for sample in self._samples:
            sample.announced = self._forced(sample)

    def _forced(self, sample: _ArrivingSample) -> int:
        """How many of its tokens the next stream is told. It would tell nothing of a sample that they complete: where
        the end of such a sample is missing, its last token is generated again."""
        count = len(sample.tokens)
        completed = self._overlapping or count == self.request.stop.max_new_tokens
        return count - 1 if count and completed and not sample.finish else count

    def _resuming(self) -> pb.GenerateRequest:
        """The request with what was received."""
        request = pb.GenerateRequest()
        request.CopyFrom(self.request)
        received = [
            pb.ReceivedSample(sample_index=number, token_ids=[token.id for token in sample.tokens[: sample.announced]])
            for number, sample in enumerate(self._samples)
            if sample.announced
        ]
        request.resume.CopyFrom(pb.Resume(received=received, seed=self._seed))
        return request

    def take(self, response: pb.GenerateResponse) -> list[GeneratedToken]:
        """One message; gives the tokens that are complete with it."""
        kind = response.WhichOneof("event")
        if kind in ("token", "sample_end", "summary") and not self._started:
            raise damaged(f"a {kind} before the start of a generation")
        match kind:
            case "start":
                self._take_start(response.start)
            case "token":
                self._take_token(response.token)
            case "sample_end":
                self._sample(response.sample_end.sample_index)
                self._arriving.append(response.sample_end)
            case "chunk":
                self._tensors.add(response.chunk)
            case "summary":
                self._take_summary(response.summary)
        return self._arrived()

    def pause(self, fault: Error, deadline: Deadline) -> float | None:
        """Seconds to wait before the broken stream is taken up again, with what is then `request`; None where nothing
        is missing but the summary. Raises the fault where it cannot be taken up: it never began, the fault is no broken
        connection, it broke too often, or a read cannot be gone on with."""
        if self._prompt is None:
            raise fault
        had_ended = self._resumptions > 0 and not self._overlapping and _says_that_all_had_ended(fault)
        if not (had_ended or (isinstance(fault, Unavailable) and self._resumptions < RESUMPTIONS)):
            raise fault
        if all(sample.finish for sample in self._samples):
            self._complete = True
            return None
        # The forwards of one stream are reduced together: what the next one gives first is not what is missing.
        if self._reduced_over_positions and any(sample.tokens for sample in self._samples):
            raise fault
        pause = 0.0 if had_ended else _FIRST_PAUSE * 2**self._resumptions * random.uniform(0.8, 1.2)
        if isinstance(fault, Unavailable) and fault.retry_after is not None:
            pause = max(pause, fault.retry_after)
        left = deadline.remaining()
        if left is not None and pause >= left:
            raise fault
        self._resumptions += 1
        self._overlapping = had_ended
        self._begin()
        self.request = self._resuming()
        return pause

    def finish(self) -> None:
        """The stream has ended. Raises the error of a sample where none went on."""
        if self._summary is None and not self._complete:
            raise damaged("the stream ended early")
        failures = [sample.error for sample in self._samples if sample.error is not None]
        if len(failures) == len(self._samples):
            raise failures[0]

    @property
    def result(self) -> Generation:
        """What came so far."""
        return Generation(
            prompt_tokens=self._prompt or Tokens((), (), (), self.request.prompt.text),
            samples=tuple(sample.finished() for sample in self._samples),
            seed=self._seed,
            summary=self._summary,
        )

    def _take_start(self, start: pb.GenerationStart) -> None:
        if self._started:
            raise damaged("a generation that started twice")
        prompt = tokens(start.prompt, self.request.prompt.text)
        if self._prompt is not None and (prompt.ids, start.seed) != (self._prompt.ids, self._seed):
            raise damaged("the stream was taken up with another prompt or seed")
        self._started, self._prompt, self._seed = True, prompt, start.seed

    def _take_token(self, message: pb.GeneratedToken) -> None:
        sample = self._sample(message.sample_index)
        if message.token_index != sample.announced:
            raise damaged(f"token {message.token_index} where {sample.announced} was due")
        sample.announced += 1
        assert self._prompt is not None
        length = len(self._prompt) + message.token_index
        reads = [
            (
                (read.read_index, read.hook_point.layer if read.hook_point.HasField("layer") else -1),
                arriving_read(read, self.request.reads, self._tensors, length),
            )
            for read in message.reads
        ]
        self._arriving.append(_ArrivingToken(message, reads))

    def _take_summary(self, summary: pb.GenerationSummary) -> None:
        waiting = any(isinstance(item, _ArrivingToken) and not item.complete for item in self._arriving)
        if waiting or not all(sample.finish for sample in self._samples):
            raise damaged("the stream ended before its samples")
        self._summary = GenerationSummary(
            summary.prompt_tokens,
            summary.generated_tokens,
            summary.first_token_seconds,
            summary.engine_seconds,
            summary.fingerprint,
        )

    def _arrived(self) -> list[GeneratedToken]:
        """The tokens that are complete, in the order in which they came."""
        found: list[GeneratedToken] = []
        while self._arriving:
            item = self._arriving[0]
            if isinstance(item, pb.SampleEnd):
                self._end(item)
            elif item.complete:
                found += self._receive(item)
            else:
                break
            self._arriving.popleft()
        return found

    def _receive(self, item: _ArrivingToken) -> list[GeneratedToken]:
        message, sample = item.message, self._samples[item.message.sample_index]
        if sample.finish is not None:
            if not self._resumptions:
                raise damaged(f"a token of sample {message.sample_index} behind its end")
            # It had failed before the stream broke; that the next stream got further changes nothing.
            return []
        if message.token_index < len(sample.tokens):
            if message.token.id != sample.tokens[message.token_index].id:
                raise damaged("the stream was taken up with another token")
            return []
        assert self._prompt is not None
        # What forwards before this one have seen was delivered with the tokens that they gave.
        seen = len(self._prompt) + len(sample.tokens) - 1 if sample.tokens else 0
        reads: list[Activation] = []
        for key, read in item.reads:
            activation = behind(_checked(read), seen)
            if activation is not None:
                sample.parts.setdefault(key, []).append(activation)
                reads.append(activation)
        token = GeneratedToken(
            index=message.token_index,
            sample=message.sample_index,
            id=message.token.id,
            text=message.text,
            string=message.token.text,
            start=message.token.start,
            end=message.token.end,
            logprob=message.logprob,
            top=tuple(map(top_token, message.top)),
            reads=Activations(reads),
        )
        sample.tokens.append(token)
        return [token]

    def _end(self, end: pb.SampleEnd) -> None:
        sample = self._samples[end.sample_index]
        if sample.finish is not None:
            if not self._resumptions:
                raise damaged(f"two ends of sample {end.sample_index}")
            return
        if end.HasField("failure"):
            sample.error = self._edits.explain(error_of_run(end.failure))
            sample.finish = "error"
            return
        finish = _FINISHES.get(end.finish_reason)
        if finish is None or finish == "error":
            raise damaged(f"a sample that ended for reason {end.finish_reason}")
        # A sample that ended as the stream broke is not run again, and so has none.
        sample.receipts = self._edits.receipts(end.receipts) if end.receipts or not self._resumptions else ()
        sample.finish = finish

    def _sample(self, index: int) -> _ArrivingSample:
        if index >= len(self._samples):
            raise damaged(f"an unexpected sample {index}")
        return self._samples[index]


def _says_that_all_had_ended(fault: Error) -> bool:
    """Whether the server refuses to take up a generation of which everything was received."""
    return isinstance(fault, InvalidArgument) and any(
        violation.field == "resume.received" for violation in fault.field_violations
    )


def _checked(read: ArrivingRead) -> Activation:
    """A read's activation, which has a row for each position."""
    activation = read.finish()
    axis = position_axis(activation)
    rows = activation.shape[axis] if axis < activation.ndim else -1
    if read.reduce not in WITHOUT_POSITIONS and rows != len(activation.positions):
        raise damaged(f"{rows} rows of {read.name} for {len(activation.positions)} positions")
    return activation
