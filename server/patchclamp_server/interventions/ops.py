"""The operations: what an intervention may do to a run. Data only.

A `Target` names hook points and, on them, heads and entries of the last axis; without either it is all of them. The
value of a hook point is seen as rows, one for each position (and head): residual stream `[pos, d_model]`, heads
`[pos, head, d_head]`, attention patterns one row of keys for each query and head.

Vectors are float32 CPU tensors as wide as the site's last axis; where a target lists neurons they may also have just
those entries, in the order of the list. An `UnembedRow` stands for a row that only the engine holds, until `resolved`
puts the tensor in its place.

`AblateEverywhere` and `Freeze` are short for many site-level operations: `expansion` writes them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch

from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.positions import ALL, Positions


@dataclass(frozen=True)
class UnembedRow:
    """The unembedding row of one token."""

    token_id: int


Vectors = torch.Tensor | UnembedRow
"""One vector `[width]`, or a stack `[n, width]` where an operation takes several."""


@dataclass(frozen=True)
class Target:
    """Where an edit applies. Empty `heads` and `neurons` mean all of them."""

    hook_points: tuple[HookPoint, ...]
    heads: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()


class Unit(StrEnum):
    """What the strength of an addition is measured in."""

    ABSOLUTE = "absolute"  # strength x vector
    DIRECTION = "direction"  # strength x unit vector
    NORM_FRACTION = "norm_fraction"  # strength x norm of the row x unit vector


@dataclass(frozen=True, eq=False)
class Add:
    """Adds a vector; `cap` bounds the row's norm as the unit norm fraction uses it.

    With `keep_norm` each edited row is rescaled to the norm it had.
    """

    arm: ClassVar[str] = "add"
    target: Target
    vector: Vectors
    strength: float = 1.0
    unit: Unit = Unit.ABSOLUTE
    cap: float | None = None
    keep_norm: bool = False


@dataclass(frozen=True, eq=False)
class Ablate:
    """Projects the span of some directions out of the rows. They need be neither unit nor orthogonal."""

    arm: ClassVar[str] = "ablate"
    target: Target
    directions: Vectors


@dataclass(frozen=True, eq=False)
class AblateEverywhere:
    """Projects the span of some directions out of everything that writes to the residual stream."""

    arm: ClassVar[str] = "ablate_everywhere"
    directions: Vectors


@dataclass(frozen=True, eq=False)
class SetCoordinate:
    """Sets the coordinate along the unit direction."""

    arm: ClassVar[str] = "set_coordinate"
    target: Target
    direction: Vectors
    value: float


@dataclass(frozen=True, eq=False)
class Clamp:
    """Bounds the coordinate along the unit direction."""

    arm: ClassVar[str] = "clamp"
    target: Target
    direction: Vectors
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiplies the coordinate along the unit direction."""

    arm: ClassVar[str] = "scale"
    target: Target
    direction: Vectors
    factor: float


@dataclass(frozen=True, eq=False)
class Zero:
    """Replaces the target by zero."""

    arm: ClassVar[str] = "zero"
    target: Target


@dataclass(frozen=True, eq=False)
class Mean:
    """Replaces the target by a mean: `[width]`, or `[head, width]` with one row for each head of the target.

    Without one it is the mean over the run's own selected positions, of those that lie in the prompt; the prompt then
    has to pass in one forward, and generated rows get the same mean.
    """

    arm: ClassVar[str] = "mean"
    target: Target
    mean: Vectors | None = None


@dataclass(frozen=True, eq=False)
class Inline:
    """Rows given as such: the site's axes with the position axis cut to the rows, heads and neurons to the target's."""

    rows: torch.Tensor


@dataclass(frozen=True)
class FromRun:
    """The rows of the same hook point in another run of the request."""

    run: int


@dataclass(frozen=True, eq=False)
class Captured:
    """What another run had at the hook points of the target: whole values, `[*axes]` without padding."""

    values: Mapping[HookPoint, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Replace:
    """Replaces the selected rows, one by one, by the rows of a source.

    `source_positions` choose rows of the source, in order. Without them, inline rows are taken in order, and those of
    another run at the same positions; generated positions that the other run does not reach are left alone.
    """

    target: Target
    source: Inline | FromRun | Captured
    source_positions: Positions | None = None
    arm: str = "patch"  # or `resample`, whose draw is made before


@dataclass(frozen=True)
class Knockout:
    """Masks attention edges (query, key) of some heads before the softmax; negative positions as in `Positions`."""

    arm: ClassVar[str] = "knockout"
    layer: int
    edges: tuple[tuple[int, int], ...]
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Freeze:
    """Holds parts of a run to the values they have in another run."""

    arm: ClassVar[str] = "freeze"
    source: FromRun | Captured
    attention: bool = False
    norms: bool = False
    mlps: bool = False


SiteOp = Add | Ablate | SetCoordinate | Clamp | Scale | Zero | Mean | Replace | Knockout
"""Operations that name their site; the others are short for several of these."""

Op = SiteOp | AblateEverywhere | Freeze


class Comparison(StrEnum):
    """Which side of the threshold meets a condition."""

    GREATER = "greater"
    LESS = "less"


@dataclass(frozen=True, eq=False)
class Condition:
    """Met by tokens whose row at a hook point, projected on the unit direction, lies beyond the threshold.

    The row is the one of the same token in the same forward. At the very site of the edit it is the value before any
    intervention there.
    """

    hook_point: HookPoint
    direction: Vectors
    comparison: Comparison
    threshold: float


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit of a run: an operation, the positions it applies to, and the condition that their tokens must meet."""

    op: Op
    positions: Positions = ALL
    when: Condition | None = None
    allow_never_fired: bool = False


@dataclass(frozen=True, eq=False)
class RowEdits:
    """The edits of one run, in the order of application.

    `max_length` is the number of positions that its forwards can see: the prompt's and, of the tokens it may generate,
    all but the last. Nothing is edited beyond.
    """

    interventions: tuple[Intervention, ...]
    prompt_length: int
    max_length: int
