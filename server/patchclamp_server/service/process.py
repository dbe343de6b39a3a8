"""Settings of the process that a server runs in: they keep its answers prompt, and change none of them."""

from __future__ import annotations

import ctypes
import gc
import logging
import os

log = logging.getLogger(__name__)

# glibc's names of them, and values that cover chunks on their way out, not the model's tensors.
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 64 << 20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 4 << 20


def keep_freed_memory() -> None:
    """Lets glibc keep what messages of a megabyte free, instead of giving it back and faulting it in again.

    A tensor of 64 MiB leaves in a third of the time. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)):
        log.debug("this C library keeps its own ways with freed memory")


def use_huge_pages() -> None:
    """Lets torch ask Linux for huge pages behind large tensors: without them, faulting in the memory of 64 MiB of
    activations takes longer than computing them. Only before torch is imported."""
    os.putenv("THP_MEM_ALLOC_ENABLE", "1")


def hush_departed_callers() -> None:
    """Keeps out of the log that gRPC could not send a status any more: it does so behind the servicer, so that a caller
    who leaves at the very end of a call would leave a traceback too."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_departure)


def _is_no_departure(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("ExecuteBatchError raised in core")


def freeze_loaded() -> None:
    """Takes what is loaded by now out of garbage collection: searching it again stops all calls for a tenth of a
    second, and what serves until the end is never garbage."""
    gc.collect()
    gc.freeze()
