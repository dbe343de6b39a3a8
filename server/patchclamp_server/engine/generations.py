"""Generations: the requests to generate that are in the engine, and what their callers are told."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from patchclamp_server.adapters.tokenizer import Tokenizer
from patchclamp_server.engine.continuation import Continuation
from patchclamp_server.engine.decoding import Chosen, Decoder, Failed, Outcome
from patchclamp_server.engine.editing import compile_edits
from patchclamp_server.engine.faults import as_error, make_room, raise_if_fatal
from patchclamp_server.engine.messages import (
    GenerationEvent,
    GenerationJob,
    JobDone,
    JobFailed,
    SampleEnded,
    SampleFailed,
    TokenGenerated,
)
from patchclamp_server.engine.runner import Runner
from patchclamp_server.engine.sample import Sample
from patchclamp_server.errors import Error, FailedPrecondition
from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.interventions.compiling import RowPlan
from patchclamp_server.interventions.ops import RowEdits


@dataclass(eq=False)
class Generation:
    """One request in the engine. Times on time.monotonic."""

    job: GenerationJob
    emit: Callable[[GenerationEvent], None]
    submitted: float
    unfinished: int
    cancelled: bool = False
    paused: bool = False
    started: float | None = None
    engine_seconds: float = 0.0

    @property
    def solo(self) -> bool:
        return self.job.solo

    @property
    def dead(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled or self.late

    @property
    def late(self) -> bool:
        return self.job.deadline is not None and time.monotonic() > self.job.deadline


class Generations:
    """All requests to generate, on one decoder."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, decoder: Decoder, fingerprint: str) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._fingerprint = fingerprint
        self.open: dict[int, Generation] = {}

    def add(self, job: GenerationJob, emit: Callable[[GenerationEvent], None]) -> None:
        """Takes a request in. It ends at once when its edits cannot be compiled."""
        generation = Generation(job, emit, time.monotonic(), len(job.spec.sampling))
        self.open[job.job_id] = generation
        try:
            edits = self._compiled(job)
            samples = [self._sample(generation, number, edits) for number in range(len(job.spec.sampling))]
        except Exception as fault:
            raise_if_fatal(fault)
            self.end(generation, as_error(fault, f"generation {job.job_id}"))
            return
        for sample in samples:
            self._decoder.add(sample)

    @property
    def busy(self) -> bool:
        """Whether a forward would bring anybody on."""
        return self._decoder.busy

    def advance(self, check: Callable[[], None]) -> None:
        """One forward for everybody, and the news of it."""
        began = time.monotonic()
        outcomes = self._decoder.advance(check)
        seconds = time.monotonic() - began
        for generation in {id(outcome.sample.owner): outcome.sample.owner for outcome in outcomes}.values():
            assert isinstance(generation, Generation)
            generation.started = generation.started or began
            generation.engine_seconds += seconds
        for outcome in outcomes:
            self._conclude(outcome)

    def end(self, generation: Generation, error: Error) -> None:
        """Ends a request early."""
        self._decoder.drop(generation)
        self.open.pop(generation.job.job_id, None)
        generation.emit(JobFailed(generation.job.job_id, error))

    def refuse_all(self, error: Error) -> None:
        """Ends every request. The decoder is left as it is: nothing more will run."""
        while self.open:
            job_id, generation = self.open.popitem()
            generation.emit(JobFailed(job_id, error))

    def _compiled(self, job: GenerationJob) -> RowPlan:
        spec = job.spec
        length = len(spec.prompt)
        # The last token is never seen by a forward.
        most = length + min(spec.stop.max_new_tokens, self._room(length)) - 1
        row = RowEdits(spec.interventions, prompt_length=length, max_length=most)
        return compile_edits(self._runner.adapter, row, _no_other_run)

    def _sample(self, generation: Generation, number: int, edits: RowPlan) -> Sample:
        spec = generation.job.spec
        continuation = Continuation(spec.prompt, spec.stop, self._room(len(spec.prompt)), self._decode)
        for token_id in spec.received[number] if number < len(spec.received) else ():
            continuation.append(token_id)
        # The rows before the newest token received came with it, or earlier.
        delivered = len(spec.prompt) + len(continuation.tokens) - 1 if continuation.tokens else 0
        return Sample(generation, number, spec, edits, continuation, delivered)

    def _room(self, prompt: int) -> int:
        """How many tokens can follow a prompt. A model may state no end of its context."""
        n_ctx = self._runner.adapter.dims.n_ctx
        return n_ctx - prompt if n_ctx else sys.maxsize

    def _decode(self, ids: Sequence[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(ids)

    def _conclude(self, outcome: Outcome) -> None:
        """Tells the news of one sample. What goes wrong with it concerns no other."""
        try:
            self._tell(outcome)
        except Exception as fault:
            raise_if_fatal(fault)
            make_room(fault)
            self._tell(Failed(outcome.sample, fault))

    def _tell(self, outcome: Outcome) -> None:
        sample = outcome.sample
        generation = sample.owner
        assert isinstance(generation, Generation)
        job_id = generation.job.job_id
        if isinstance(outcome, Chosen):
            index = len(sample.continuation.tokens)
            text = sample.continuation.append(outcome.token_id)
            reads = sample.take_reads(self._decoder.captures())
            generation.emit(
                TokenGenerated(
                    job_id, sample.number, index, outcome.token_id, text,
                    outcome.logprob, outcome.top_ids, outcome.top_logprobs, reads,
                )
            )  # fmt: skip
            if sample.continuation.finish is None:
                return
            ended = SampleEnded(
                job_id, sample.number, sample.continuation.finish, sample.continuation.rest(),
                self._decoder.receipts(sample),
            )  # fmt: skip
            generation.emit(ended)
        else:
            error = as_error(outcome.fault, f"sample {sample.number} of generation {job_id}")
            generation.emit(SampleFailed(job_id, sample.number, error))
        self._decoder.leave(sample)
        generation.unfinished -= 1
        if not generation.unfinished:
            self._done(generation)

    def _done(self, generation: Generation) -> None:
        job_id = generation.job.job_id
        self.open.pop(job_id, None)
        queued = (generation.started or generation.submitted) - generation.submitted
        generation.emit(JobDone(job_id, queued, generation.engine_seconds, self._fingerprint))


def _no_other_run(run: int, point: HookPoint) -> torch.Tensor:
    raise FailedPrecondition(f"a generation has no other run to take {point} from")
