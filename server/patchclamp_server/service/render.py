"""Results as messages."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from patchclamp.v1 import prompt_pb2, read_pb2, run_pb2
from patchclamp_server.adapters.tokenizer import Tokenizer, Tokens
from patchclamp_server.engine.messages import JobDone, LogitsOutput, ReadOutput, Reduction, RunFailed, RunFinished
from patchclamp_server.service.parse import ParsedRequest
from patchclamp_server.service.reads import drops_positions
from patchclamp_server.service.selection import are_consecutive
from patchclamp_server.service.sites import SITE_TO_WIRE
from patchclamp_server.service.status import run_failure
from patchclamp_server.service.tensors import Outlet


def fill_tokens(tokens: Tokens, wire: RepeatedCompositeFieldContainer[prompt_pb2.Token]) -> None:
    """Tokens with their text and where they stand in it."""
    for token_id, text, (start, end) in zip(tokens.ids, tokens.pieces, tokens.spans, strict=True):
        wire.add(id=token_id, text=text, start=start, end=end)


class ResultRenderer:
    """Renders the results of one stream; tensors too large for a message wait in the outlet.

    Messages are filled in place: protobuf copies a message that is put into another.
    """

    def __init__(self, parsed: ParsedRequest, tokenizer: Tokenizer | None, outlet: Outlet) -> None:
        self._tokens = parsed.tokens
        self._runs = parsed.runs
        self._tokenizer = tokenizer
        self._outlet = outlet

    def effort(self, event: RunFinished | RunFailed) -> int:
        """About as many bytes as there are to be written one by one, and positions to be looked through; tensors are
        neither, they travel as they are."""
        if isinstance(event, RunFailed):
            return 0
        logits, reads = event.output.logits, event.output.reads
        top = 0 if logits is None or logits.top_ids is None else logits.top_ids.numel()
        positions = sum(len(read.positions) for read in reads)
        return 32 * (len(self._tokens[event.run_index].ids) + top + len(reads)) + positions

    def fill(self, event: RunFinished | RunFailed, wire: run_pb2.RunResult) -> None:
        """What one run gave, or why it failed."""
        wire.run_index = event.run_index
        if isinstance(event, RunFailed):
            wire.failure.CopyFrom(run_failure(event.error))
            return
        tokens = self._tokens[event.run_index]
        wire.text = tokens.text
        fill_tokens(tokens, wire.tokens)
        specs = self._runs[event.run_index].reads
        for read in event.output.reads:
            self._fill_read(read, specs[read.read_index].reduction, wire.reads.add())
        if event.output.logits is not None:
            self._fill_logits(event.output.logits, wire.logits)
        if event.output.loss is not None:
            self._outlet.put(event.output.loss, wire.loss)

    def _fill_read(self, output: ReadOutput, reduction: Reduction | None, wire: read_pb2.ReadResult) -> None:
        hook_point = output.hook_point
        wire.read_index, wire.name = output.read_index, str(hook_point)
        wire.hook_point.site = SITE_TO_WIRE[hook_point.site]
        if hook_point.layer is not None:
            wire.hook_point.layer = hook_point.layer
        self._outlet.put(output.values, wire.values)
        if output.indices is not None:
            self._outlet.put(output.indices, wire.indices)
        if not drops_positions(reduction):
            _fill_positions(output.positions, wire)

    def _fill_logits(self, output: LogitsOutput, wire: run_pb2.LogitsResult) -> None:
        wire.positions.extend(output.positions)
        if output.values is not None:
            self._outlet.put(output.values, wire.values)
        if output.logprobs is not None:
            self._outlet.put(output.logprobs, wire.logprobs)
        for token_id, logprob, logit in _most_probable(output):
            wire.top.add(id=token_id, text=self._piece(token_id), logprob=logprob, logit=logit)

    def _piece(self, token_id: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.piece(token_id)


def _fill_positions(positions: tuple[int, ...], wire: read_pb2.ReadResult) -> None:
    """By their ends where that says it all: a list would be as long as the run, once for every layer."""
    if are_consecutive(positions):
        wire.position_range.start, wire.position_range.stop = positions[0], positions[-1] + 1
    else:
        wire.positions.extend(positions)


def _most_probable(output: LogitsOutput) -> Iterable[tuple[int, float, float]]:
    """Ids, log-probabilities and logits, row by row."""
    if output.top_ids is None or output.top_logprobs is None or output.top_logits is None:
        return ()
    columns = (output.top_ids, output.top_logprobs, output.top_logits)
    return zip(*(column.flatten().tolist() for column in columns), strict=True)


def render_summary(done: JobDone, prompt_tokens: int) -> run_pb2.RunSummary:
    """The end of a successful stream."""
    return run_pb2.RunSummary(
        prompt_tokens=prompt_tokens,
        queue_seconds=done.queue_seconds,
        engine_seconds=done.engine_seconds,
        fingerprint=done.fingerprint,
    )
