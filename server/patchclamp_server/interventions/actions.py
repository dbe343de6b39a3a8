"""Actions: the four kinds of things that are done to the rows of a site, and where they hold.

- `Update`, the low-rank one: `z = h.a ; h += (c + alpha * clip(z, low, high) - beta * z) * b`. Adding is c alone; a
  coordinate is set by (c, beta) = (value, 1), scaled by (alpha, beta) = (factor, 1), clamped by alpha = beta = 1 with
  bounds. A subspace is ablated by one update for each vector of an orthonormal basis of it.
- `Shift`, an addition that knows the row's norm: relative strengths, and rows that keep their norm.
- `Overwrite` by zero, by a mean or by given rows.
- `Cut` of attention edges, given as products of query sets and key sets.

All of this is on the CPU and of one run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.interventions.ops import Comparison


@dataclass(frozen=True, eq=False)
class Update:
    """A low-rank update. `a` and `b` are [width]; without `a` nothing is read and z is 0."""

    b: torch.Tensor
    a: torch.Tensor | None = None
    c: float = 0.0
    alpha: float = 0.0
    beta: float = 0.0
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, eq=False)
class Shift:
    """Adds c times b; with `relative`, times the row's norm up to `cap`; then restores the norm if `keep_norm`."""

    b: torch.Tensor
    c: float
    relative: bool
    cap: float
    keep_norm: bool


@dataclass(frozen=True, eq=False)
class Overwrite:
    """Puts rows [n, groups, width] in place.

    `index` [max_length] tells which row goes to a position, from 1; 0 is zero. `pool` [max_length] are the positions
    whose own mean is used instead. `neurons`: only these entries.
    """

    rows: torch.Tensor
    index: torch.Tensor
    pool: torch.Tensor | None = None
    neurons: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Cut:
    """Masks every edge from the queries of a term to its keys; both bool [terms, max_length]."""

    queries: torch.Tensor
    keys: torch.Tensor


Action = Update | Shift | Overwrite | Cut


@dataclass(frozen=True, eq=False)
class Gate:
    """Where an action holds: positions bool [max_length], heads (empty: all), a condition's index or None."""

    positions: torch.Tensor
    heads: tuple[int, ...] = ()
    condition: int | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """One action of one intervention at one site. `lead` is False for those that continue the part before them."""

    intervention: int
    gate: Gate
    action: Action
    lead: bool = True


@dataclass(frozen=True, eq=False)
class ReadCondition:
    """A condition with its direction as a unit vector."""

    hook_point: HookPoint
    direction: torch.Tensor
    comparison: Comparison
    threshold: float
