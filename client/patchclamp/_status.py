"""From a gRPC status to an error of the tree.

`google.rpc.Status` travels in the trailer `grpc-status-details-bin`. The packages that know its messages force a new
protobuf on whoever installs them, so the few fields that matter are read off the wire format here. Whatever is damaged
or unknown is left out; an error is never hidden by another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import grpc

from patchclamp import errors
from patchclamp.errors import FieldViolation, QuotaViolation
from patchclamp.v1 import error_pb2, failure_pb2

DETAILS_TRAILER = "grpc-status-details-bin"
REQUEST_ID_TRAILER = "x-request-id"
DOMAIN = "patchclamp"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LARGER_THAN_MAX = re.compile(r"larger than max.*?\((\d+) vs\. (\d+)\)")

_BY_CODE: dict[grpc.StatusCode, type[errors.Error]] = {
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNKNOWN: errors.Internal,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.ABORTED: errors.Aborted,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidArgument,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
    grpc.StatusCode.INTERNAL: errors.Internal,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DATA_LOSS: errors.Internal,
}
# One code stands for several things; the reason tells them apart.
_BY_REASON: dict[str, type[errors.Error]] = {
    "REQUEST_TOO_LARGE": errors.TooLarge,
    "DEVICE_OUT_OF_MEMORY": errors.TooLarge,
    "QUOTA_EXCEEDED": errors.QuotaExceeded,
    "INTERVENTION_NEVER_FIRED": errors.InterventionNeverFired,
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class _MalformedError(ValueError):
    """The bytes are no protobuf message."""


@dataclass
class Details:
    """What the details of a status say."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    field_violations: list[FieldViolation] = field(default_factory=list)
    quotas: list[QuotaViolation] = field(default_factory=list)
    retry_after: float | None = None
    resource: str = ""


def error_of(code: grpc.StatusCode, message: str, trailers: Iterable[tuple[str, str | bytes]]) -> errors.Error:
    """The error of a call that ended with this status."""
    # As a tuple first: grpc.aio's metadata has keys(), but does not take part in what dict() does with them. Binary
    # trailers are bytes, the others text.
    found = dict(tuple(trailers))
    raw = found.get(DETAILS_TRAILER)
    details = parse_details(raw) if isinstance(raw, bytes) else Details()
    request_id = found.get(REQUEST_ID_TRAILER, "")
    return _build(code, message, details, request_id if isinstance(request_id, str) else "")


def error_of_run(failure: failure_pb2.RunFailure) -> errors.Error:
    """The error of one run that failed while others went on."""
    reason = error_pb2.ErrorReason.Name(failure.reason) if failure.reason in error_pb2.ErrorReason.values() else ""
    name = "" if failure.reason == error_pb2.ERROR_REASON_UNSPECIFIED else reason.removeprefix("ERROR_REASON_")
    code = _CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
    return _build(code, failure.message, Details(reason=name, metadata=dict(failure.metadata)), "")


def _build(code: grpc.StatusCode, message: str, details: Details, request_id: str) -> errors.Error:
    too_large = _LARGER_THAN_MAX.search(message) if code is grpc.StatusCode.RESOURCE_EXHAUSTED else None
    if too_large and not details.reason:
        # gRPC's own refusal of a long message carries no details.
        details = Details("REQUEST_TOO_LARGE", {"demand": too_large[1], "limit": too_large[2]})
    kind = _BY_REASON.get(details.reason, _BY_CODE.get(code, errors.Internal))
    if kind.default_code is not code and kind is not _BY_CODE.get(code):
        # A reason that does not belong to its code: the code decides.
        kind = _BY_CODE.get(code, errors.Internal)
    message = message or code.name.replace("_", " ").lower()
    request_id = details.metadata.get("request_id", "") or request_id
    if issubclass(kind, errors.InvalidArgument):
        return kind(
            message,
            field_violations=details.field_violations,
            code=code,
            reason=details.reason,
            metadata=details.metadata,
            request_id=request_id,
        )
    error = kind(message, code=code, reason=details.reason, metadata=details.metadata, request_id=request_id)
    if isinstance(error, errors.Overloaded | errors.QuotaExceeded | errors.Unavailable):
        error.retry_after = details.retry_after
    if isinstance(error, errors.QuotaExceeded):
        error.quotas = tuple(details.quotas)
    if isinstance(error, errors.NotFound):
        error.resource = details.resource
    return error


def parse_details(data: bytes) -> Details:
    """What a serialized `google.rpc.Status` says; empty where it is damaged."""
    details = Details()
    try:
        for packed in _messages(data, 3):
            url, value = _text(packed, 1), _last(packed, 2)
            _read_detail(details, url.rpartition("/")[2], value)
    except _MalformedError:
        return Details()
    return details


def _read_detail(details: Details, kind: str, value: bytes) -> None:
    """Takes one of the status's details into account."""
    match kind:
        case "google.rpc.ErrorInfo" if _text(value, 2) == DOMAIN:
            details.reason = _text(value, 1)
            details.metadata = {_text(entry, 1): _text(entry, 2) for entry in _messages(value, 3)}
        case "google.rpc.BadRequest":
            details.field_violations += [
                FieldViolation(_text(violation, 1), _text(violation, 2)) for violation in _messages(value, 1)
            ]
        case "google.rpc.QuotaFailure":
            details.quotas += [
                QuotaViolation(_text(violation, 1), _text(violation, 2)) for violation in _messages(value, 1)
            ]
        case "google.rpc.RetryInfo":
            delay = _last(value, 1)
            details.retry_after = _number(delay, 1) + _number(delay, 2) / 1e9
        case "google.rpc.ResourceInfo":
            details.resource = _text(value, 2)


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    """Every value of a repeated message, string or bytes field."""
    return (value for found, value in _fields(data) if found == number and isinstance(value, bytes))


def _last(data: bytes, number: int) -> bytes:
    """The value of a singular message, string or bytes field; empty where it is not set."""
    value = b""
    for value in _messages(data, number):  # noqa: B007 (the last one counts)
        pass
    return value


def _text(data: bytes, number: int) -> str:
    return _last(data, number).decode("utf-8", "replace")


def _number(data: bytes, number: int) -> int:
    """The value of a signed integer field; 0 where it is not set."""
    values = [value for found, value in _fields(data) if found == number and isinstance(value, int)]
    value = values[-1] if values else 0
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field, in order."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, at = _varint(data, at)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise _MalformedError(f"wire type {wire_type}")
        if length > len(data) - at:
            raise _MalformedError("cut short")
        if wire_type == _BYTES:
            yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned varint and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _MalformedError("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise _MalformedError("a varint of more than ten bytes")
