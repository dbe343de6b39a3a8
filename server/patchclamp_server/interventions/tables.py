"""Tables: the edits of a batch as buffers of fixed size, whose contents change in place.

Each site has a row of phases, each of one kind of action; every stage of every phase owns one column of the tables.
A phase of updates has several stages, the others one. A batch row that has nothing to do in a phase has its gate shut
there and its slots at 0, so rows with different edits pass through the same phases. Columns and phases are only ever
added at the end: what resident rows hold stays where it is.

`Frame` is what one step looks at: the tables' rows of the batch, gates gathered at the positions of the step, and what
the sites note for the receipts while they are edited.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch.nn import functional

from patchclamp_server.interventions.actions import Action, Cut, Overwrite, Update
from patchclamp_server.interventions.bank import Bank
from patchclamp_server.interventions.geometry import Geometry


class Number(IntEnum):
    """The numbers of a stage, by their place in the table of numbers."""

    C = 0
    ALPHA = 1
    BETA = 2
    LOW = 3
    HIGH = 4
    CAP = 5
    RELATIVE = 6
    KEEP_NORM = 7
    B_NORM = 8


@dataclass(eq=False)
class Phase:
    """One phase of a site: columns `start` to `stop`. The flags say what any of its rows needs, and stay up.

    `users` counts the batch rows that have something to do here.
    """

    kind: type[Action]
    start: int
    stop: int
    bank: Bank
    headed: bool = False
    conditional: bool = False
    users: int = 0


@dataclass(eq=False)
class UpdatePhase(Phase):
    """`gram` [row, stage, stage] holds a_s . b_t."""

    gram: torch.Tensor = field(default_factory=torch.empty)
    reads: bool = False
    clips: bool = False


@dataclass(eq=False)
class OverwritePhase(Phase):
    """`index` [row, pos] are slots of the bank, whose vectors are rows of all groups, flattened.

    `pool` [row, pos] marks what a mean is taken of, `pools` [row] who takes one, `memory` [row, groups * width] the
    last one taken. `neurons` [row, width] are the entries that are replaced.
    """

    index: torch.Tensor = field(default_factory=torch.empty)
    pool: torch.Tensor = field(default_factory=torch.empty)
    pools: torch.Tensor = field(default_factory=torch.empty)
    memory: torch.Tensor = field(default_factory=torch.empty)
    neurons: torch.Tensor = field(default_factory=torch.empty)
    pooled: bool = False
    partial: bool = False


@dataclass(eq=False)
class CutPhase(Phase):
    """`queries` and `keys`, [row, term, pos]."""

    queries: torch.Tensor = field(default_factory=torch.empty)
    keys: torch.Tensor = field(default_factory=torch.empty)


@dataclass(frozen=True)
class Room:
    """The sizes of a plan. `general`: phases compute everything that any edit could need."""

    rows: int
    max_length: int
    dtype: torch.dtype
    device: torch.device
    general: bool

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype or self.dtype, device=self.device)


def new_phase(kind: type[Action], start: int, stop: int, bank: Bank, geometry: Geometry, room: Room) -> Phase:
    """A phase without users."""
    rows, places, general = room.rows, room.max_length + 1, room.general
    phase: Phase
    if kind is Update:
        gram = room.zeros(rows, stop - start, stop - start)
        phase = UpdatePhase(kind, start, stop, bank, gram=gram, reads=general, clips=general)
    elif kind is Overwrite:
        # Rows over keys have no mean, and no neurons.
        pooled = general and not geometry.of_keys
        phase = OverwritePhase(
            kind, start, stop, bank,
            index=room.zeros(rows, places, dtype=torch.long),
            pool=room.zeros(rows, places, dtype=torch.bool),
            pools=room.zeros(rows, dtype=torch.bool),
            memory=room.zeros(rows, geometry.groups * geometry.width if pooled else 0),
            neurons=room.zeros(rows, geometry.width, dtype=torch.bool),
            pooled=pooled,
            partial=pooled,
        )  # fmt: skip
    elif kind is Cut:
        terms = room.zeros(rows, _TERMS if general else 0, places, dtype=torch.bool)
        phase = CutPhase(kind, start, stop, bank, queries=terms, keys=terms.clone())
    else:
        phase = Phase(kind, start, stop, bank)
    phase.conditional, phase.headed = general, general and geometry.has_heads
    return phase


# Terms of a knockout that a general plan has room for at first.
_TERMS = 4


@dataclass(eq=False)
class Probe:
    """The conditions that are read at one site: columns `start` to `stop` of what is met.

    `slots`, `thresholds` and `signs` are [row, condition]; a sign of -1 turns "less than" into "greater than".
    """

    start: int
    stop: int
    bank: Bank
    slots: torch.Tensor
    thresholds: torch.Tensor
    signs: torch.Tensor
    users: int = 0


@dataclass(eq=False)
class SiteTables:
    """What happens at one hook point. `index` is its place among the sites of the plan."""

    geometry: Geometry
    index: int
    phases: list[Phase] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)


@dataclass(eq=False)
class Columns:
    """What all columns have, for `rows` batch rows. The last position is one that no token has: nothing is open there.

    `gate` [row, pos + 1, column], `numbers` [row, Number, column], `slots` [row, 2, column] of a and b, `heads`
    [row, group, column], `condition` [row, column] among those met (0 always is), `lead` [row, column] the column that
    answers for this one, `site` [column].
    """

    gate: torch.Tensor
    numbers: torch.Tensor
    slots: torch.Tensor
    heads: torch.Tensor
    condition: torch.Tensor
    lead: torch.Tensor
    site: torch.Tensor

    @classmethod
    def empty(cls, rows: int, max_length: int, groups: int, dtype: torch.dtype, device: torch.device) -> Columns:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            gate=zeros(rows, max_length + 1, 0, dtype=torch.bool),
            numbers=zeros(rows, len(Number), 0, dtype=dtype),
            slots=zeros(rows, 2, 0, dtype=torch.long),
            heads=zeros(rows, groups, 0, dtype=torch.bool),
            condition=zeros(rows, 0, dtype=torch.long),
            lead=zeros(rows, 0, dtype=torch.long),
            site=zeros(0, dtype=torch.long),
        )

    @property
    def count(self) -> int:
        return self.site.shape[0]

    def widen(self, sites: list[int]) -> None:
        """Adds a column of each of these sites."""
        for name in _PER_ROW:
            setattr(self, name, functional.pad(getattr(self, name), (0, len(sites))))
        self.site = torch.cat([self.site, torch.tensor(sites, dtype=torch.long, device=self.site.device)])

    def host_row(self) -> Columns:
        """One row of these tables, on the host, with nothing in it."""
        empty = {name: torch.zeros_like(getattr(self, name)[0], device="cpu") for name in _PER_ROW}
        return Columns(**empty, site=self.site)

    def put(self, row: int, content: Columns) -> None:
        """Copies a row made by `host_row` into the tables."""
        for name in _PER_ROW:
            getattr(self, name)[row].copy_(getattr(content, name))

    def of(self, rows: torch.Tensor) -> Columns:
        """Some rows of the tables; the gates, which are looked up by position, are not copied."""
        chosen = {name: getattr(self, name).index_select(0, rows) for name in _PER_ROW if name != "gate"}
        return Columns(gate=self.gate, **chosen, site=self.site)


_PER_ROW = ("gate", "numbers", "slots", "heads", "condition", "lead")


@dataclass(eq=False)
class Frame:
    """One step: `rows` [batch] of the tables, `places` [batch, pos] the positions as indices of the tables.

    `whole` tells that the rows are all rows in order. `active` [batch, pos, column] are the gates there; `met`
    [batch, pos, condition] is filled where conditions are read. Sites note in `fired`, `moved` and `clipped`
    [batch, pos, column] what their actions did, in `change` and `norm` the squares of how much and of the row's own
    norm, in `differs` [batch, pos, site] whether the row left the site another than it came.

    `vectors` keeps what was looked up in the banks, [batch, column, width] by side and columns, for as long as the
    frame is of the same rows: `chosen` of the plan's `edition`.
    """

    rows: torch.Tensor
    places: torch.Tensor
    whole: bool
    columns: Columns
    active: torch.Tensor
    met: torch.Tensor
    fired: torch.Tensor
    moved: torch.Tensor
    clipped: torch.Tensor
    change: torch.Tensor
    norm: torch.Tensor
    differs: torch.Tensor
    keeps: bool = False
    chosen: torch.Tensor | None = None
    edition: int = -1
    vectors: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    def looked_up(self, bank: Bank, side: int, start: int, stop: int) -> torch.Tensor:
        """The vectors a (side 0) or b (side 1) of some columns, [batch, column, width]."""
        slots = self.columns.slots[:, side, start:stop]
        if not self.keeps:
            return bank.vectors[slots]
        key = (side, start, stop)
        if key not in self.vectors:
            self.vectors[key] = bank.vectors[slots]
        return self.vectors[key]

    def pick(self, table: torch.Tensor) -> torch.Tensor:
        """The rows of this step of a table [row, ..]."""
        return table if self.whole else table.index_select(0, self.rows)

    def at_places(self, table: torch.Tensor) -> torch.Tensor:
        """A table [row, pos, ..] at the rows and positions of this step, [batch, pos, ..]."""
        return table[self.rows[:, None], self.places]
