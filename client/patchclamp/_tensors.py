"""Tensors between numpy and the wire.

Small ones lie inside their message. A large one is announced by a header and follows in chunks: its buffer is allocated
once, from the header, and every chunk is copied into place. Chunks of different tensors may interleave. The last chunk
brings the CRC-32 of the whole; nothing that does not add up is ever returned.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from patchclamp.errors import Internal
from patchclamp.v1 import tensor_pb2 as pb

Array: TypeAlias = NDArray[Any]

# numpy has no bfloat16: its bits are read as integers and widened to the float32 whose upper half they are.
_ON_THE_WIRE: dict[int, str] = {
    pb.DTYPE_FLOAT32: "<f4",
    pb.DTYPE_BFLOAT16: "<u2",
    pb.DTYPE_FLOAT16: "<f2",
    pb.DTYPE_INT32: "<i4",
    pb.DTYPE_INT64: "<i8",
    pb.DTYPE_FLOAT64: "<f8",
}
DTYPES: dict[str, pb.Dtype] = {
    "float32": pb.DTYPE_FLOAT32,
    "bfloat16": pb.DTYPE_BFLOAT16,
    "float16": pb.DTYPE_FLOAT16,
}


# The most that a tensor inside a request may take.
INLINE_BYTES = 1 << 20


def dtype_name(value: pb.Dtype) -> str:
    """`float32` for `DTYPE_FLOAT32`; empty for what this SDK does not know."""
    known = value != pb.DTYPE_UNSPECIFIED and value in pb.Dtype.values()
    return pb.Dtype.Name(value).removeprefix("DTYPE_").lower() if known else ""


def encode(array: NDArray[np.float32]) -> pb.Tensor:
    """An array as it travels inside a request."""
    return pb.Tensor(
        dtype=pb.DTYPE_FLOAT32,
        shape=array.shape,
        byte_order=pb.BYTE_ORDER_LITTLE_ENDIAN,
        inline=array.astype("<f4", copy=False).tobytes(),
    )


class IncomingTensor:
    """A tensor of which all, some or none of the bytes are there."""

    def __init__(self, header: pb.Tensor) -> None:
        if header.dtype not in _ON_THE_WIRE:
            raise damaged(f"a tensor of unknown element type {header.dtype}")
        if header.byte_order not in (pb.BYTE_ORDER_UNSPECIFIED, pb.BYTE_ORDER_LITTLE_ENDIAN):
            raise damaged(f"a tensor of unknown byte order {header.byte_order}")
        if any(size < 0 for size in header.shape):
            raise damaged("a tensor of negative size")
        self._bfloat16 = header.dtype == pb.DTYPE_BFLOAT16
        self._dtype = np.dtype(_ON_THE_WIRE[header.dtype])
        self._shape = tuple(header.shape)
        size = math.prod(self._shape) * self._dtype.itemsize
        announced = header.streamed.total_bytes if header.HasField("streamed") else len(header.inline)
        if announced != size:
            raise damaged(f"a tensor of {size} bytes came as {announced}")
        self._buffer = np.empty(size, np.uint8)
        self._received = 0
        self._crc32 = 0
        if header.HasField("inline"):
            self._copy(header.inline)

    @property
    def complete(self) -> bool:
        return self._received == len(self._buffer)

    def add(self, chunk: pb.TensorChunk) -> None:
        """Copies a chunk into place."""
        data = chunk.data  # each access of a bytes field copies it
        if chunk.offset != self._received:
            raise damaged(f"a chunk at byte {chunk.offset} where {self._received} was due")
        if not data or len(data) > len(self._buffer) - self._received:
            raise damaged(f"a chunk of {len(data)} bytes where {len(self._buffer) - self._received} were left")
        self._copy(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        if self.complete and (not chunk.HasField("crc32") or chunk.crc32 != self._crc32):
            raise damaged("a tensor whose checksum is wrong or missing")

    def array(self) -> Array:
        """The tensor: floats as float32 (float64 stays), integers as they are; writable."""
        if not self.complete:
            raise damaged(f"a tensor of which {len(self._buffer) - self._received} bytes never came")
        values = self._buffer.view(self._dtype).reshape(self._shape)
        if self._bfloat16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        if values.dtype.itemsize == 2:
            return values.astype(np.float32)
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def _copy(self, data: bytes) -> None:
        end = self._received + len(data)
        self._buffer[self._received : end] = np.frombuffer(data, np.uint8)
        self._received = end


class TensorAssembler:
    """The tensors of one stream."""

    def __init__(self) -> None:
        self._streamed: dict[int, IncomingTensor] = {}

    def open(self, header: pb.Tensor) -> IncomingTensor:
        """A tensor whose header came; its chunks may follow."""
        tensor = IncomingTensor(header)
        if header.HasField("streamed"):
            if header.streamed.tensor_id in self._streamed:
                raise damaged(f"two tensors of number {header.streamed.tensor_id}")
            self._streamed[header.streamed.tensor_id] = tensor
        return tensor

    def add(self, chunk: pb.TensorChunk) -> None:
        """A chunk of one of them."""
        tensor = self._streamed.get(chunk.tensor_id)
        if tensor is None:
            raise damaged(f"a chunk of tensor {chunk.tensor_id}, which was never announced")
        tensor.add(chunk)


def damaged(what: str) -> Internal:
    """The error of an answer that does not add up."""
    return Internal(f"the answer arrived damaged: {what}", reason="DATA_LOSS")
