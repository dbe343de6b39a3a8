"""Vectors: where a direction, or a value as wide as a site, comes from.

Numbers, a handle of the server's, the name of a registered direction, a feature's decoder or encoder row, or a token's
unembedding row.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchclamp import _tensors
from patchclamp._arguments import index, unicode_text
from patchclamp._handles import Handle, is_handle_name
from patchclamp._positions import is_whole_number
from patchclamp.errors import TooLarge, invalid_field
from patchclamp.v1 import tensor_pb2, vector_pb2


@dataclass(frozen=True)
class Unembed:
    """The unembedding row of a token: the direction that raises its logit. See `unembed`."""

    token: int | str

    def __repr__(self) -> str:
        return f"pc.unembed({self.token!r})"


@dataclass(frozen=True)
class FeatureRow:
    """A row of a transcoder that belongs to one feature. See `decoder` and `encoder`."""

    side: Literal["decoder", "encoder"]
    layer: int
    feature: int
    transcoder: str = ""

    def __repr__(self) -> str:
        named = f", transcoder={self.transcoder!r}" if self.transcoder else ""
        return f"pc.{self.side}({self.layer}, {self.feature}{named})"

    def to_message(self) -> vector_pb2.FeatureRow:
        """The row as it travels; the field that it stands in tells the side."""
        return vector_pb2.FeatureRow(transcoder=self.transcoder, layer=self.layer, feature=self.feature)


@dataclass(frozen=True, eq=False)
class Values:
    """Numbers that a caller gave: a float32 copy that nobody can change. Equal ones have the same shape and bits."""

    array: NDArray[np.float32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def __repr__(self) -> str:
        return f"<float32 {list(self.array.shape)}>"

    def to_message(self) -> tensor_pb2.Tensor:
        """The numbers as they travel."""
        return _tensors.encode(self.array)

    def _content(self) -> tuple[tuple[int, ...], bytes]:
        return self.array.shape, self.array.tobytes()


# What a caller may write, and what is kept of it. Text is a registered direction's name, or a handle's resource name.
Vector: TypeAlias = "ArrayLike | str | Handle | Unembed | FeatureRow"
Source: TypeAlias = "Values | str | Handle | Unembed | FeatureRow"

NAMED = (str, Handle, Unembed, FeatureRow)
_SHAPES = {1: "[d]", 2: "[n, d]", 3: "[n, head, d]"}


def unembed(token: SupportsIndex | str) -> Unembed:
    """The unembedding row of a token, given by id or as text that is exactly one token."""
    return Unembed(check_token(token, "unembed"))


def decoder(layer: SupportsIndex, feature: SupportsIndex, *, transcoder: str = "") -> FeatureRow:
    """The decoder row of a transcoder's feature, [d_model]: what the feature writes. `transcoder` names the set where
    several are loaded."""
    return feature_row("decoder", layer, feature, transcoder)


def encoder(layer: SupportsIndex, feature: SupportsIndex, *, transcoder: str = "") -> FeatureRow:
    """The encoder row of a transcoder's feature, [d_model]: what the feature reads. `transcoder` names the set where
    several are loaded."""
    return feature_row("encoder", layer, feature, transcoder)


def feature_row(side: Literal["decoder", "encoder"], layer: Any, feature: Any, transcoder: Any) -> FeatureRow:
    """A feature, checked."""
    if not isinstance(transcoder, str):
        raise TypeError(f"transcoder is the name of a loaded set, not {transcoder!r}")
    name = unicode_text(transcoder, "transcoder")
    return FeatureRow(side, index(layer, "layer", "layer"), index(feature, "feature", "feature"), name)


def check_token(token: SupportsIndex | str, field: str) -> int | str:
    """A token given by id or text."""
    if isinstance(token, str):
        if not token:
            raise invalid_field(field, "empty text is no token")
        return token
    if not is_whole_number(token):
        raise TypeError(f"{field} takes a token id or its text, not {token!r}")
    token_id = operator.index(token)
    if not 0 <= token_id < 2**32:
        raise invalid_field(field, f"{token_id} is no token id")
    return token_id


def vector(given: Any, field: str, *, stack: bool = False) -> Source:
    """One vector [d]; with `stack`, or several [n, d]."""
    if isinstance(given, str):
        return _name(given, field)
    if isinstance(given, NAMED):
        return given
    found = values(given, field, axes=(1, 2))
    if not stack and found.array.ndim == 2 and len(found.array) != 1:
        raise invalid_field(field, f"{len(found.array)} vectors (an array of shape {found.array.shape}); give one, [d]")
    return found


def values(given: Any, field: str, *, axes: tuple[int, ...]) -> Values:
    """Numbers as float32 (float64 loses digits), copied. `axes` are the numbers of axes that can be meant."""
    try:
        with np.errstate(over="ignore"):
            array = np.array(_as_numpy(given), dtype=np.float32, order="C")
    except (TypeError, ValueError) as fault:
        raise TypeError(f"{field} is made of arrays of numbers: {fault}") from None
    if array.ndim not in axes or not array.size:
        shapes = " or ".join(_SHAPES[number] for number in axes)
        raise invalid_field(field, f"an array of shape {array.shape}; what fits is {shapes}")
    if not np.isfinite(array).all():
        raise invalid_field(field, "holds values that are not finite in float32")
    if array.nbytes > _tensors.INLINE_BYTES:
        raise TooLarge(
            f"{field}: an array of shape {array.shape} is {array.nbytes:,} bytes as float32; a request takes up to "
            f"{_tensors.INLINE_BYTES:,} in one array. What a run gives can stay on the server: keep= and its handle",
            reason="REQUEST_TOO_LARGE",
            metadata={"limit": str(_tensors.INLINE_BYTES), "demand": str(array.nbytes)},
        )
    array.flags.writeable = False
    return Values(array)


def to_message(source: Source, token_ids: dict[str, int]) -> vector_pb2.VectorSource:
    """The vector as it travels; `token_ids` has the tokens that are given as text."""
    match source:
        case Values():
            return vector_pb2.VectorSource(tensor=source.to_message())
        case Unembed(str(token)):
            return vector_pb2.VectorSource(unembed_token=token_ids[token])
        case Unembed(int(token)):
            return vector_pb2.VectorSource(unembed_token=token)
        case FeatureRow(side="decoder"):
            return vector_pb2.VectorSource(decoder=source.to_message())
        case FeatureRow():
            return vector_pb2.VectorSource(encoder=source.to_message())
        case Handle(name):
            return vector_pb2.VectorSource(handle=name)
        case str() if is_handle_name(source):
            return vector_pb2.VectorSource(handle=source)
        case str():
            return vector_pb2.VectorSource(direction=source)
    raise AssertionError(f"{source!r} is no vector")


def _name(text: str, field: str) -> str:
    if not text:
        raise invalid_field(field, "empty text is no direction's name")
    return unicode_text(text, field)


def _as_numpy(given: Any) -> Any:
    """What numpy can take: a torch tensor leaves its device and its gradient; numpy knows no bfloat16."""
    if hasattr(given, "detach") and hasattr(given, "cpu"):
        given = given.detach().cpu()
        given = given.float() if given.is_floating_point() else given
    array = np.asarray(given)
    if array.dtype.kind not in "iuf" and array.size:
        raise TypeError(f"{array.dtype} is not a type of real numbers")
    return array
