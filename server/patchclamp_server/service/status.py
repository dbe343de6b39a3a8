"""Domain errors as gRPC statuses with `google.rpc` details.

Details travel in the trailers, which receivers bound at 8 KiB by default: long lists are cut, and say by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status

from patchclamp.v1 import failure_pb2
from patchclamp_server.errors import (
    Cancelled,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    NotServed,
    Overloaded,
    TooLarge,
    Unavailable,
)

DOMAIN = "patchclamp"
REQUEST_ID = "x-request-id"

_CODES: dict[type[Error], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    TooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotServed: grpc.StatusCode.UNIMPLEMENTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}

_MESSAGE_BYTES = 1024
_VIOLATION_BYTES = 3072
_VALUE_BYTES = 1024


@dataclass(frozen=True)
class Failure:
    """How a call ends: what `context.abort` takes."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


def failure(error: Error, request_id: str) -> Failure:
    """The status of a call that failed with a domain error."""
    code = code_of(error)
    info = ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_metadata(error) | {"request_id": request_id})
    status = Status(code=_number(code), message=_cut(error.message, _MESSAGE_BYTES))
    status.details.extend(_packed(detail) for detail in (info, *_more(error)))
    trailers = (("grpc-status-details-bin", status.SerializeToString()), (REQUEST_ID, request_id))
    return Failure(code, status.message, trailers)


def internal(request_id: str) -> Error:
    """What a caller learns of a fault of the server: where the log speaks of it."""
    return Error(f"a fault of the server; its log has the details under the request id {request_id}")


def run_failure(error: Error) -> failure_pb2.RunFailure:
    """A run that failed while others of its request went on."""
    return failure_pb2.RunFailure(
        code=_number(code_of(error)),
        reason=f"ERROR_REASON_{error.reason}",
        message=_cut(error.message, _MESSAGE_BYTES),
        metadata=_metadata(error),
    )


def code_of(error: Error) -> grpc.StatusCode:
    """The canonical code of an error, by its kind."""
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), grpc.StatusCode.INTERNAL)


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number


def _metadata(error: Error) -> dict[str, str]:
    return {key: _cut(value, _VALUE_BYTES) for key, value in error.metadata.items()}


def _more(error: Error) -> list[Message]:
    """The details that fit this kind of error."""
    match error:
        case InvalidArgument(violations=violations):
            return [_bad_request(violations)]
        case Overloaded(retry_after=seconds):
            delay = Duration()
            delay.FromNanoseconds(int(seconds * 1e9))
            return [RetryInfo(retry_delay=delay)]
        case NotFound(metadata={"resource_type": kind, "resource_name": name}):
            return [ResourceInfo(resource_type=kind, resource_name=_cut(name, _VALUE_BYTES))]
        case _:
            return []


def _bad_request(violations: Sequence[FieldViolation]) -> BadRequest:
    shown, room = BadRequest(), _VIOLATION_BYTES
    for done, violation in enumerate(violations):
        field, text = _cut(violation.field, 256), _cut(violation.description, 512)
        room -= len(field.encode()) + len(text.encode()) + 8
        if room < 0:
            shown.field_violations.add(description=f"and {len(violations) - done} more")
            break
        shown.field_violations.add(field=field, description=text)
    return shown


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _cut(text: str, limit: int) -> str:
    """The text, or its beginning, within so many bytes as they travel: all that is not ASCII is percent-encoded."""
    cost = 0
    for index, character in enumerate(text):
        cost += 1 if " " <= character <= "~" else 3 * len(character.encode("utf-8", "replace"))
        if cost > limit:
            return f"{text[:index]} ..."
    return text
