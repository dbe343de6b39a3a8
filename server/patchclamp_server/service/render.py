"""Results as messages."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from patchclamp.v1 import intervention_pb2, logits_pb2, prompt_pb2, read_pb2, run_pb2
from patchclamp_server.adapters.tokenizer import Tokenizer, Tokens
from patchclamp_server.engine.messages import JobDone, LogitsOutput, ReadOutput, Reduction, RunFailed, RunFinished
from patchclamp_server.interventions.receipts import Receipt
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
        output = event.output
        top = _top_tokens(output.logits) + _top_tokens(output.baseline)
        positions = sum(len(read.positions) for read in output.reads)
        messages = len(self._tokens[event.run_index].ids) + top + len(output.reads) + len(output.receipts)
        return 32 * messages + positions

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
            fill_read(read, specs[read.read_index].reduction, self._outlet, wire.reads.add())
        if event.output.logits is not None:
            self._fill_logits(event.output.logits, wire.logits)
        if event.output.loss is not None:
            self._outlet.put(event.output.loss, wire.loss)
        for receipt in event.output.receipts:
            fill_receipt(receipt, wire.receipts.add())
        if event.output.baseline is not None:
            self._fill_logits(event.output.baseline, wire.baseline_logits)

    def _fill_logits(self, output: LogitsOutput, wire: logits_pb2.LogitsResult) -> None:
        wire.positions.extend(output.positions)
        if output.values is not None:
            self._outlet.put(output.values, wire.values)
        if output.logprobs is not None:
            self._outlet.put(output.logprobs, wire.logprobs)
        for token_id, logprob, logit in _most_probable(output):
            wire.top.add(id=token_id, text=self._piece(token_id), logprob=logprob, logit=logit)

    def _piece(self, token_id: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.piece(token_id)


def fill_read(output: ReadOutput, reduction: Reduction | None, outlet: Outlet, wire: read_pb2.ReadResult) -> None:
    """What one read gave in one layer."""
    hook_point = output.hook_point
    wire.read_index, wire.name = output.read_index, str(hook_point)
    wire.hook_point.site = SITE_TO_WIRE[hook_point.site]
    if hook_point.layer is not None:
        wire.hook_point.layer = hook_point.layer
    outlet.put(output.values, wire.values)
    if output.indices is not None:
        outlet.put(output.indices, wire.indices)
    if not drops_positions(reduction):
        _fill_positions(output.positions, wire)


def _fill_positions(positions: tuple[int, ...], wire: read_pb2.ReadResult) -> None:
    """By their ends where that says it all: a list would be as long as the run, once for every layer."""
    if are_consecutive(positions):
        wire.position_range.start, wire.position_range.stop = positions[0], positions[-1] + 1
    else:
        wire.positions.extend(positions)


def fill_receipt(receipt: Receipt, wire: intervention_pb2.Receipt) -> None:
    """What one intervention did."""
    wire.intervention_index = receipt.intervention
    wire.rows_selected, wire.rows_fired = receipt.rows_selected, receipt.rows_fired
    wire.rows_changed, wire.clipped = receipt.rows_changed, receipt.clipped
    wire.mean_delta, wire.max_delta = receipt.mean_delta, receipt.max_delta
    wire.no_effect = receipt.no_effect


def _top_tokens(logits: LogitsOutput | None) -> int:
    return 0 if logits is None or logits.top_ids is None else logits.top_ids.numel()


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
