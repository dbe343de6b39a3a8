"""Tensors that a request brings along, inside its message."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from patchclamp.v1 import tensor_pb2
from patchclamp_server.service.tensors import FROM_WIRE, INLINE_BYTES
from patchclamp_server.service.violations import Violations

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOAT_NAMES = "float32, float16, bfloat16 or float64"
_MOST_AXES = 3
_KNOWN_ORDERS = (tensor_pb2.BYTE_ORDER_UNSPECIFIED, tensor_pb2.BYTE_ORDER_LITTLE_ENDIAN)


def parse_inline(wire: tensor_pb2.Tensor, path: str, shape_fault: str, found: Violations) -> torch.Tensor | None:
    """The tensor, in its own element type; None when invalid. `shape_fault`: what is wrong with its shape, if
    anything."""
    dtype = FROM_WIRE.get(int(wire.dtype))
    if dtype not in FLOATS:
        found.add(f"{path}.dtype", f"must be {FLOAT_NAMES}")
    elif wire.byte_order not in _KNOWN_ORDERS:
        found.add(f"{path}.byte_order", "must be little-endian")
    elif wire.WhichOneof("content") != "inline":
        found.add(f"{path}.inline", "the values must be inline")
    elif shape_fault or not _is_shape(wire.shape):
        general = f"at most {_MOST_AXES} axes of 0 .. {INLINE_BYTES}, not {list(wire.shape)[:8]}"
        found.add(f"{path}.shape", shape_fault or general)
    else:
        return _viewed(wire, dtype, path, found)
    return None


def _is_shape(shape: Sequence[int]) -> bool:
    """Whether anything of that shape may be inline; beside a zero, sizes could be beyond what torch can count."""
    return len(shape) <= _MOST_AXES and all(0 <= size <= INLINE_BYTES for size in shape)


def _viewed(wire: tensor_pb2.Tensor, dtype: torch.dtype, path: str, found: Violations) -> torch.Tensor | None:
    shape, need = list(wire.shape), math.prod(wire.shape) * dtype.itemsize
    if len(wire.inline) != need:
        text = f"{need} bytes are needed for the shape {shape}, there are {len(wire.inline)}"
        found.add(f"{path}.inline", text)
        return None
    if not need:
        return torch.empty(shape, dtype=dtype)
    # A tensor over memory that nobody may write, as a message's is, is something that torch has no way to express.
    return torch.frombuffer(bytearray(wire.inline), dtype=dtype).view(shape)
