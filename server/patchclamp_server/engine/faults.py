"""Faults: what an exception inside the engine means, for one run and for the engine as a whole."""

from __future__ import annotations

import logging

import torch

from patchclamp_server.errors import Error, FailedPrecondition, TooLarge

_log = logging.getLogger(__name__)


class NotFinite(FailedPrecondition):
    """What the model computed holds NaN or infinity, as an edit can make it."""

    reason = "NOT_FINITE"

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} are not finite: an edit made the model overflow, or took away what it divides by")


class Abandoned(Exception):
    """Nobody waits for any row of the running forward any more."""


def raise_if_fatal(fault: Exception) -> None:
    """A CUDA context that reported an error other than lack of memory answers nothing any more."""
    if isinstance(fault, RuntimeError) and not isinstance(fault, torch.OutOfMemoryError) and "CUDA error" in str(fault):
        raise fault


def make_room(fault: Exception) -> None:
    """After a lack of memory: gives back what is cached."""
    if isinstance(fault, torch.OutOfMemoryError) and torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_error(fault: Exception, what: str) -> Error:
    """What the caller is told. The log has the rest; `what` says there what failed."""
    if isinstance(fault, Error):
        return fault
    if isinstance(fault, torch.OutOfMemoryError) and not torch.cuda.is_available():
        return TooLarge("memory ran out: bytes", limit=0, demand=0, reason="DEVICE_OUT_OF_MEMORY")
    if isinstance(fault, torch.OutOfMemoryError):
        free, total = torch.cuda.mem_get_info()
        return TooLarge(
            "device memory ran out: bytes in use", limit=total, demand=total - free, reason="DEVICE_OUT_OF_MEMORY"
        )
    _log.error("%s failed", what, exc_info=fault)
    return Error("the engine failed on this run")
