"""From messages that answers of several verbs share to results. Does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp._results import Activation, Tokens, TopToken, probability
from patchclamp._tensors import IncomingTensor, TensorAssembler, damaged
from patchclamp.v1 import logits_pb2, prompt_pb2, read_pb2

_REDUCTIONS = {"top_k": "topk"}
#: Reductions that drop the position axis.
WITHOUT_POSITIONS = ("last", "mean", "moments")


@dataclass(frozen=True)
class ArrivingRead:
    """A read of which chunks may still come."""

    name: str
    reduce: str | None
    positions: tuple[int, ...]
    values: IncomingTensor
    indices: IncomingTensor | None

    @property
    def complete(self) -> bool:
        return self.values.complete and (self.indices is None or self.indices.complete)

    def finish(self) -> Activation:
        """The activation, once it is complete."""
        return Activation.of(
            self.values.array(),
            self.name,
            reduce=self.reduce,
            positions=self.positions,
            indices=None if self.indices is None else self.indices.array(),
        )


def arriving_read(
    read: read_pb2.ReadResult, asked: Sequence[read_pb2.Read], tensors: TensorAssembler, length: int
) -> ArrivingRead:
    """What one of the reads asked for gave. `length` bounds the positions."""
    if read.read_index >= len(asked):
        raise damaged(f"a result of read {read.read_index}, which was not asked for")
    kind = asked[read.read_index].reduction.WhichOneof("kind")
    return ArrivingRead(
        name=read.name,
        reduce=None if kind is None else _REDUCTIONS.get(kind, kind),
        positions=() if kind in WITHOUT_POSITIONS else _positions(read, length),
        values=tensors.open(read.values),
        indices=tensors.open(read.indices) if read.HasField("indices") else None,
    )


def _positions(read: read_pb2.ReadResult, length: int) -> tuple[int, ...]:
    """Positions of a read's rows: consecutive ones come as a range."""
    if not read.HasField("position_range"):
        return tuple(read.positions)
    start, stop = read.position_range.start, read.position_range.stop
    if not 0 <= start <= stop <= length:
        raise damaged(f"positions {start} to {stop} of {length}")
    return tuple(range(start, stop))


def top_token(message: logits_pb2.TokenProbability) -> TopToken:
    """A token that may come next."""
    return TopToken(message.text, probability(message.logprob), message.id, message.logprob, message.logit)


def tokens(messages: Sequence[prompt_pb2.Token], text: str) -> Tokens:
    """The tokens of one prompt; offsets count in `text`."""
    return Tokens(
        ids=tuple(token.id for token in messages),
        strings=tuple(token.text for token in messages),
        offsets=tuple((token.start, token.end) for token in messages),
        text=text,
    )
