"""Vectors that a request brings along or names, as stacks of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from patchclamp.v1 import tensor_pb2, vector_pb2
from patchclamp_server.engine.messages import UnembedRow
from patchclamp_server.errors import NotServed
from patchclamp_server.service.tensors import FROM_WIRE, INLINE_BYTES
from patchclamp_server.service.violations import Violations

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FLOAT_NAMES = "float32, float16, bfloat16 or float64"
_KNOWN_ORDERS = (tensor_pb2.BYTE_ORDER_UNSPECIFIED, tensor_pb2.BYTE_ORDER_LITTLE_ENDIAN)

Rows = torch.Tensor | UnembedRow


class VectorParser:
    """Turns vector sources into rows as wide as a site's last axis; notes what is wrong with them."""

    def __init__(self, d_model: int, d_vocab: int, found: Violations) -> None:
        self._d_model = d_model
        self._d_vocab = d_vocab
        self._found = found

    def parse(self, source: vector_pb2.VectorSource, path: str, width: int) -> Rows | None:
        """One vector, or one stack: float32 [n, width], or a row that only the worker holds; None when invalid."""
        match source.WhichOneof("source"):
            case None:
                self._found.add(path, "a vector is needed: set one of its sources")
                return None
            case "tensor":
                return self._rows(self._decoded(source.tensor, f"{path}.tensor"), f"{path}.tensor", width)
            case "safetensors":
                return self._rows(self._loaded(source.safetensors, f"{path}.safetensors"), f"{path}.safetensors", width)
            case "unembed_token":
                return self._unembed(source.unembed_token, f"{path}.unembed_token", width)
            case arm:
                raise NotServed(f"vectors.{arm}")

    def _unembed(self, token_id: int, path: str, width: int) -> UnembedRow | None:
        if token_id >= self._d_vocab:
            self._found.add(path, f"token {token_id} is not in the vocabulary: 0 .. {self._d_vocab - 1}")
        elif width != self._d_model:
            self._found.add(path, f"unembedding rows are {self._d_model} wide, this site's last axis is {width}")
        else:
            return UnembedRow(token_id)
        return None

    def _decoded(self, wire: tensor_pb2.Tensor, path: str) -> torch.Tensor | None:
        """The values of an inline tensor."""
        dtype = FROM_WIRE.get(int(wire.dtype))
        if dtype not in _FLOATS:
            self._found.add(f"{path}.dtype", f"must be {_FLOAT_NAMES}")
        elif wire.byte_order not in _KNOWN_ORDERS:
            self._found.add(f"{path}.byte_order", "must be little-endian")
        elif wire.WhichOneof("content") != "inline":
            self._found.add(f"{path}.inline", "the values of a vector must be inline")
        elif not _is_shape(wire.shape):
            self._found.add(f"{path}.shape", f"must be [width] or [n, width], not {list(wire.shape)[:8]}")
        else:
            return self._viewed(wire.inline, dtype, wire.shape, f"{path}.inline")
        return None

    def _viewed(self, data: bytes, dtype: torch.dtype, shape: Sequence[int], path: str) -> torch.Tensor | None:
        need = math.prod(shape) * dtype.itemsize
        if len(data) != need:
            self._found.add(path, f"{need} bytes are needed for the shape {list(shape)}, there are {len(data)}")
            return None
        # A tensor over memory that nobody may write, as a message's is, is something that torch has no way to express.
        return torch.frombuffer(bytearray(data), dtype=dtype).view(*shape)

    def _loaded(self, data: bytes, path: str) -> torch.Tensor | None:
        """The one tensor of a safetensors file."""
        if len(data) > INLINE_BYTES:
            self._found.add(path, f"at most {INLINE_BYTES} bytes, there are {len(data)}")
            return None
        try:
            tensors = load_safetensors(data)
        except (SafetensorError, ValueError, KeyError) as fault:
            self._found.add(path, f"not a safetensors file: {fault}")
            return None
        if len(tensors) != 1:
            self._found.add(path, f"exactly one tensor is needed, there are {len(tensors)}")
            return None
        (tensor,) = tensors.values()
        if tensor.dtype not in _FLOATS:
            self._found.add(path, f"the tensor must be {_FLOAT_NAMES}")
        elif not _is_shape(tensor.shape):
            self._found.add(path, f"the tensor must be [width] or [n, width], not {list(tensor.shape)[:8]}")
        else:
            return tensor
        return None

    def _rows(self, tensor: torch.Tensor | None, path: str, width: int) -> torch.Tensor | None:
        """The tensor as float32 rows, when it has the right width and only finite values."""
        if tensor is None:
            return None
        if tensor.shape[-1] != width:
            self._found.add(path, f"must be {width} wide, as this site's last axis is; it is {tensor.shape[-1]}")
            return None
        rows = tensor.to(torch.float32).reshape(-1, width)
        if not bool(torch.isfinite(rows).all()):
            self._found.add(path, "all values must be finite in float32: there are NaN or infinite ones")
            return None
        return rows


def _is_shape(shape: Sequence[int]) -> bool:
    return len(shape) in (1, 2) and all(size >= 1 for size in shape)
