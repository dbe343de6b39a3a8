"""What a generation gives, as messages."""

from __future__ import annotations

from collections.abc import Iterator

from patchclamp.v1 import generation_pb2
from patchclamp_server.adapters.tokenizer import Tokenizer
from patchclamp_server.engine.messages import Finish, JobDone, SampleEnded, SampleFailed, TokenGenerated
from patchclamp_server.service.generated_text import GeneratedText
from patchclamp_server.service.generation import ParsedGeneration
from patchclamp_server.service.jobs import SampleEvent
from patchclamp_server.service.render import fill_read, fill_receipt, fill_tokens
from patchclamp_server.service.status import run_failure
from patchclamp_server.service.tensors import Outlet

_FINISHES = {
    Finish.STOP: generation_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    Finish.CONTEXT: generation_pb2.FINISH_REASON_CONTEXT,
}


class GenerationRenderer:
    """Renders the events of one stream; tensors too large for a message wait in the outlet.

    The text of all tokens of a sample joined is the sample's text. What is held back until the sample ends is known
    only then, so a token that may be the last waits for the next event of its sample, which follows at once: the last
    one by number, or one whose id ends the sample. Where a stop text ends it, nothing is left to come.
    """

    def __init__(self, parsed: ParsedGeneration, tokenizer: Tokenizer | None, n_ctx: int, outlet: Outlet) -> None:
        self._parsed = parsed
        self._tokenizer = tokenizer
        self._outlet = outlet
        stop, n_prompt = parsed.spec.stop, len(parsed.tokens.ids)
        self._most = min(stop.max_new_tokens, n_ctx - n_prompt if n_ctx else stop.max_new_tokens)
        self._texts = [GeneratedText(tokenizer) for _ in parsed.numbers]
        for text, received in zip(self._texts, parsed.spec.received, strict=True):
            for token_id in received:
                text.append(token_id)
        self._kept: dict[int, TokenGenerated] = {}
        self.generated = 0

    def start(self) -> Iterator[generation_pb2.GenerateResponse]:
        """The beginning, and the ends of samples that had ended before."""
        response = generation_pb2.GenerateResponse()
        fill_tokens(self._parsed.tokens, response.start.prompt)
        response.start.seed = self._parsed.seed
        yield response
        for number, sample in enumerate(self._parsed.resumed):
            if sample.finish is not None:
                end = generation_pb2.SampleEnd(sample_index=number, finish_reason=_FINISHES[sample.finish])
                yield generation_pb2.GenerateResponse(sample_end=end)

    def effort(self, event: SampleEvent) -> int:
        """About as many bytes as there are to be written one by one, and positions to be looked through."""
        if not isinstance(event, TokenGenerated):
            return 0
        positions = sum(len(read.positions) for read in event.reads)
        return 32 * (1 + len(event.top_ids) + len(event.reads)) + positions

    def responses(self, event: SampleEvent) -> list[generation_pb2.GenerateResponse]:
        """The messages of an event; what waits in the outlet afterwards belongs to the first."""
        if isinstance(event, TokenGenerated):
            if self._may_be_last(event):
                self._kept[event.sample] = event
                return []
            return [self._token(event, event.text)]
        kept, rest = self._kept.pop(event.sample, None), event.text if isinstance(event, SampleEnded) else ""
        end = self._end(event)
        return [end] if kept is None else [self._token(kept, kept.text + rest), end]

    def summary(self, done: JobDone, first_token_seconds: float) -> generation_pb2.GenerateResponse:
        """The end of a successful stream."""
        summary = generation_pb2.GenerationSummary(
            prompt_tokens=len(self._parsed.tokens.ids),
            generated_tokens=self.generated,
            first_token_seconds=first_token_seconds,
            engine_seconds=done.engine_seconds,
            fingerprint=done.fingerprint,
        )
        return generation_pb2.GenerateResponse(summary=summary)

    def _may_be_last(self, event: TokenGenerated) -> bool:
        return event.index + 1 >= self._most or event.token_id in self._parsed.spec.stop.token_ids

    def _token(self, event: TokenGenerated, text: str) -> generation_pb2.GenerateResponse:
        self.generated += 1
        response = generation_pb2.GenerateResponse()
        wire = response.token
        wire.sample_index, wire.token_index = self._parsed.numbers[event.sample], event.index
        piece, start, end = self._texts[event.sample].append(event.token_id)
        wire.token.id, wire.token.text = event.token_id, piece
        wire.token.start, wire.token.end = start, end
        wire.text, wire.logprob = text, event.logprob
        for token_id, logprob in zip(event.top_ids, event.top_logprobs, strict=True):
            wire.top.add(id=token_id, text=self._piece(token_id), logprob=logprob)
        for read in event.reads:
            reduction = self._parsed.spec.reads[read.read_index].reduction
            fill_read(read, reduction, self._outlet, wire.reads.add())
        return response

    def _end(self, event: SampleEnded | SampleFailed) -> generation_pb2.GenerateResponse:
        response = generation_pb2.GenerateResponse()
        wire = response.sample_end
        wire.sample_index = self._parsed.numbers[event.sample]
        if isinstance(event, SampleFailed):
            wire.finish_reason = generation_pb2.FINISH_REASON_ERROR
            wire.failure.CopyFrom(run_failure(event.error))
            return response
        wire.finish_reason = _FINISHES[event.finish]
        for receipt in event.receipts:
            fill_receipt(receipt, wire.receipts.add())
        return response

    def _piece(self, token_id: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.piece(token_id)
