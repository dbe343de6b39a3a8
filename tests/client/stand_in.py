"""A small server that answers with real messages, for tests of the SDK alone.

It tokenizes on spaces, and answers runs and generations with what the test gives it: a script of messages, a failure,
or a function of the request. Left alone, it generates the words of a story.
"""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from patchclamp.v1 import (
    failure_pb2,
    generation_pb2,
    handle_pb2,
    hook_point_pb2,
    intervention_pb2,
    logits_pb2,
    model_pb2,
    model_pb2_grpc,
    prompt_pb2,
    read_pb2,
    run_pb2,
    run_pb2_grpc,
    tensor_pb2,
)

VOCABULARY = ["<bos>", "<unk>", "Fact", ":", " the", " capital", " of", " Texas", " is", " Austin", " Dallas", "Austin"]
Responses = Iterable[run_pb2.RunResponse]
Tokens = Iterable[generation_pb2.GenerateResponse]
# What it generates: the ids of these words, over and over.
STORY = [5, 6, 7, 8, 9, 3]


@dataclass
class Failure(Exception):
    """Ends a call with a status."""

    code: grpc.StatusCode
    message: str = ""
    trailers: tuple[tuple[str, str | bytes], ...] = ()


@dataclass
class StandIn:
    """What the server answers and what it saw. While `hold` is there and not set, calls wait."""

    target: str = ""
    on_run: Callable[[run_pb2.RunRequest], Responses] | None = None
    on_generate: Callable[[generation_pb2.GenerateRequest], Tokens] | None = None
    fail: list[Failure] = field(default_factory=list)
    seconds_to_tokenize: float = 0.0
    hold: threading.Event | None = None
    calls: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    seconds_left: list[float | None] = field(default_factory=list)
    began: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def seen(self, kind: type[Any]) -> list[Any]:
        """The requests of one kind."""
        return [call for call in self.calls if isinstance(call, kind)]

    def note(self, request: Any, context: Any) -> None:
        self.calls.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.seconds_left.append(context.time_remaining())
        context.add_callback(self.ended.set)
        self.began.set()
        if self.hold:
            self.hold.wait(20)
        if self.fail:
            failure = self.fail.pop(0)
            context.set_trailing_metadata(failure.trailers)
            context.abort(failure.code, failure.message)


class _Models(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, state: StandIn) -> None:
        self._state = state

    def Describe(self, request: Any, context: Any) -> model_pb2.DescribeResponse:
        self._state.note(request, context)
        return describe_response()

    def Tokenize(self, request: Any, context: Any) -> model_pb2.TokenizeResponse:
        self._state.note(request, context)
        time.sleep(self._state.seconds_to_tokenize)
        return model_pb2.TokenizeResponse(prompts=[tokenized(prompt) for prompt in request.prompts])


class _Runs(run_pb2_grpc.RunServiceServicer):
    def __init__(self, state: StandIn) -> None:
        self._state = state

    def Run(self, request: Any, context: Any) -> Iterator[run_pb2.RunResponse]:
        self._state.note(request, context)
        yield from (self._state.on_run or echo)(request)

    def Generate(self, request: Any, context: Any) -> Iterator[generation_pb2.GenerateResponse]:
        self._state.note(request, context)
        try:
            yield from (self._state.on_generate or story)(request)
        except Failure as failure:
            context.set_trailing_metadata(failure.trailers)
            context.abort(failure.code, failure.message)


def start(state: StandIn, *addresses: str) -> grpc.Server:
    """Serves the state on a free port, whose address it notes in `state.target`, and on further addresses."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    model_pb2_grpc.add_ModelServiceServicer_to_server(_Models(state), server)
    run_pb2_grpc.add_RunServiceServicer_to_server(_Runs(state), server)
    state.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    for address in addresses:
        server.add_insecure_port(address)
    server.start()
    return server


def tokenized(prompt: prompt_pb2.Prompt) -> model_pb2.TokenizedPrompt:
    """Words with their leading space; a BOS before text."""
    if prompt.HasField("token_ids"):
        pieces = [VOCABULARY[token_id] for token_id in prompt.token_ids.ids]
        return _tokens(pieces, "".join(pieces))
    text = prompt.text
    if prompt.HasField("chat"):
        text = "".join(f"<{message.role}> {message.content}" for message in prompt.chat.messages)
    bos = [] if prompt.omit_special_tokens or prompt.HasField("chat") else [""]
    return _tokens([*bos, *re.findall(r"[:]| ?[^\s:]+", text)], text)


def _tokens(pieces: list[str], text: str) -> model_pb2.TokenizedPrompt:
    tokens, end = [], 0
    for piece in pieces:
        start, end = end, end + len(piece)
        known = piece if piece in VOCABULARY else "<unk>"
        shown = piece if piece else "<bos>"
        token_id = VOCABULARY.index(known if piece else "<bos>")
        tokens.append(prompt_pb2.Token(id=token_id, text=known if token_id == 1 else shown, start=start, end=end))
    return model_pb2.TokenizedPrompt(tokens=tokens, text=text)


def echo(request: run_pb2.RunRequest) -> Responses:
    """Answers every run: position by position values for reads of layers 0 and 1, and three likely tokens."""
    for index, run in enumerate(request.runs):
        yield run_pb2.RunResponse(result=result(index, run))
    yield summary()


def result(index: int, run: run_pb2.RunSpec) -> run_pb2.RunResult:
    """One run's answer."""
    tokens = tokenized(run.prompt).tokens
    answer = run_pb2.RunResult(run_index=index, tokens=tokens)
    for read_index, read in enumerate(run.reads):
        site = read.hook_point.site
        name = hook_point_pb2.Site.Name(site).removeprefix("SITE_").lower()
        for layer in [read.hook_point.layer] if read.hook_point.HasField("layer") else [0, 1]:
            values = np.arange(len(tokens) * 4, dtype=np.float32).reshape(len(tokens), 4) + layer
            hook_point = hook_point_pb2.HookPoint(site=site, layer=layer)
            answer.reads.add(
                read_index=read_index,
                hook_point=hook_point,
                name=f"blocks.{layer}.{name}",
                values=inline(values),
                position_range=position_range(read, len(tokens)),
            )
    if run.HasField("logits"):
        answer.logits.CopyFrom(logits(run.logits, len(tokens) - 1, [" Austin", " Dallas", " Texas"]))
        if run.baseline:
            answer.baseline_logits.CopyFrom(logits(run.logits, len(tokens) - 1, [" Dallas", " Texas", " Austin"]))
    for number in range(len(run.interventions)):
        answer.receipts.append(receipt(number, len(tokens)))
    for number, keep in enumerate(run.keep):
        for layer in [keep.read.hook_point.layer] if keep.read.hook_point.HasField("layer") else [0, 1]:
            answer.handles.append(handle(number, keep.read.hook_point.site, layer, len(tokens)))
    if run.loss:
        answer.loss.CopyFrom(inline(np.ones(len(tokens) - 1, np.float32)))
    return answer


def story(request: generation_pb2.GenerateRequest) -> Tokens:
    """Generates words, one of each sample in turn, and goes on behind what was received."""
    yield started(request)
    received = {sample.sample_index: len(sample.token_ids) for sample in request.resume.received}
    for index in range(request.stop.max_new_tokens):
        for sample in range(request.sampling.samples):
            if index >= received.get(sample, 0):
                yield generation_pb2.GenerateResponse(token=word(request, sample, index, received.get(sample, 0)))
    yield from ends(request)


def started(request: generation_pb2.GenerateRequest) -> generation_pb2.GenerateResponse:
    seed = request.sampling.seed if request.sampling.HasField("seed") else request.resume.seed or 99
    prompt = tokenized(request.prompt).tokens
    return generation_pb2.GenerateResponse(start=generation_pb2.GenerationStart(prompt=prompt, seed=seed))


def word(
    request: generation_pb2.GenerateRequest, sample: int, index: int, first: int = 0
) -> generation_pb2.GeneratedToken:
    """A word of the story; sample j is j words ahead. Reads have their position in each entry, for all positions that
    no token before this one has brought; `first` is the first token of the stream."""
    token_id = STORY[(index + sample) % len(STORY)]
    text = VOCABULARY[token_id]
    prompt = len(tokenized(request.prompt).tokens)
    stop = prompt + index
    start = 0 if index == 0 else stop - 1
    message = generation_pb2.GeneratedToken(
        sample_index=sample,
        token_index=index,
        token=prompt_pb2.Token(id=token_id, text=text, start=9 * index, end=9 * index + len(text)),
        text=text,
        logprob=-0.5 * (index + 1),
    )
    for k in range(request.top_logprobs):
        message.top.add(id=k, text=VOCABULARY[k], logprob=-1.0 - k)
    for number, read in enumerate(request.reads):
        values = np.repeat(np.arange(start, stop, dtype=np.float32)[:, None], 4, axis=1)
        message.reads.add(
            read_index=number,
            hook_point=read.hook_point,
            name=name_of(read.hook_point),
            values=inline(values),
            position_range=hook_point_pb2.PositionRange(start=start, stop=stop),
        )
    return message


def name_of(hook_point: hook_point_pb2.HookPoint) -> str:
    site = hook_point_pb2.Site.Name(hook_point.site).removeprefix("SITE_").lower().replace("attn_", "attn.")
    return f"blocks.{hook_point.layer}.{site}" if hook_point.HasField("layer") else site


def ends(request: generation_pb2.GenerateRequest) -> Tokens:
    """The ends of all samples, and the summary."""
    prompt = len(tokenized(request.prompt).tokens)
    for sample in range(request.sampling.samples):
        yield generation_pb2.GenerateResponse(sample_end=sample_end(request, sample))
    yield generation_pb2.GenerateResponse(
        summary=generation_pb2.GenerationSummary(
            prompt_tokens=prompt,
            generated_tokens=request.stop.max_new_tokens * request.sampling.samples,
            first_token_seconds=0.02,
            engine_seconds=0.1,
            fingerprint="f0",
        )
    )


def sample_end(request: generation_pb2.GenerateRequest, sample: int = 0) -> generation_pb2.SampleEnd:
    rows = len(tokenized(request.prompt).tokens) + request.stop.max_new_tokens - 1
    receipts = [receipt(number, rows) for number in range(len(request.interventions))]
    return generation_pb2.SampleEnd(
        sample_index=sample, finish_reason=generation_pb2.FINISH_REASON_LENGTH, receipts=receipts
    )


def logits(asked: logits_pb2.LogitsRequest, position: int, likely: list[str]) -> logits_pb2.LogitsResult:
    """The last row's logits: zeros, the tokens asked for at -1.5, and the likely ones most probable."""
    answer = logits_pb2.LogitsResult(positions=[position])
    if asked.values:
        answer.values.CopyFrom(inline(np.zeros((1, len(VOCABULARY)), np.float32)))
    for text, logprob in list(zip(likely, [-0.03, -4.0, -5.0], strict=True))[: asked.top_k]:
        answer.top.add(id=VOCABULARY.index(text), text=text, logprob=logprob, logit=8.0)
    if asked.logprob_tokens:
        answer.logprobs.CopyFrom(inline(np.full((1, len(asked.logprob_tokens)), -1.5, np.float32)))
    return answer


def receipt(number: int, rows: int, **changes: Any) -> intervention_pb2.Receipt:
    """A receipt of an intervention that fired on every row and changed all but the first."""
    told: dict[str, Any] = {
        "intervention_index": number,
        "rows_selected": rows,
        "rows_fired": rows,
        "rows_changed": rows - 1,
        "mean_delta": 0.25,
        "max_delta": 0.5,
        "clipped": 1,
    }
    return intervention_pb2.Receipt(**told | changes)


def handle(number: int, site: hook_point_pb2.Site, layer: int, rows: int) -> handle_pb2.Handle:
    """What the server keeps of one layer, for an hour."""
    kept = handle_pb2.Handle(
        name=f"replicas/r0/handles/k{number}l{layer}",
        model="stand-in",
        model_revision="abc123",
        hook_point=hook_point_pb2.HookPoint(site=site, layer=layer),
        dtype=tensor_pb2.DTYPE_BFLOAT16,
        shape=[rows, 4],
        size_bytes=rows * 8,
        owner="me",
        keep_index=number,
    )
    kept.create_time.FromSeconds(1_700_000_000)
    kept.expire_time.FromSeconds(1_700_003_600)
    return kept


def position_range(read: read_pb2.Read, length: int) -> hook_point_pb2.PositionRange | None:
    """All positions; none where the reduction drops their axis."""
    if read.reduction.WhichOneof("kind") in ("last", "mean", "moments"):
        return None
    return hook_point_pb2.PositionRange(start=0, stop=length)


def summary() -> run_pb2.RunResponse:
    return run_pb2.RunResponse(
        summary=run_pb2.RunSummary(prompt_tokens=9, queue_seconds=0.001, engine_seconds=0.01, fingerprint="f0")
    )


def inline(array: NDArray[Any]) -> tensor_pb2.Tensor:
    dtype = {np.dtype("f4"): tensor_pb2.DTYPE_FLOAT32, np.dtype("i4"): tensor_pb2.DTYPE_INT32}[array.dtype]
    return tensor_pb2.Tensor(dtype=dtype, shape=array.shape, inline=array.tobytes())


def streamed(
    array: NDArray[Any], tensor_id: int, size: int, dtype: int = tensor_pb2.DTYPE_FLOAT32
) -> tuple[tensor_pb2.Tensor, list[tensor_pb2.TensorChunk]]:
    """A header and its chunks of `size` bytes."""
    data = array.tobytes()
    header = tensor_pb2.Tensor(
        dtype=dtype,  # type: ignore[arg-type]
        shape=array.shape,
        streamed=tensor_pb2.StreamedContent(tensor_id=tensor_id, total_bytes=len(data)),
    )
    chunks = [
        tensor_pb2.TensorChunk(tensor_id=tensor_id, offset=offset, data=data[offset : offset + size])
        for offset in range(0, len(data), size)
    ]
    chunks[-1].crc32 = zlib.crc32(data)
    return header, chunks


def describe_response() -> model_pb2.DescribeResponse:
    pos = model_pb2.Axis(name="pos")
    return model_pb2.DescribeResponse(
        model=model_pb2.Model(
            name="stand-in",
            revision="abc123",
            architecture="StandInForCausalLM",
            dims=model_pb2.Dims(
                n_layers=2, n_heads=2, n_kv_heads=1, d_model=4, d_head=2, d_mlp=8, d_vocab=12, n_ctx=64
            ),
            dtype=tensor_pb2.DTYPE_FLOAT32,
            devices=["cpu"],
            parameters=1234,
            layout=model_pb2.BLOCK_LAYOUT_SEQUENTIAL,
        ),
        sites=[
            model_pb2.SiteInfo(
                site=hook_point_pb2.SITE_EMBED, name="embed", axes=[pos, model_pb2.Axis(name="d_model", size=4)]
            ),
            model_pb2.SiteInfo(
                site=hook_point_pb2.SITE_RESID_POST,
                name="resid_post",
                layers=[0, 1],
                axes=[pos, model_pb2.Axis(name="d_model", size=4)],
                writable=True,
            ),
        ],
        absent_sites=[
            model_pb2.AbsentSite(site=hook_point_pb2.SITE_POS_EMBED, name="pos_embed", reason="positions are rotary")
        ],
        limits=model_pb2.Limits(max_runs=16, max_tokens=4096, inline_bytes=1 << 20),
        capabilities=[
            model_pb2.Capability(name="runs", available=True),
            model_pb2.Capability(name="numerics.deterministic", reason="not proved on this device"),
        ],
        server_version="0.1.0",
    )


def failing_run(index: int, code: int, message: str, reason: int, metadata: dict[str, str]) -> run_pb2.RunResponse:
    """A run that fails alone."""
    failure = failure_pb2.RunFailure(code=code, message=message, reason=reason, metadata=metadata)  # type: ignore[arg-type]
    return run_pb2.RunResponse(result=run_pb2.RunResult(run_index=index, failure=failure))
