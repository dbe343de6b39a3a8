"""What can go wrong.

Error
├── InvalidArgument            bad input: `field_violations` lists every fault, not the first
├── NotFound                   a model, handle or direction that is not there
├── AlreadyExists              the name is taken
├── FailedPrecondition         well-formed, but not possible in this state or with this model
│   └── InterventionNeverFired an intervention selected no position of its run
├── Aborted                    the etag is not the current one
├── TooLarge                   beyond a limit of the server, never fits: `limit`, `demand`
├── Overloaded                 too much work is waiting; try again after `retry_after` seconds
├── QuotaExceeded              the tenant's quota is used up: `quotas`
├── DeadlineExceeded           the timeout passed
├── Cancelled                  the caller cancelled, or closed the client
├── Unavailable                no server there, or it is loading, draining or stopping
├── Unauthenticated            no valid token
├── PermissionDenied           the token lacks the scope
├── Unimplemented              this server does not serve it
└── Internal                   a fault of the server; its log has the details under `request_id`

What can be seen without asking a server, such as a misspelt hook point, fails with the same classes before anything is
sent. Arguments of a wrong Python type are a TypeError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import grpc

if TYPE_CHECKING:
    from patchclamp._generation import Generation
    from patchclamp._results import Run


@dataclass(frozen=True)
class FieldViolation:
    """One fault of the input: where it is, and what would be valid."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


@dataclass(frozen=True)
class QuotaViolation:
    """One quota that is used up."""

    subject: str
    description: str


class Error(Exception):
    """Base of all.

    `code` is the canonical gRPC code, `reason` the name of an `ErrorReason` without its prefix (empty where none was
    given), `metadata` facts that belong to it, `request_id` what finds the call in the server's log.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    #: Set on the error that `run_many`, or a verb with a list of prompts, raises: what each gave, failed ones as their
    #: errors.
    results: Sequence[Run | Generation | Error] = ()

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message

    def say(self, message: str) -> None:
        """Puts it in other words."""
        self.message, self.args = message, (message,)

    def _number(self, key: str) -> int | None:
        """A whole number from the metadata."""
        text = self.metadata.get(key, "")
        return int(text) if text.isascii() and text.isdigit() else None


class InvalidArgument(Error):
    """Bad input. `field_violations` lists every fault."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(
        self,
        message: str = "",
        *,
        field_violations: Sequence[FieldViolation] = (),
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        text = message or "; ".join(map(str, field_violations))
        super().__init__(text, code=code, reason=reason, metadata=metadata, request_id=request_id)
        self.field_violations = tuple(field_violations)

    def __str__(self) -> str:
        if not self.field_violations:
            return self.message
        # A server's message repeats its violations, cut short where they are many.
        said_already = self.field_violations[0].description in self.message
        if said_already and len(self.field_violations) == 1:
            return str(self.field_violations[0])
        headline = f"{len(self.field_violations)} faults" if said_already else self.message
        return "\n".join([f"{headline}:", *(f"  {violation}" for violation in self.field_violations)])


class NotFound(Error):
    """Something that the request names is not there. `resource` is its name where the server gave one."""

    default_code = grpc.StatusCode.NOT_FOUND
    resource: str = ""


class AlreadyExists(Error):
    """The name is taken."""

    default_code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(Error):
    """Well-formed, but not possible in this state or with this model."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class InterventionNeverFired(FailedPrecondition):
    """An intervention selected no position of its run."""


class Aborted(Error):
    """The etag is not the current one: read again, then write."""

    default_code = grpc.StatusCode.ABORTED


class TooLarge(Error):
    """Beyond a limit of the server: this request never fits."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED

    @property
    def limit(self) -> int | None:
        """What the server allows, where it said so."""
        return self._number("limit")

    @property
    def demand(self) -> int | None:
        """What the request asked for, where the server said so."""
        return self._number("demand")


class Overloaded(Error):
    """Too much work is waiting. `retry_after` is in seconds, None where the server gave no advice."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retry_after: float | None = None


class QuotaExceeded(Error):
    """The tenant's quota is used up. `quotas` says which."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    quotas: tuple[QuotaViolation, ...] = ()
    retry_after: float | None = None


class DeadlineExceeded(Error):
    """The timeout passed, or the server saw that it cannot be met."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(Error):
    """The caller cancelled, or closed the client during the call."""

    default_code = grpc.StatusCode.CANCELLED


class Unavailable(Error):
    """No server answers there, or it is loading, draining or stopping."""

    default_code = grpc.StatusCode.UNAVAILABLE
    retry_after: float | None = None


class Unauthenticated(Error):
    """No valid token."""

    default_code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(Error):
    """The token lacks the scope; metadata `scope` names it."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(Error):
    """This server does not serve it; metadata `arm` names what."""

    default_code = grpc.StatusCode.UNIMPLEMENTED


class Internal(Error):
    """A fault of the server, or an answer that arrived damaged (reason `DATA_LOSS`)."""

    default_code = grpc.StatusCode.INTERNAL

    def __str__(self) -> str:
        said_already = self.request_id in self.message
        return self.message if said_already else f"{self.message} (request {self.request_id})"


def invalid_field(field: str, description: str) -> InvalidArgument:
    """The error of one fault that was seen before anything was sent."""
    return InvalidArgument(field_violations=[FieldViolation(field, description)], reason="INVALID_FIELD")
