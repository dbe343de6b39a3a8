"""patchclamp: look inside a language model that runs elsewhere.

    import patchclamp as pc

    with pc.connect("localhost:50051") as client:
        run = client.run("The capital of Texas is", read="blocks.*.resid_post")
        print(run.top)
        print(run["blocks.3.resid_post"].shape)

`patchclamp.aio.connect` gives the same client for asyncio.
"""

from patchclamp import aio
from patchclamp._client import Client, connect
from patchclamp._edits import (
    ablate,
    ablate_everywhere,
    add,
    clamp,
    feature,
    freeze,
    knockout,
    mean,
    patch,
    resample,
    scale,
    set_coordinate,
    when,
    zero,
)
from patchclamp._generation import GeneratedToken, Generation, GenerationSummary, Sample
from patchclamp._handles import Handle
from patchclamp._interventions import Condition, Intervention
from patchclamp._model_info import AbsentSite, Axis, Capability, Dims, Limits, ModelInfo, SiteInfo, Sites, TranscoderSet
from patchclamp._positions import ALL, GENERATED, LAST, PROMPT, at
from patchclamp._reads import Read, read
from patchclamp._receipts import Receipt
from patchclamp._requests import RunSpec
from patchclamp._results import Activation, Activations, Baseline, Handles, Run, RunSummary, Token, Tokens, TopToken
from patchclamp._token_streams import AsyncGenerationStream, GenerationStream
from patchclamp._vectors import decoder, encoder, unembed
from patchclamp._version import __version__
from patchclamp.aio import AsyncClient
from patchclamp.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InterventionNeverFired,
    InvalidArgument,
    NotFound,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    QuotaViolation,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

__all__ = [
    "ALL",
    "GENERATED",
    "LAST",
    "PROMPT",
    "Aborted",
    "AbsentSite",
    "Activation",
    "Activations",
    "AlreadyExists",
    "AsyncClient",
    "AsyncGenerationStream",
    "Axis",
    "Baseline",
    "Cancelled",
    "Capability",
    "Client",
    "Condition",
    "DeadlineExceeded",
    "Dims",
    "Error",
    "FailedPrecondition",
    "FieldViolation",
    "GeneratedToken",
    "Generation",
    "GenerationStream",
    "GenerationSummary",
    "Handle",
    "Handles",
    "Internal",
    "Intervention",
    "InterventionNeverFired",
    "InvalidArgument",
    "Limits",
    "ModelInfo",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "QuotaExceeded",
    "QuotaViolation",
    "Read",
    "Receipt",
    "Run",
    "RunSpec",
    "RunSummary",
    "Sample",
    "SiteInfo",
    "Sites",
    "Token",
    "Tokens",
    "TooLarge",
    "TopToken",
    "TranscoderSet",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "__version__",
    "ablate",
    "ablate_everywhere",
    "add",
    "aio",
    "at",
    "clamp",
    "connect",
    "decoder",
    "encoder",
    "feature",
    "freeze",
    "knockout",
    "mean",
    "patch",
    "read",
    "resample",
    "scale",
    "set_coordinate",
    "unembed",
    "when",
    "zero",
]
