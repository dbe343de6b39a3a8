"""Reads: which activations a run returns, and what is computed from them beside the model before anything travels."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchclamp import _positions, _tensors
from patchclamp._hookpoints import HookName, parse
from patchclamp._positions import At, Positions, is_whole_number
from patchclamp.errors import invalid_field
from patchclamp.v1 import model_pb2, read_pb2, vector_pb2

Reduce: TypeAlias = Literal["last", "mean", "norm", "topk", "moments", "project", "logit_lens"]
DTypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]

REDUCTIONS: tuple[str, ...] = get_args(Reduce)
_RANKED = ("topk", "logit_lens")
DEFAULT_K = 5


@dataclass(frozen=True)
class Unembed:
    """The unembedding row of a token: the direction that raises its logit. See `unembed`."""

    token: int | str

    def __repr__(self) -> str:
        return f"pc.unembed({self.token!r})"


def unembed(token: SupportsIndex | str) -> Unembed:
    """The unembedding row of a token, given by id or as text that is exactly one token."""
    return Unembed(check_token(token, "unembed"))


Vector: TypeAlias = "NDArray[np.float32] | Unembed"


@dataclass(frozen=True, eq=False)
class Read:
    """One activation to return. See `read`."""

    hook: HookName
    positions: Positions | None = None
    heads: tuple[int, ...] = ()
    reduce: Reduce | None = None
    k: int | None = None
    by_magnitude: bool = False
    onto: tuple[Vector, ...] = ()
    dtype: DTypeName = "float32"

    def __repr__(self) -> str:
        parts = [repr(str(self.hook))]
        parts += [f"positions={self.positions!r}"] if self.positions is not None else []
        parts += [f"heads={list(self.heads)}"] if self.heads else []
        parts += [f"reduce={self.reduce!r}"] if self.reduce else []
        parts += [f"k={self.k}"] if self.k else []
        parts += [f"onto=<{len(self.onto)} vectors>"] if self.onto else []
        parts += [f"dtype={self.dtype!r}"] if self.dtype != "float32" else []
        return f"pc.read({', '.join(parts)})"

    @property
    def needs_tokens(self) -> bool:
        """Whether its positions are looked up in the prompt."""
        return isinstance(self.positions, At)

    @property
    def token_texts(self) -> Iterator[str]:
        """Texts that stand for single tokens."""
        return (vector.token for vector in self.onto if isinstance(vector, Unembed) and isinstance(vector.token, str))


def read(
    hook: str,
    *,
    positions: Positions | None = None,
    heads: SupportsIndex | Sequence[SupportsIndex] | None = None,
    reduce: Reduce | None = None,
    k: int | None = None,
    by_magnitude: bool = False,
    onto: ArrayLike | Unembed | Sequence[ArrayLike | Unembed] | None = None,
    dtype: DTypeName = "float32",
) -> Read:
    """An activation to return: rows of a site, or what is computed from them on the server.

    Args:
        hook: Where: `"blocks.3.resid_post"`, `"blocks.*.resid_post"` (every layer), `"embed"`, or a TransformerLens
            name. `client.describe().sites` lists what the model has.
        positions: Which tokens (queries, for attention patterns): an int, a list, a slice, `pc.LAST`, `pc.at("text")`
            and so on. Left out: all.
        heads: Which heads, in the order of the result. Left out: all. The head axis stays, even for one.
        reduce: Left out, the rows themselves. `"last"` and `"mean"` drop the position axis; `"moments"` gives mean and
            variance over positions, [2, ..]; `"norm"` drops the last axis; `"topk"` gives the `k` largest entries of
            the last axis, their indices in `.indices`; `"project"` gives dot products with `onto`; `"logit_lens"` the
            `k` most probable tokens if the model ended there: log-probabilities, and token ids in `.indices`.
        k: How many, for `"topk"` and `"logit_lens"`. Left out: 5.
        by_magnitude: `"topk"` ranks by absolute value; the values keep their sign.
        onto: For `"project"`: an array [d] or [n, d], `pc.unembed(token)`, or a list of these.
        dtype: Precision on the wire. Arrays arrive as float32 whatever it is.
    """
    if not isinstance(hook, str):
        raise TypeError(f"hook is a name such as 'blocks.3.resid_post', not {type(hook).__name__}")
    name = parse(hook)
    _positions_seem_right(positions)
    if reduce is not None and reduce not in REDUCTIONS:
        raise invalid_field("reduce", f"{reduce!r} is not one of {', '.join(REDUCTIONS)}")
    if k is not None and reduce not in _RANKED:
        raise invalid_field("k", "belongs to reduce='topk' and reduce='logit_lens'")
    if by_magnitude and reduce != "topk":
        raise invalid_field("by_magnitude", "belongs to reduce='topk'")
    if (onto is not None) != (reduce == "project"):
        raise invalid_field("onto", "belongs to reduce='project', which needs it")
    if dtype not in _tensors.DTYPES:
        raise invalid_field("dtype", f"{dtype!r} is not one of {', '.join(_tensors.DTYPES)}")
    return Read(
        hook=name,
        positions=positions,
        heads=_heads(heads),
        reduce=reduce,
        k=_k(k) if reduce in _RANKED else None,
        by_magnitude=by_magnitude,
        onto=() if onto is None else _vectors(onto),
        dtype=dtype,
    )


def to_message(
    item: Read, field: str, tokenized: model_pb2.TokenizedPrompt | None, token_ids: dict[str, int]
) -> read_pb2.Read:
    """The read as it travels. `tokenized` resolves `pc.at`, `token_ids` the tokens that are given as text."""
    return read_pb2.Read(
        hook_point=item.hook.to_message(),
        positions=_positions.to_message(item.positions, f"{field}.positions", tokenized),
        heads=item.heads,
        reduction=_reduction(item, token_ids),
        dtype=_tensors.DTYPES[item.dtype],
    )


def check_token(token: SupportsIndex | str, field: str) -> int | str:
    """A token given by id or text."""
    if isinstance(token, str):
        if not token:
            raise invalid_field(field, "empty text is no token")
        return token
    if not is_whole_number(token):
        raise TypeError(f"{field} takes a token id or its text, not {token!r}")
    index = operator.index(token)
    if not 0 <= index < 2**32:
        raise invalid_field(field, f"{index} is no token id")
    return index


def _positions_seem_right(positions: Positions | None) -> None:
    """Fails now, not when the run is sent, for positions that cannot be meant."""
    if not isinstance(positions, At):
        _positions.to_message(positions, "positions")


def _reduction(item: Read, token_ids: dict[str, int]) -> read_pb2.Reduction | None:
    match item.reduce:
        case None:
            return None
        case "last":
            return read_pb2.Reduction(last=read_pb2.LastReduction())
        case "mean":
            return read_pb2.Reduction(mean=read_pb2.MeanReduction())
        case "norm":
            return read_pb2.Reduction(norm=read_pb2.NormReduction())
        case "moments":
            return read_pb2.Reduction(moments=read_pb2.MomentsReduction())
        case "topk":
            return read_pb2.Reduction(top_k=read_pb2.TopKReduction(k=item.k, by_magnitude=item.by_magnitude))
        case "logit_lens":
            return read_pb2.Reduction(logit_lens=read_pb2.LogitLensReduction(k=item.k))
        case "project":
            onto = [_vector_source(vector, token_ids) for vector in item.onto]
            return read_pb2.Reduction(project=read_pb2.ProjectReduction(onto=onto))


def _vector_source(vector: Vector, token_ids: dict[str, int]) -> vector_pb2.VectorSource:
    if isinstance(vector, Unembed):
        token = vector.token
        return vector_pb2.VectorSource(unembed_token=token_ids[token] if isinstance(token, str) else token)
    return vector_pb2.VectorSource(tensor=_tensors.encode(vector))


def _vectors(onto: Any) -> tuple[Vector, ...]:
    """Unembedding rows as they are; everything else as arrays [n, d]. A list of numbers is one vector."""
    if isinstance(onto, Unembed):
        return (onto,)
    if isinstance(onto, list | tuple) and any(isinstance(item, Unembed) or np.ndim(item) for item in onto):
        return tuple(item if isinstance(item, Unembed) else _matrix(item) for item in onto)
    return (_matrix(onto),)


def _matrix(values: Any) -> NDArray[np.float32]:
    """One vector [d] or a stack of them [n, d], as float32."""
    try:
        array = np.array(values, dtype=np.float32)
    except (TypeError, ValueError) as fault:
        raise TypeError(f"onto is made of arrays of numbers: {fault}") from None
    if array.ndim not in (1, 2) or not array.size:
        raise invalid_field("onto", f"an array of shape {array.shape}; a vector is [d], a stack of them [n, d]")
    if not np.isfinite(array).all():
        raise invalid_field("onto", "holds values that are not finite in float32")
    array.flags.writeable = False
    return array


def _heads(heads: Any) -> tuple[int, ...]:
    if heads is None:
        return ()
    items = [heads] if is_whole_number(heads) else heads
    if isinstance(items, str) or not isinstance(items, Iterable) or not all(map(is_whole_number, items)):
        raise TypeError(f"heads is a list of head indices, not {heads!r}")
    indices = tuple(operator.index(head) for head in items)
    if any(not 0 <= index < 2**32 for index in indices):
        raise invalid_field("heads", f"{min(indices)} is no head: heads count from 0")
    if len(set(indices)) < len(indices):
        raise invalid_field("heads", "a head is there twice")
    return indices


def _k(k: int | None) -> int:
    if k is None:
        return DEFAULT_K
    if not 1 <= operator.index(k) < 2**32:
        raise invalid_field("k", f"{k} is not a number of entries")
    return operator.index(k)
