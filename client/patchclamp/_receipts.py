"""Receipts: what interventions did, told of each as the caller wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from patchclamp._interventions import Intervention
from patchclamp._tensors import damaged
from patchclamp.errors import Error, FieldViolation, InvalidArgument
from patchclamp.v1 import intervention_pb2

_RUN = re.compile(r"\bruns\[(\d+)\]")
_INDEX = re.compile(r"\binterventions\[(\d+)\]")


@dataclass(frozen=True)
class Receipt:
    """What one intervention did in one run.

    `intervention` is the one that the caller wrote, `index` its place in the list. Where a steering profile brought it
    (`profile` is `name@version`), `intervention` is None and `index` the server's own.

    Rows are positions, summed over layers: `rows_selected` by `positions`, `rows_fired` those of them that met the
    condition, `rows_changed` those of these whose value changed. `mean_delta` is the mean over fired rows of
    norm(change) / norm(row), `max_delta` the largest, `clipped` the rows where a cap or bound was reached. `no_effect`:
    rows fired, and nothing changed.
    """

    intervention: Intervention | None
    index: int
    rows_selected: int
    rows_fired: int
    rows_changed: int
    mean_delta: float
    max_delta: float
    clipped: int
    no_effect: bool
    profile: str = ""


@dataclass(frozen=True)
class Edits:
    """The interventions of one run: as they were written, and which of those each one that travels belongs to."""

    written: tuple[Intervention, ...] = ()

    @property
    def origins(self) -> list[int]:
        """The index of the intervention as written, for each that travels."""
        return [number for number, intervention in enumerate(self.written) for _ in range(intervention.count)]

    def receipts(self, messages: Iterable[intervention_pb2.Receipt]) -> tuple[Receipt, ...]:
        """One receipt for each intervention as written, in their order; those of a profile come behind."""
        origins = self.origins
        parts: dict[int, intervention_pb2.Receipt] = {}
        of_profile: list[intervention_pb2.Receipt] = []
        for message in messages:
            index = message.intervention_index
            if message.profile:
                of_profile.append(message)
            elif index >= len(origins) or index in parts:
                raise damaged(f"a receipt of intervention {index}, which was not due")
            else:
                parts[index] = message
        if len(parts) < len(origins):
            raise damaged(f"{len(parts)} of {len(origins)} receipts")
        own = [
            _receipt(intervention, number, [parts[i] for i, origin in enumerate(origins) if origin == number])
            for number, intervention in enumerate(self.written)
        ]
        return (*own, *(_receipt(None, message.intervention_index, [message]) for message in of_profile))

    def explain(self, error: Error) -> Error:
        """The error of this run, naming interventions by their place in the caller's list."""
        if self.origins == list(range(len(self.written))):
            return error
        error.say(_INDEX.sub(self.place, error.message))
        named = error.metadata.get("intervention", "")
        if named.isascii() and named.isdigit() and int(named) < len(self.origins):
            error.metadata["intervention"] = str(self.origins[int(named)])
        return error

    def place(self, found: re.Match[str]) -> str:
        """What to write instead of an index among those that travelled."""
        index = int(found[1])
        return f"interventions[{self.origins[index]}]" if index < len(self.origins) else found[0]


def retold(runs: Sequence[Edits], error: Error) -> Error:
    """The error of a call, naming interventions by their place in the callers' lists, not by that among those sent."""
    if all(edits.origins == list(range(len(edits.written))) for edits in runs):
        return error
    error.say(_retold(runs, error.message))
    if isinstance(error, InvalidArgument):
        error.field_violations = tuple(
            FieldViolation(_retold(runs, violation.field), _retold(runs, violation.description, within=violation.field))
            for violation in error.field_violations
        )
    return error


def _retold(runs: Sequence[Edits], text: str, *, within: str = "") -> str:
    """Text with the callers' own indices. It is about the run that it names last, else about the one that `within`
    names."""

    def place(found: re.Match[str]) -> str:
        named = [*_RUN.finditer(within), *_RUN.finditer(text, 0, found.start())]
        if not named and len(runs) > 1:
            return found[0]
        run = int(named[-1][1]) if named else 0
        return runs[run].place(found) if run < len(runs) else found[0]

    return _INDEX.sub(place, text)


def _receipt(intervention: Intervention | None, index: int, parts: Sequence[intervention_pb2.Receipt]) -> Receipt:
    """One receipt of all parts that an intervention travelled as."""
    fired = sum(part.rows_fired for part in parts)
    changed = sum(part.rows_changed for part in parts)
    return Receipt(
        intervention=intervention,
        index=index,
        rows_selected=sum(part.rows_selected for part in parts),
        rows_fired=fired,
        rows_changed=changed,
        mean_delta=sum(part.mean_delta * part.rows_fired for part in parts) / fired if fired else 0.0,
        max_delta=max(part.max_delta for part in parts),
        clipped=sum(part.clipped for part in parts),
        no_effect=parts[0].no_effect if len(parts) == 1 else fired > 0 and not changed,
        profile=parts[0].profile,
    )
