"""Interventions as JSON: a list of `patchclamp.v1.Intervention` in protobuf's JSON form, for the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from patchclamp._hookpoints import name_of
from patchclamp._interventions import Intervention, Known
from patchclamp.errors import FieldViolation, InvalidArgument, invalid_field
from patchclamp.v1 import intervention_pb2 as pb


@dataclass(frozen=True)
class Ready(Intervention):
    """An intervention that came as a message: it travels as it is."""

    message: pb.Intervention

    @property
    def kind(self) -> str:
        return str(self.message.WhichOneof("op"))

    @property
    def where(self) -> str:
        op = getattr(self.message, self.kind)
        if "target" in op.DESCRIPTOR.fields_by_name:
            return name_of(op.target.hook_point)
        match self.kind:
            case "knockout":
                return f"blocks.{op.layer}.attn.scores"
            case "feature":
                return f"blocks.{op.feature.layer}.features[{op.feature.feature}]"
            case "freeze":
                return f"run {op.source_run}"
            case _:
                return "every write"

    @property
    def count(self) -> int:
        return 1

    def messages(self, known: Known) -> list[pb.Intervention]:
        return [self.message]

    def __repr__(self) -> str:
        return f"<{self.kind} of {self.where}>"


def from_json(text: str, field: str) -> list[Ready]:
    """The interventions of a JSON list. All that is wrong with them fails at once, as InvalidArgument."""
    try:
        items = json.loads(text)
    except json.JSONDecodeError as fault:
        raise invalid_field(field, f"line {fault.lineno}, column {fault.colno}: {fault.msg}") from None
    except RecursionError:
        raise invalid_field(field, "nested too deeply") from None
    if not isinstance(items, list):
        raise invalid_field(field, "a list is needed: [{..}, ..], in the JSON form of patchclamp.v1.Intervention")
    parsed = [_one(item, f"{field}[{number}]") for number, item in enumerate(items)]
    violations = [item for item in parsed if isinstance(item, FieldViolation)]
    if violations:
        raise InvalidArgument(field_violations=violations, reason="INVALID_FIELD")
    return [item for item in parsed if isinstance(item, Ready)]


def _one(item: Any, field: str) -> Ready | FieldViolation:
    if not isinstance(item, dict):
        return FieldViolation(field, f"an object is needed, not {json.dumps(item)[:40]}")
    message = pb.Intervention()
    try:
        json_format.ParseDict(item, message)
    except (json_format.ParseError, RecursionError) as fault:
        return FieldViolation(field, " ".join(str(fault).split()))
    if message.WhichOneof("op") is None:
        arms = ", ".join(arm.json_name for arm in message.DESCRIPTOR.oneofs_by_name["op"].fields)
        return FieldViolation(field, f"says nothing to do; one of {arms} is needed")
    return Ready(message)
