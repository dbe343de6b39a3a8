"""What this server can do, and what of the contract it does not serve."""

from __future__ import annotations

from patchclamp.v1 import intervention_pb2, model_pb2, vector_pb2
from patchclamp_server.adapters.facts import ModelFacts

_NOT_YET = "not served by this version"
_UNSERVED_EDITS = ("interventions.feature", "interventions.patch.handle")
_EDITS = tuple(
    f"interventions.{arm.name}" for arm in intervention_pb2.Intervention.DESCRIPTOR.oneofs_by_name["op"].fields
)

_SERVED = (
    "describe",
    "tokenize",
    "runs",
    "reads",
    "logits",
    "loss",
    "interventions",
    *(edit for edit in _EDITS if edit not in _UNSERVED_EDITS),
    "baseline",
    "generation",
    "vectors.tensor",
    "vectors.safetensors",
    "vectors.unembed_token",
    "numerics.default",
    "numerics.solo",
)
_UNSERVED = (
    "numerics.deterministic",
    *_UNSERVED_EDITS,
    *(
        f"vectors.{arm.name}"
        for arm in vector_pb2.VectorSource.DESCRIPTOR.oneofs_by_name["source"].fields
        if f"vectors.{arm.name}" not in _SERVED
    ),
    "keep",
    "handles",
    "profile",
    "transcoders",
    "attribution",
    "patching",
)


def capabilities(facts: ModelFacts) -> list[model_pb2.Capability]:
    """Every arm and option, by the name that the error of an unserved one carries, and what the model allows."""
    alone = facts.no_slots_reason
    reason = alone and f"generations of this model run one by one: {alone}"
    return [
        *(model_pb2.Capability(name=name, available=True) for name in _SERVED),
        model_pb2.Capability(name="generation.batched", available=not alone, reason=reason),
        *(model_pb2.Capability(name=name, available=False, reason=_NOT_YET) for name in _UNSERVED),
    ]
