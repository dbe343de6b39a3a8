"""What every call has in common: a request id, a line in the log, counts, and errors as statuses.

Requests reach the interceptor as bytes. gRPC would parse them before anyone is asked, and answer UNKNOWN to bytes that
are no message, and to messages beyond its limit without a reason that a program could read.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from patchclamp_server.errors import Error, FieldViolation, InvalidArgument, NotServed, TooLarge
from patchclamp_server.service.metrics import Method, Metrics
from patchclamp_server.service.status import REQUEST_ID, code_of, failure, internal

log = logging.getLogger(__name__)

OWN = "/patchclamp.v1."
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"
Behaviour = Callable[[Any, Context], Awaitable[Any]]
Decode = Callable[[bytes], Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of patchclamp's own services, unary and server-streaming alike; others pass."""

    def __init__(self, metrics: Metrics, max_message_bytes: int) -> None:
        self._metrics = metrics
        self._max_message_bytes = max_message_bytes
        self._wrapped: dict[str, Handler] = {}
        self._unknown: Handler = grpc.stream_stream_rpc_method_handler(self._refuse_unknown)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Waits until no call is in flight."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        path = handler_call_details.method
        if path in self._wrapped:
            return self._wrapped[path]
        handler = await continuation(handler_call_details)
        if not path.startswith(OWN):
            return handler
        if handler is None:
            return self._unknown
        return self._wrapped.setdefault(path, self._wrap(handler, path))

    def _wrap(self, handler: Handler, path: str) -> Handler:
        service, name = path.removeprefix("/").split("/")
        streams = handler.response_streaming
        method = Method("server_stream" if streams else "unary", service, name)
        # The types know of synchronous methods only.
        behaviour: Behaviour | None = cast("Any", handler.unary_stream if streams else handler.unary_unary)
        decode, encode = handler.request_deserializer, handler.response_serializer
        assert behaviour is not None and decode is not None, f"{path} takes a stream of requests"

        async def call(data: bytes, context: Context) -> Any:
            return await self._call(method, behaviour, decode, data, context)

        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return make(call, request_deserializer=None, response_serializer=encode)

    async def _refuse_unknown(self, requests: object, context: Context) -> None:
        async def refuse(request: object, context: Context) -> NoReturn:
            raise NotServed("this method")

        await self._call(Method("unknown", "unknown", "unknown"), refuse, bytes, b"", context)

    async def _call(self, method: Method, behaviour: Behaviour, decode: Decode, data: bytes, context: Context) -> Any:
        request_id = _request_id(context)
        context.set_trailing_metadata(((REQUEST_ID, request_id),))
        started, code = time.perf_counter(), grpc.StatusCode.OK
        self._enter(method)
        try:
            return await behaviour(self._decoded(decode, data), context)
        except Error as error:
            code = code_of(error)
            await _abort(context, error, request_id)
        except grpc.aio.AbortError:
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.InternalError:
            code = grpc.StatusCode.CANCELLED
            raise _gone() from None
        except asyncio.CancelledError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED if context.time_remaining() == 0 else grpc.StatusCode.CANCELLED
            raise
        except Exception:
            code = grpc.StatusCode.INTERNAL
            log.exception("%s %s failed", request_id, method)
            await _abort(context, internal(request_id), request_id)
        finally:
            seconds = time.perf_counter() - started
            self._leave(method, code, seconds)
            log.info("%s %s %s %.4f s", request_id, method, code.name, seconds)

    def _decoded(self, decode: Decode, data: bytes) -> Any:
        if len(data) > self._max_message_bytes:
            raise TooLarge("bytes of one request message", limit=self._max_message_bytes, demand=len(data))
        try:
            return decode(data)
        except DecodeError:
            violation = FieldViolation("", "the bytes are not the message that this method takes")
            raise InvalidArgument([violation], reason="MALFORMED_MESSAGE") from None

    def _enter(self, method: Method) -> None:
        self._in_flight += 1
        self._idle.clear()
        self._metrics.started(method)

    def _leave(self, method: Method, code: grpc.StatusCode, seconds: float) -> None:
        self._metrics.handled(method, code, seconds)
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()


def _request_id(context: Context) -> str:
    """The caller's own id where it is fit for logs and headers, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and _SANE_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


async def _abort(context: Context, error: Error, request_id: str) -> NoReturn:
    status = failure(error, request_id)
    try:
        await context.abort(status.code, status.message, status.trailers)
    except grpc.aio.InternalError:
        raise _gone() from None


def _gone() -> asyncio.CancelledError:
    """How a call ends whose caller is gone, so that nobody is left to answer: gRPC's own error for that, which writing
    then fails with, would leave a traceback in the log."""
    return asyncio.CancelledError("the caller is gone")
