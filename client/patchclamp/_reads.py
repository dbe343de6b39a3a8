"""Reads: which activations a run returns, and what is computed from them beside the model before anything travels."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args

import numpy as np

from patchclamp import _positions, _tensors, _vectors
from patchclamp._arguments import indices
from patchclamp._hookpoints import HookName, parse
from patchclamp._positions import At, Positions
from patchclamp._vectors import NAMED, Source, Unembed, Vector
from patchclamp.errors import invalid_field
from patchclamp.v1 import model_pb2, read_pb2, tensor_pb2

Reduce: TypeAlias = Literal["last", "mean", "norm", "topk", "moments", "project", "logit_lens"]
DTypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]

REDUCTIONS: tuple[str, ...] = get_args(Reduce)
_RANKED = ("topk", "logit_lens")
DEFAULT_K = 5


@dataclass(frozen=True, eq=False)
class Read:
    """One activation to return. See `read`."""

    hook: HookName
    positions: Positions | None = None
    heads: tuple[int, ...] = ()
    reduce: Reduce | None = None
    k: int | None = None
    by_magnitude: bool = False
    onto: tuple[Source, ...] = ()
    dtype: DTypeName | None = None

    def __repr__(self) -> str:
        parts = [repr(str(self.hook))]
        parts += [f"positions={self.positions!r}"] if self.positions is not None else []
        parts += [f"heads={list(self.heads)}"] if self.heads else []
        parts += [f"reduce={self.reduce!r}"] if self.reduce else []
        parts += [f"k={self.k}"] if self.k else []
        parts += [f"onto=<{len(self.onto)} vectors>"] if self.onto else []
        parts += [f"dtype={self.dtype!r}"] if self.dtype else []
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
    onto: Vector | Sequence[Vector] | None = None,
    dtype: DTypeName | None = None,
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
        onto: For `"project"`: an array [d] or [n, d], `pc.unembed(token)`, `pc.decoder(layer, feature)`, a registered
            direction's name, a handle, or a list of these.
        dtype: Precision on the wire. Left out: float32. Arrays arrive as float32 whatever it is. For what is kept on
            the server, the type it is stored in; left out: the model's own.
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
    if dtype is not None and dtype not in _tensors.DTYPES:
        raise invalid_field("dtype", f"{dtype!r} is not one of {', '.join(_tensors.DTYPES)}")
    return Read(
        hook=name,
        positions=positions,
        heads=indices(heads, "heads", "head"),
        reduce=reduce,
        k=_k(k) if reduce in _RANKED else None,
        by_magnitude=by_magnitude,
        onto=() if onto is None else _onto(onto),
        dtype=dtype,
    )


def to_kept_message(
    item: Read, field: str, tokenized: model_pb2.TokenizedPrompt | None, token_ids: dict[str, int]
) -> read_pb2.Read:
    """The read of something that stays on the server, as it travels: in the model's own type unless told otherwise."""
    message = to_message(item, field, tokenized, token_ids)
    if item.dtype is None:
        message.dtype = tensor_pb2.DTYPE_UNSPECIFIED
    return message


def to_message(
    item: Read, field: str, tokenized: model_pb2.TokenizedPrompt | None, token_ids: dict[str, int]
) -> read_pb2.Read:
    """The read as it travels. `tokenized` resolves `pc.at`, `token_ids` the tokens that are given as text."""
    return read_pb2.Read(
        hook_point=item.hook.to_message(),
        positions=_positions.to_message(item.positions, f"{field}.positions", tokenized),
        heads=item.heads,
        reduction=_reduction(item, token_ids),
        dtype=_tensors.DTYPES[item.dtype or "float32"],
    )


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
            onto = [_vectors.to_message(vector, token_ids) for vector in item.onto]
            return read_pb2.Reduction(project=read_pb2.ProjectReduction(onto=onto))


def _onto(onto: Any) -> tuple[Source, ...]:
    """One vector or a stack of them, or a list of these. A list of numbers is one vector."""
    if isinstance(onto, list | tuple) and any(isinstance(item, NAMED) or np.ndim(item) for item in onto):
        return tuple(_vectors.vector(item, "onto", stack=True) for item in onto)
    return (_vectors.vector(onto, "onto", stack=True),)


def _k(k: int | None) -> int:
    if k is None:
        return DEFAULT_K
    if not 1 <= operator.index(k) < 2**32:
        raise invalid_field("k", f"{k} is not a number of entries")
    return operator.index(k)
