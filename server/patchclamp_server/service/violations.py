"""What is wrong with one request, collected: a caller learns of every invalid field at once, not of the first."""

from __future__ import annotations

from patchclamp_server.errors import FieldViolation, InvalidArgument

# A request of a few megabytes can be wrong a million times.
MOST = 256


class Violations:
    """Field violations of one request, in the order in which they were found."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []
        self._more = 0
        self._reasons: set[str] = set()
        self._metadata: dict[str, str] = {}

    def add(self, field: str, description: str, *, reason: str = InvalidArgument.reason, **metadata: str) -> None:
        """Notes one; `metadata` are facts for machines."""
        self._reasons.add(reason)
        self._metadata |= metadata
        if len(self._found) == MOST:
            self._more += 1
        else:
            self._found.append(FieldViolation(field, description))

    def names(self, field: str) -> bool:
        """Whether something is noted for a field or a part of it."""
        parts = (f"{field}.", f"{field}[")
        return any(violation.field == field or violation.field.startswith(parts) for violation in self._found)

    def raise_any(self) -> None:
        """Raises InvalidArgument with all of them; its reason is theirs where they agree."""
        if not self._found:
            return
        more = [FieldViolation("", f"and {self._more} more")] if self._more else []
        reason = next(iter(self._reasons)) if len(self._reasons) == 1 else InvalidArgument.reason
        raise InvalidArgument([*self._found, *more], reason=reason, metadata=self._metadata)
