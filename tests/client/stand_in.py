"""A small server that answers with real messages, for tests of the SDK alone.

It tokenizes on spaces, and answers runs with what the test gives it: a script of messages, a failure, or a function of
the request.
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
    hook_point_pb2,
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
        answer.logits.positions.append(len(tokens) - 1)
        if run.logits.values:
            answer.logits.values.CopyFrom(inline(np.zeros((1, len(VOCABULARY)), np.float32)))
        for text, logprob in [(" Austin", -0.03), (" Dallas", -4.0), (" Texas", -5.0)][: run.logits.top_k]:
            answer.logits.top.add(id=VOCABULARY.index(text), text=text, logprob=logprob, logit=8.0)
        if run.logits.logprob_tokens:
            values = np.full((1, len(run.logits.logprob_tokens)), -1.5, np.float32)
            answer.logits.logprobs.CopyFrom(inline(values))
    if run.loss:
        answer.loss.CopyFrom(inline(np.ones(len(tokens) - 1, np.float32)))
    return answer


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
    failure = run_pb2.RunFailure(code=code, message=message, reason=reason, metadata=metadata)  # type: ignore[arg-type]
    return run_pb2.RunResponse(result=run_pb2.RunResult(run_index=index, failure=failure))
