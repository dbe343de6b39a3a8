"""Samples: one continuation of one prompt, from its first forward to its last token.

A sample's tokens are the prompt's and those generated; `seen` of them are in its slot. Each forward brings some more of
them in, and when it has seen all, the next token is chosen. What its reads select is gathered over the forwards that
lead to a token and reduced once, so that chunks of a prompt make no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from patchclamp_server.engine.continuation import Continuation
from patchclamp_server.engine.messages import GenerationSpec, ReadOutput
from patchclamp_server.engine.reading import Captures, Request
from patchclamp_server.engine.sampling import Choice
from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.interventions.compiling import RowPlan


class Owner(Protocol):
    """The request that a sample belongs to. `solo`: its samples share no forward. `paused`: its caller does not read,
    so it gets no more tokens for the time being."""

    @property
    def solo(self) -> bool: ...

    @property
    def paused(self) -> bool: ...


@dataclass(eq=False)
class Sample:
    """One sample of a generation. `owner` is the job that it belongs to, `number` which of its samples it is.

    `slot` holds its keys and values, `row` its edits. What its reads gave before position `delivered` the caller has.
    """

    owner: Owner
    number: int
    spec: GenerationSpec
    edits: RowPlan
    continuation: Continuation
    delivered: int = 0
    seen: int = 0
    slot: int = -1
    row: int = -1
    _gathered: dict[tuple[int, HookPoint], list[torch.Tensor]] = field(default_factory=dict)
    _gathered_at: dict[int, list[int]] = field(default_factory=dict)
    _positions: dict[int, frozenset[int]] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and generated tokens so far."""
        return (*self.spec.prompt, *self.continuation.tokens)

    @property
    def length(self) -> int:
        return len(self.spec.prompt) + len(self.continuation.tokens)

    @property
    def unseen(self) -> int:
        return self.length - self.seen

    @property
    def decoding(self) -> bool:
        """Whether just its newest token is to be seen."""
        return self.seen > 0 and self.unseen == 1

    def next_tokens(self, count: int) -> tuple[int, ...]:
        """The first of its tokens that are not seen yet."""
        generated = self.seen - len(self.spec.prompt)
        if generated < 0:
            return self.tokens[self.seen : self.seen + count]
        return tuple(self.continuation.tokens[generated : generated + count])

    @property
    def choice(self) -> Choice:
        rules = self.spec.sampling[self.number]
        present = self.tokens if rules.repetition_penalty != 1 else ()
        return Choice(rules, len(self.continuation.tokens), present)

    @property
    def hook_points(self) -> frozenset[HookPoint]:
        """Everything that its reads look at."""
        return frozenset(HookPoint(read.site, layer) for read in self.spec.reads for layer in read.layers)

    def selected(self, index: int, start: int, count: int) -> tuple[int, ...]:
        """Positions of read `index` among those from `start`, ascending."""
        if index not in self._positions:
            most = len(self.spec.prompt), self.spec.stop.max_new_tokens
            self._positions[index] = frozenset(self.spec.reads[index].positions.resolve(*most))
        places = range(max(start, self.delivered), start + count)
        return tuple(place for place in places if place in self._positions[index])

    def requests(self, row: int, start: int, count: int) -> Iterator[tuple[HookPoint, Request]]:
        """What its reads take from a forward where it is in `row`, with `count` tokens from `start`."""
        for index, read in enumerate(self.spec.reads):
            positions = tuple(position - start for position in self.selected(index, start, count))
            for layer in read.layers if positions else ():
                point = HookPoint(read.site, layer)
                yield point, Request(row, start + count, index, read, positions, point)

    def gather(self, request: Request, start: int, rows: torch.Tensor) -> None:
        """Keeps the rows that a read took from a forward."""
        self._gathered.setdefault((request.read_index, request.hook_point), []).append(rows)
        if request.hook_point.layer == request.read.layers[0]:
            places = [start + position for position in request.positions]
            self._gathered_at.setdefault(request.read_index, []).extend(places)

    def take_reads(self, captures: Captures) -> tuple[ReadOutput, ...]:
        """What its reads gave since the last token, reduced."""
        for (index, point), parts in self._gathered.items():
            read = self.spec.reads[index]
            request = Request(self.number, 0, index, read, tuple(self._gathered_at[index]), point)
            captures.take_rows(request, _joined(parts, point))
        self._gathered.clear()
        self._gathered_at.clear()
        return captures.of_row(self.number)


def _joined(parts: Sequence[torch.Tensor], point: HookPoint) -> torch.Tensor:
    """The rows of several forwards; those over keys are as long as the last, with nothing where there was no key."""
    axis = point.site.position_axis
    if not axis:
        return torch.cat(list(parts))
    longest = parts[-1].shape[-1]
    empty = float("-inf") if point.site.value == "attn.scores" else 0.0
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[-1]), value=empty) for part in parts]
    return torch.cat(padded, dim=axis)
