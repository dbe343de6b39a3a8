"""What calls return: plain values that print well."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from patchclamp._handles import Handle
from patchclamp._hookpoints import HookName, parse
from patchclamp._receipts import Receipt
from patchclamp.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float32]
_SHOWN = 8


@dataclass(frozen=True)
class Token:
    """One token: `text` keeps its spaces, `start` and `end` are a half-open range of characters in the prompt."""

    id: int
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Tokens:
    """Tokens of one prompt, in parallel tuples; iterating gives them one by one, a slice those of a part.

    `strings` keep their spaces. `offsets` are half-open ranges of characters in `text`, empty for tokens that have no
    text in it. `text` is the whole prompt, the rendered conversation or the decoded ids.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    text: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, position: int) -> Token: ...
    @overload
    def __getitem__(self, position: slice) -> Tokens: ...
    def __getitem__(self, position: int | slice) -> Token | Tokens:
        if isinstance(position, slice):
            # The text stays whole: offsets count in it.
            return Tokens(self.ids[position], self.strings[position], self.offsets[position], self.text)
        return Token(self.ids[position], self.strings[position], *self.offsets[position])

    def __iter__(self) -> Iterator[Token]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        shown = " ".join(map(quoted, self.strings[:_SHOWN], self.ids))
        return f"Tokens({len(self)}: {shown}{' …' if len(self) > _SHOWN else ''})"

    def _repr_html_(self) -> str:
        cells = "".join(f"<td><code>{_marked(token.text, token.id)}</code></td>" for token in self)
        ids = "".join(f"<td>{token_id}</td>" for token_id in self.ids)
        positions = "".join(f"<th>{position}</th>" for position in range(len(self)))
        return f"<table><tr>{positions}</tr><tr>{cells}</tr><tr>{ids}</tr></table>"


@dataclass(frozen=True)
class TopToken:
    """A token that may come next. Unpacks into text and probability."""

    text: str
    probability: float
    id: int
    logprob: float
    logit: float

    def __iter__(self) -> Iterator[Any]:
        return iter((self.text, self.probability))

    def __repr__(self) -> str:
        return f"TopToken({quoted(self.text, self.id)}, {self.probability:.4f}, id={self.id})"


class Activation(np.ndarray[Any, np.dtype[np.float32]]):
    """What a read gave: a float32 array that knows where it comes from.

    `hook_point` is the canonical name; `reduce` the reduction or None; `positions` those of the rows, in the order of
    the position axis; `indices` the int32 indices that belong to the values of a `topk` (entries) or `logit_lens`
    (token ids), else None. What is computed from it, slices too, keeps only `hook_point`.
    """

    hook_point: str
    reduce: str | None
    positions: tuple[int, ...]
    indices: NDArray[np.int32] | None

    @classmethod
    def of(
        cls,
        values: NDArray[Any],
        hook_point: str,
        *,
        reduce: str | None = None,
        positions: Sequence[int] = (),
        indices: NDArray[np.int32] | None = None,
    ) -> Activation:
        """The array, without a copy, and what is known of it."""
        activation = values.view(cls)
        activation.hook_point = hook_point
        activation.reduce = reduce
        activation.positions = tuple(positions)
        activation.indices = indices
        return activation

    def __array_finalize__(self, origin: object) -> None:
        self.hook_point = getattr(origin, "hook_point", "")
        self.reduce = None
        self.positions = ()
        self.indices = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (np.asarray(self), self.hook_point, self.reduce, self.positions, self.indices)

    def __copy__(self) -> Activation:
        return _restored(np.array(self), self.hook_point, self.reduce, self.positions, self.indices)

    def __deepcopy__(self, _: dict[int, Any] | None) -> Activation:
        return self.__copy__()

    def torch(self) -> torch.Tensor:
        """The same memory as a torch tensor; needs torch. A bfloat16 read is exact in float32 too."""
        import torch

        return torch.from_numpy(np.asarray(self))


def _restored(
    values: NDArray[Any],
    hook_point: str,
    reduce: str | None,
    positions: tuple[int, ...],
    indices: NDArray[np.int32] | None,
) -> Activation:
    """An activation out of a pickle or a copy."""
    return Activation.of(values, hook_point, reduce=reduce, positions=positions, indices=indices)


class _Placed(Protocol):
    @property
    def hook_point(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


_P = TypeVar("_P", bound=_Placed)


class _ByHookPoint(Mapping[str, _P]):
    """What a run has at hook points, by their names. `done` is what was done there, `kept_as` the name of it all."""

    done: str
    kept_as: str

    def __init__(self, in_order: Sequence[_P]) -> None:
        self.in_order = tuple(in_order)
        self._by_name: dict[str, list[_P]] = {}
        for item in self.in_order:
            self._by_name.setdefault(item.hook_point, []).append(item)

    def __getitem__(self, name: str) -> _P:
        found = self._by_name.get(name) or self._by_name.get(str(self._hook(name)), [])
        if len(found) == 1:
            return found[0]
        if found:
            ways = ", ".join(map(self._way, found))
            raise KeyError(f"{name!r} was {self.done} {len(found)} times ({ways}): take one of {self.kept_as}.in_order")
        raise KeyError(f"{name!r} was not {self.done}; {self._those_there()}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        shown = [f"{name} {list(self._by_name[name][0].shape)}" for name in self]
        return f"{type(self).__name__}({_listed(shown)})"

    def _way(self, item: _P) -> str:
        """What tells apart items of one hook point."""
        return str(list(item.shape))

    def _hook(self, name: object) -> HookName:
        if not isinstance(name, str):
            raise KeyError(f"{name!r} is no name; {self._those_there()}")
        try:
            return parse(name)
        except InvalidArgument as fault:
            raise KeyError(fault.field_violations[0].description) from None

    def _those_there(self) -> str:
        return f"this run has {_listed(list(self))}" if self._by_name else f"this run {self.done} nothing"


class Activations(_ByHookPoint[Activation]):
    """The reads of one run, by hook point: canonical names, or TransformerLens's.

    `in_order` has them as they were asked for, layers ascending, where one place was read in several ways.
    """

    done = "read"
    kept_as = "reads"

    def stack(self, name: str) -> FloatArray:
        """One site in every layer that was read, ascending, on a new first axis: `stack("resid_post")`."""
        site = self._hook(name).site
        layers = [key for key in self if parse(key).site == site]
        if not layers:
            raise KeyError(f"{name!r} was not read; {self._those_there()}")
        return np.stack([np.asarray(self[key]) for key in layers])

    def _way(self, item: Activation) -> str:
        return str(item.reduce or "rows")


class Handles(_ByHookPoint[Handle]):
    """What one run keeps on the server, by hook point: canonical names, or TransformerLens's.

    `in_order` has them as they were asked for, layers ascending, where one place was kept in several ways.
    """

    done = "kept"
    kept_as = "handles"


@dataclass(frozen=True)
class RunSummary:
    """The call that a run came from: prompt tokens of all its runs, seconds that it waited for the engine and ran.

    `fingerprint` names the engine's configuration: where it differs, two results may differ by rounding.
    """

    prompt_tokens: int
    queue_seconds: float
    engine_seconds: float
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Baseline:
    """What the same run gave without its interventions: `logits`, `logit_positions`, `top_rows`, `top` and `logprobs`
    as those of a run."""

    logits: Activation | None
    logit_positions: tuple[int, ...]
    top_rows: tuple[tuple[TopToken, ...], ...]
    logprobs: FloatArray | None

    @property
    def top(self) -> tuple[TopToken, ...]:
        """The most probable next tokens after the last row."""
        return self.top_rows[-1] if self.top_rows else ()

    def __repr__(self) -> str:
        parts = [f"rows={len(self.logit_positions)}"]
        parts += [f"top={quoted(self.top[0].text, self.top[0].id)} {self.top[0].probability:.2f}"] if self.top else []
        return f"Baseline({', '.join(parts)})"


@dataclass(frozen=True, eq=False)
class Run:
    """What one run gave. `run["blocks.3.resid_post"]` is the activation read there.

    `logits` is float32 [rows, d_vocab], `logit_positions` the positions of its rows, `top_rows` the most probable next
    tokens of each row, `logprobs` float32 [rows, n] for the tokens asked for, `loss` float32 [pos - 1] in nats; each
    is None or empty unless asked for. `receipts` has one entry per intervention, in their order (those of a steering
    profile come behind); `baseline` is the same run without them, where it was asked for; `handles` what the server
    keeps of it, by hook point.
    """

    tokens: Tokens
    reads: Activations
    logits: Activation | None
    logit_positions: tuple[int, ...]
    top_rows: tuple[tuple[TopToken, ...], ...]
    logprobs: FloatArray | None
    loss: FloatArray | None
    receipts: tuple[Receipt, ...]
    summary: RunSummary
    baseline: Baseline | None = None
    handles: Handles = field(default_factory=lambda: Handles([]))

    @property
    def top(self) -> tuple[TopToken, ...]:
        """The most probable next tokens after the last row."""
        return self.top_rows[-1] if self.top_rows else ()

    def __getitem__(self, name: str) -> Activation:
        return self.reads[name]

    def __contains__(self, name: object) -> bool:
        return name in self.reads

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __repr__(self) -> str:
        parts = [f"tokens={len(self.tokens)}"]
        parts += [f"top={quoted(self.top[0].text, self.top[0].id)} {self.top[0].probability:.2f}"] if self.top else []
        parts += [f"loss={float(self.loss.mean()):.2f}"] if self.loss is not None and self.loss.size else []
        parts += [f"reads={len(self.reads.in_order)}"] if self.reads else []
        parts += [f"receipts={len(self.receipts)}"] if self.receipts else []
        parts += [f"handles={len(self.handles.in_order)}"] if self.handles else []
        return f"Run({', '.join(parts)})"

    def _repr_html_(self) -> str:
        tops = "".join(
            f"<tr><td><code>{_marked(top.text, top.id)}</code></td><td>{top.probability:.4f}</td></tr>"
            for top in self.top
        )
        reads = "".join(
            f"<tr><td><code>{escape(read.hook_point)}</code></td><td>{escape(read.reduce or '')}</td>"
            f"<td>{list(read.shape)}</td></tr>"
            for read in self.reads.in_order
        )
        receipts = "".join(
            f"<tr><td><code>{escape(receipt.profile or repr(receipt.intervention))}</code></td>"
            f"<td>{receipt.rows_selected:,}</td><td>{receipt.rows_fired:,}</td><td>{receipt.rows_changed:,}</td>"
            f"<td>{receipt.mean_delta:.3g}</td><td>{receipt.max_delta:.3g}</td></tr>"
            for receipt in self.receipts
        )
        html = self.tokens._repr_html_()
        html += f"<table><tr><th>next token</th><th>probability</th></tr>{tops}</table>" if tops else ""
        html += (
            "<table><tr><th>intervention</th><th>rows selected</th><th>fired</th><th>changed</th><th>mean change</th>"
            f"<th>largest</th></tr>{receipts}</table>"
            if receipts
            else ""
        )
        html += f"<table><tr><th>read</th><th></th><th>shape</th></tr>{reads}</table>" if reads else ""
        return html


def probability(logprob: float) -> float:
    """The probability whose natural logarithm this is."""
    return math.exp(min(logprob, 0.0))


def quoted(text: str, token_id: int) -> str:
    """A token in quotes; its id where it has no text, as all have in a model without a tokenizer."""
    return repr(text) if text else f"#{token_id}"


def _marked(text: str, token_id: int) -> str:
    """A token as HTML, with its spaces and line ends shown; its id where it has no text."""
    visible = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return escape(visible or f"#{token_id}")


def _listed(names: Sequence[str]) -> str:
    """Names in a row; a long row is cut."""
    more = len(names) - 2 * _SHOWN
    return ", ".join(names) if more <= 0 else f"{', '.join(names[: 2 * _SHOWN])} and {more} more"
