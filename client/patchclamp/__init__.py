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
from patchclamp._model_info import AbsentSite, Axis, Capability, Dims, Limits, ModelInfo, SiteInfo, Sites, TranscoderSet
from patchclamp._positions import ALL, GENERATED, LAST, PROMPT, at
from patchclamp._reads import Read, read, unembed
from patchclamp._requests import RunSpec
from patchclamp._results import Activation, Activations, Run, RunSummary, Token, Tokens, TopToken
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
    "Axis",
    "Cancelled",
    "Capability",
    "Client",
    "DeadlineExceeded",
    "Dims",
    "Error",
    "FailedPrecondition",
    "FieldViolation",
    "Internal",
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
    "Run",
    "RunSpec",
    "RunSummary",
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
    "aio",
    "at",
    "connect",
    "read",
    "unembed",
]
