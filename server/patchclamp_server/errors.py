"""What can go wrong, as domain errors that know no gRPC.

Error
├── InvalidArgument       bad input: every field violation at once
├── NotFound              a model, handle or direction that is not there
├── FailedPrecondition    well-formed, but not possible in this state
├── TooLarge              beyond a limit; never fits (limit and demand)
├── Overloaded            would fit later (retry_after)
├── NotServed             an arm that this server does not serve yet
├── DeadlineExceeded
├── Cancelled
└── Unavailable           loading, draining, or the engine failed

The service's interceptor maps each to a canonical gRPC code and `google.rpc` details. `reason` is a value of the
protos' ErrorReason without its prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldViolation:
    """One invalid field: its path in the request (`runs[0].reads[2].hook_point.layer`), and what would be valid."""

    field: str
    description: str


class Error(Exception):
    """Base of all. `metadata` holds facts for machines, such as `limit` and `demand`."""

    reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str = "", metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = metadata or {}


class InvalidArgument(Error):
    """Bad input. Carries all violations, not the first."""

    reason = "INVALID_FIELD"

    def __init__(
        self, violations: Sequence[FieldViolation], *, reason: str = "", metadata: dict[str, str] | None = None
    ) -> None:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        super().__init__(text, reason=reason, metadata=metadata)
        self.violations = tuple(violations)


class NotFound(Error):
    """Something named in the request is not there."""

    reason = "MODEL_NOT_FOUND"


class FailedPrecondition(Error):
    """Well-formed, but not possible in this state or with this model."""

    reason = "UNSUPPORTED_BY_MODEL"


class TooLarge(Error):
    """Beyond a limit of this server: never fits."""

    reason = "REQUEST_TOO_LARGE"

    def __init__(self, what: str, *, limit: int, demand: int, reason: str = "") -> None:
        super().__init__(
            f"{what}: {demand:,} asked for, at most {limit:,} allowed",
            reason=reason,
            metadata={"limit": str(limit), "demand": str(demand)},
        )


class Overloaded(Error):
    """Too much work is waiting. `retry_after` is in seconds."""

    reason = "OVERLOADED"

    def __init__(self, message: str, *, retry_after: float, reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.retry_after = retry_after


class NotServed(Error):
    """A part of the contract that this server does not serve yet; metadata `arm` names it."""

    reason = "NOT_SERVED"

    def __init__(self, arm: str) -> None:
        super().__init__(f"{arm} is not served by this version of the server", metadata={"arm": arm})


class DeadlineExceeded(Error):
    """The request's deadline passed while it waited or ran."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(Error):
    """The caller cancelled."""

    reason = "CANCELLED"


class Unavailable(Error):
    """Loading, draining, stopping, or the engine failed."""

    reason = "NOT_SERVING"
