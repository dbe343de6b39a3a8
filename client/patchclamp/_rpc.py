"""Calls over gRPC: channels, deadlines, and failures as errors of the tree."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from patchclamp import errors
from patchclamp._config import Config, check_timeout
from patchclamp._status import error_of
from patchclamp._version import __version__
from patchclamp.v1 import generation_pb2, model_pb2, model_pb2_grpc, run_pb2, run_pb2_grpc

Request = TypeVar("Request")
Response = TypeVar("Response")

# Results come in chunks of 1 MiB; what does not (tokens, names, top tokens of many rows) stays well below this.
RECEIVE_LIMIT = 16 << 20
_FOREVER = 1e8  # three years: more overflows on the way
_CALLERS_THREAD = "SingleThreadedUnaryStream"  # grpc.experimental.ChannelOptions
_RETRIED = ("patchclamp.v1.ModelService", "patchclamp.v1.RunService")


@dataclass(frozen=True)
class Method(Generic[Request, Response]):
    """One method of a service, with the types that its generated stub does not tell."""

    stub: Callable[[Any], Any]
    name: str

    def on(self, channel: Any) -> Any:
        """The callable of this method on a channel."""
        return getattr(self.stub(channel), self.name)


DESCRIBE: Method[model_pb2.DescribeRequest, model_pb2.DescribeResponse] = Method(
    model_pb2_grpc.ModelServiceStub, "Describe"
)
TOKENIZE: Method[model_pb2.TokenizeRequest, model_pb2.TokenizeResponse] = Method(
    model_pb2_grpc.ModelServiceStub, "Tokenize"
)
RUN: Method[run_pb2.RunRequest, run_pb2.RunResponse] = Method(run_pb2_grpc.RunServiceStub, "Run")
GENERATE: Method[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse] = Method(
    run_pb2_grpc.RunServiceStub, "Generate"
)


class Deadline:
    """When a verb must be done, whatever number of calls it makes."""

    def __init__(self, timeout: float | None, default: float) -> None:
        self._end = time.monotonic() + (default if timeout is None else check_timeout(timeout))

    def remaining(self) -> float | None:
        """Seconds left, which travel as the call's deadline; None for no deadline."""
        left = self._end - time.monotonic()
        return None if left > _FOREVER else max(left, 0.0)


class Responses(Iterator[Response]):
    """The responses of one call, as they come. Closing it cancels the call; any thread may do that."""

    def __init__(self, call: Any, failure_of: Callable[[grpc.RpcError], errors.Error]) -> None:
        self._call = call
        self._failure_of = failure_of

    def __next__(self) -> Response:
        try:
            response: Response = next(self._call)
        except grpc.RpcError as fault:
            raise self._failure_of(fault) from fault
        return response

    def close(self) -> None:
        """Cancels the call, unless it has ended."""
        self._call.cancel()


class AsyncResponses(AsyncIterator[Response]):
    """The responses of one call, as they come. Closing it cancels the call; any task of the loop may do that."""

    def __init__(
        self, call: Any, failure_of: Callable[[grpc.RpcError], errors.Error], tell_if_closed: Callable[[], None]
    ) -> None:
        self._call = call
        self._messages: AsyncIterator[Response] = aiter(call)
        self._failure_of = failure_of
        self._tell_if_closed = tell_if_closed

    async def __anext__(self) -> Response:
        try:
            return await anext(self._messages)
        except grpc.RpcError as fault:
            raise self._failure_of(fault) from fault
        except asyncio.CancelledError:
            self._tell_if_closed()
            raise

    def cancel(self) -> None:
        """Cancels the call, unless it has ended."""
        self._call.cancel()

    async def aclose(self) -> None:
        """`cancel`, for `contextlib.aclosing`."""
        self.cancel()


class Connection:
    """A channel that is opened on first use."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._closed = False

    def unary(self, method: Method[Request, Response], request: Request, deadline: Deadline) -> Response:
        """One request, one response."""
        callable_ = method.on(self._open())
        try:
            response: Response = callable_(request, timeout=deadline.remaining(), metadata=self._config.metadata)
        except grpc.RpcError as fault:
            raise failure(fault, self._config, closed=self._closed) from fault
        return response

    def stream(self, method: Method[Request, Response], request: Request, deadline: Deadline) -> Responses[Response]:
        """One request, many responses. The request is on its way when this returns."""
        call = method.on(self._open())(request, timeout=deadline.remaining(), metadata=self._config.metadata)
        return Responses(call, self._failure)

    def close(self) -> None:
        """Closes the channel; calls in progress end as Cancelled."""
        with self._lock:
            self._closed = True
            if self._channel is not None:
                self._channel.close()

    def _failure(self, fault: grpc.RpcError) -> errors.Error:
        return failure(fault, self._config, closed=self._closed)

    def _open(self) -> grpc.Channel:
        with self._lock:
            if self._closed:
                raise RuntimeError("this client is closed")
            if self._channel is None:
                credentials = self._config.credentials()
                # The caller's thread takes its stream's messages itself, instead of one that is started for every call.
                options = [*channel_options(self._config), (_CALLERS_THREAD, 1)]
                if credentials is None:
                    self._channel = grpc.insecure_channel(self._config.target, options=options)
                else:
                    self._channel = grpc.secure_channel(self._config.target, credentials, options=options)
            return self._channel


class AsyncConnection:
    """A channel that is opened on first use, for asyncio. It belongs to the event loop that first uses it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def unary(self, method: Method[Request, Response], request: Request, deadline: Deadline) -> Response:
        """One request, one response."""
        callable_ = method.on(self._open())
        try:
            response: Response = await callable_(request, timeout=deadline.remaining(), metadata=self._config.metadata)
        except grpc.RpcError as fault:
            raise failure(fault, self._config, closed=self._closed) from fault
        except asyncio.CancelledError:
            self._tell_if_closed()
            raise
        return response

    def stream(
        self, method: Method[Request, Response], request: Request, deadline: Deadline
    ) -> AsyncResponses[Response]:
        """One request, many responses. The request is on its way when this returns."""
        call = method.on(self._open())(request, timeout=deadline.remaining(), metadata=self._config.metadata)
        return AsyncResponses(call, self._failure, self._tell_if_closed)

    async def close(self) -> None:
        """Closes the channel; calls in progress end as Cancelled."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    def _failure(self, fault: grpc.RpcError) -> errors.Error:
        return failure(fault, self._config, closed=self._closed)

    def _tell_if_closed(self) -> None:
        """gRPC tells a task of a closed channel by CancelledError, which only a cancelled task should see."""
        task = asyncio.current_task()
        if self._closed and task is not None and not task.cancelling():
            raise errors.Cancelled("the client was closed during the call", reason="CANCELLED") from None

    def _open(self) -> grpc.aio.Channel:
        if self._closed:
            raise RuntimeError("this client is closed")
        if self._channel is None:
            credentials, options = self._config.credentials(), channel_options(self._config)
            if credentials is None:
                self._channel = grpc.aio.insecure_channel(self._config.target, options=options)
            else:
                self._channel = grpc.aio.secure_channel(self._config.target, credentials, options=options)
        return self._channel


def channel_options(config: Config) -> list[tuple[str, str | int]]:
    """How a channel behaves: limits, keepalive, retries and load balancing."""
    options: list[tuple[str, str | int]] = [
        ("grpc.primary_user_agent", f"patchclamp/{__version__}"),
        ("grpc.max_receive_message_length", RECEIVE_LIMIT),
        # A connection that died in silence is noticed within 40 seconds, also between calls.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.service_config", json.dumps(service_config(config))),
    ]
    if config.loopback:
        # A proxy that is meant for the world outside would be asked for this machine too.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def service_config(config: Config) -> dict[str, Any]:
    """Every method served can be repeated (what a run keeps goes by itself): gRPC retries what no server took on."""
    settings: dict[str, Any] = {
        "methodConfig": [
            {
                "name": [{"service": service} for service in _RETRIED],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    if config.target.startswith("dns:"):
        # A name may stand for many replicas: take turns, and leave out those that are not serving.
        settings["loadBalancingConfig"] = [{"round_robin": {}}]
        settings["healthCheckConfig"] = {"serviceName": ""}
    return settings


def failure(fault: Any, config: Config, *, closed: bool) -> errors.Error:
    """The error of a failed call."""
    code: grpc.StatusCode = fault.code() or grpc.StatusCode.UNKNOWN
    trailers: Iterable[tuple[str, str | bytes]] = fault.trailing_metadata() or ()
    error = error_of(code, fault.details() or "", trailers)
    if code is grpc.StatusCode.CANCELLED and not closed:
        # Nobody here cancelled: a server that stops reports its calls so.
        return errors.Unavailable(
            f"the server at {config.target} ended the call: {error.message}",
            reason=error.reason,
            metadata=error.metadata,
            request_id=error.request_id,
        )
    if error.reason:
        return error
    # Without a reason it was not a patchclamp server that spoke.
    if isinstance(error, errors.Unavailable):
        hint = "" if config.tls is False else " (a missing client certificate looks like this too)"
        error.say(f"no server answers at {config.target}{hint}: {error.message}")
    if isinstance(error, errors.Unimplemented):
        error.say(f"the server at {config.target} lacks this method; is it an older patchclamp? {error.message}")
    if isinstance(error, errors.DeadlineExceeded):
        error.reason = "DEADLINE_EXCEEDED"
        error.say(f"no answer from {config.target} within the timeout")
    return error
