"""Vectors that a request brings along or names, as stacks of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from patchclamp.v1 import vector_pb2
from patchclamp_server.errors import NotServed
from patchclamp_server.interventions.ops import UnembedRow
from patchclamp_server.service.inline import FLOAT_NAMES, FLOATS, parse_inline
from patchclamp_server.service.tensors import INLINE_BYTES
from patchclamp_server.service.violations import Violations

Rows = torch.Tensor | UnembedRow


class VectorParser:
    """Turns vector sources into rows as wide as a site's last axis; notes what is wrong with them."""

    def __init__(self, d_model: int, d_vocab: int, found: Violations) -> None:
        self._d_model = d_model
        self._d_vocab = d_vocab
        self._found = found

    def parse(self, source: vector_pb2.VectorSource, path: str, width: int, part: int = 0) -> Rows | None:
        """One vector, or one stack: float32 [n, width], or a row that only the worker holds; None when invalid.

        Where only a part of the axis is meant, vectors may also be as wide as that.
        """
        match source.WhichOneof("source"):
            case None:
                self._found.add(path, "a vector is needed: set one of its sources")
                return None
            case "tensor":
                path = f"{path}.tensor"
                fault = "" if _is_shape(source.tensor.shape) else _shape_fault(source.tensor.shape)
                return self._rows(parse_inline(source.tensor, path, fault, self._found), path, width, part)
            case "safetensors":
                path = f"{path}.safetensors"
                return self._rows(self._loaded(source.safetensors, path), path, width, part)
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
        if tensor.dtype not in FLOATS:
            self._found.add(path, f"the tensor must be {FLOAT_NAMES}")
        elif not _is_shape(tensor.shape):
            self._found.add(path, f"the tensor {_shape_fault(tensor.shape)}")
        else:
            return tensor
        return None

    def _rows(self, tensor: torch.Tensor | None, path: str, width: int, part: int) -> torch.Tensor | None:
        """The tensor as float32 rows, when it has the right width and only finite values."""
        if tensor is None:
            return None
        given = tensor.shape[-1]
        if given not in (width, part):
            or_part = f", or {part} wide, as the target's neurons are" if part else ""
            self._found.add(path, f"must be {width} wide, as this site's last axis is{or_part}; it is {given}")
            return None
        rows = tensor.to(torch.float32).reshape(-1, given)
        if not bool(torch.isfinite(rows).all()):
            self._found.add(path, "all values must be finite in float32: there are NaN or infinite ones")
            return None
        return rows


def _is_shape(shape: Sequence[int]) -> bool:
    return len(shape) in (1, 2) and all(size >= 1 for size in shape)


def _shape_fault(shape: Sequence[int]) -> str:
    return f"must be [width] or [n, width], not {list(shape)[:8]}"
