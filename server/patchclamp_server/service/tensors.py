"""Tensors on the wire: small ones inside a message, large ones as chunks behind it.

Bytes are touched once: a chunk is a slice of the tensor's own memory, copied into its message and nowhere else.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TypedDict

import torch

from patchclamp.v1 import tensor_pb2

INLINE_BYTES = 1 << 20

TO_WIRE: dict[torch.dtype, tensor_pb2.Dtype] = {
    torch.float32: tensor_pb2.DTYPE_FLOAT32,
    torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16,
    torch.float16: tensor_pb2.DTYPE_FLOAT16,
    torch.int32: tensor_pb2.DTYPE_INT32,
    torch.int64: tensor_pb2.DTYPE_INT64,
    torch.float64: tensor_pb2.DTYPE_FLOAT64,
}
FROM_WIRE: dict[int, torch.dtype] = {int(wire): dtype for dtype, wire in TO_WIRE.items()}
# What a caller may ask for; 0 is "not stated".
RESULT_DTYPES: dict[int, torch.dtype] = {
    int(tensor_pb2.DTYPE_UNSPECIFIED): torch.float32,
    int(tensor_pb2.DTYPE_FLOAT32): torch.float32,
    int(tensor_pb2.DTYPE_BFLOAT16): torch.bfloat16,
    int(tensor_pb2.DTYPE_FLOAT16): torch.float16,
}


class Chunk(TypedDict):
    """The fields of a TensorChunk: a message built from them in place copies the data once, from a message twice."""

    tensor_id: int
    offset: int
    data: bytes
    crc32: int | None


class Outlet:
    """The tensors of one stream. What does not fit into a message waits here to be sent behind it.

    A message takes tensors in while they are at most 1 MiB together: of the 4 MiB that gRPC's receivers take unless
    told otherwise, the rest is for what is written one by one. Limits keep listed positions and most probable tokens
    to about that size, each; the prompt's own text and tokens are as long as the prompt.
    """

    def __init__(self) -> None:
        self._next_id = 0
        self._room = INLINE_BYTES
        self._waiting: list[tuple[int, torch.Tensor]] = []

    def put(self, tensor: torch.Tensor, wire: tensor_pb2.Tensor) -> None:
        """Writes the tensor into the next message, or announces it there."""
        wire.dtype, wire.byte_order = TO_WIRE[tensor.dtype], tensor_pb2.BYTE_ORDER_LITTLE_ENDIAN
        wire.shape.extend(tensor.shape)
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            wire.inline = memory(tensor).tobytes()
        else:
            wire.streamed.tensor_id, wire.streamed.total_bytes = self._next_id, tensor.nbytes
            self._waiting.append((self._next_id, tensor))
            self._next_id += 1

    @property
    def waiting(self) -> bool:
        """Whether chunks are to follow."""
        return bool(self._waiting)

    def drain(self) -> Iterator[Chunk]:
        """The chunks of every tensor that waits, in order; afterwards the next message has its room again."""
        waiting, self._waiting, self._room = self._waiting, [], INLINE_BYTES
        for tensor_id, tensor in waiting:
            yield from chunks(tensor_id, tensor)


def chunks(tensor_id: int, tensor: torch.Tensor) -> Iterator[Chunk]:
    """The pieces of a tensor, the last one with the checksum of all."""
    view, checksum = memory(tensor), 0
    for offset in range(0, len(view), INLINE_BYTES):
        data = view[offset : offset + INLINE_BYTES].tobytes()
        checksum = zlib.crc32(data, checksum)
        last = offset + len(data) == len(view)
        yield Chunk(tensor_id=tensor_id, offset=offset, data=data, crc32=checksum if last else None)


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the host, in C order, without a copy where it is laid out so."""
    plain = tensor.contiguous()
    return plain.view(-1).view(torch.uint8).numpy().data
