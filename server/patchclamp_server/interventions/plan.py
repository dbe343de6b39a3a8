"""The plan: the edits of all rows of a batch, laid into tables and applied by one function for each site in use.

A plan has room for some rows, up to some length. `place` puts the compiled edits of a run into a row and `release`
takes them out again, without touching the other rows; this writes to the tables in place and adds phases only where the
run's edits do not fit into those that are there. For each forward `step` says where in their runs the tokens of the
batch are, and `edits` gives the functions for the sites. The same plan serves a whole prompt, a chunk of it, or one
token for each row.

What is in no row's edits costs nothing: sites and phases without users are left out of `edits`. With
`specialise=False` they stay in, and everything that any edit could need is computed, so that the functions and the
shapes that they see never change: for compiled or captured decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.interventions.actions import Action, Overwrite, Part, Update
from patchclamp_server.interventions.apply import edit_site, observe_site
from patchclamp_server.interventions.bank import Bank
from patchclamp_server.interventions.compiling import RowPlan, compile_row
from patchclamp_server.interventions.expansion import Sites
from patchclamp_server.interventions.filling import align, fill, needed, relate
from patchclamp_server.interventions.geometry import Geometry
from patchclamp_server.interventions.ops import Comparison, RowEdits
from patchclamp_server.interventions.receipts import Receipt, Tally, receipt
from patchclamp_server.interventions.tables import (
    Columns,
    Frame,
    OverwritePhase,
    Phase,
    Probe,
    Room,
    SiteTables,
    UpdatePhase,
    new_phase,
)

Edit = Callable[[torch.Tensor], torch.Tensor]

# What is added to a plan in use has room for at least so many updates, or conditions, of a row.
_ROOM = 4


@dataclass(eq=False)
class _Resident:
    """What one row holds: its leading columns by intervention, its slots, and the phases and probes that it uses.

    `seats` are the phase and column of each part, in order.
    """

    plan: RowPlan
    seats: list[tuple[Phase, int]] = field(default_factory=list)
    leads: dict[int, list[int]] = field(default_factory=dict)
    slots: list[tuple[Bank, list[int]]] = field(default_factory=list)
    uses: set[Phase | Probe] = field(default_factory=set)


class Plan:
    """Edits for `rows` rows of at most `max_length` tokens, for a model of element type `dtype`.

    `slots` is how many vectors of each width there is room for at first; room is made for more when it is needed.
    """

    def __init__(
        self,
        sites: Sites,
        *,
        rows: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
        specialise: bool = True,
        slots: int = 8,
    ) -> None:
        self.sites, self.rows, self.max_length, self.device = sites, rows, max_length, device
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.specialise = specialise
        groups = max((Geometry.of(info).groups for info in sites.values()), default=1)
        self.columns = Columns.empty(rows, max_length, groups, self.dtype, device)
        self.tally = Tally.empty(rows, device)
        self._tables: dict[HookPoint, SiteTables] = {}
        self._slots, self._banks = slots, dict[int, Bank]()
        self._claimed: list[int] = []  # the site of each column that is still to be added
        self._conditions = 1  # the first is always met
        self._residents: dict[int, _Resident] = {}
        self._frames: dict[tuple[int, ...], Frame] = {}
        self._frame: Frame | None = None
        self._unsettled = False
        self._edition = 0

    # Rows come and go.

    def reserve(self, plans: Sequence[RowPlan]) -> None:
        """Makes room that fits these runs exactly."""
        for point, rooms in needed(plans).items():
            for kind, stages in rooms:
                self._add_phase(self._site(point), kind, stages)
        self._widen()

    def place(self, row: int, plan: RowPlan) -> None:
        """Puts the edits of a run into a free row. What fails on the way leaves the row free."""
        assert row not in self._residents, f"row {row} is taken"
        assert plan.edits.max_length <= self.max_length, "the run is longer than the plan has room for"
        self.settle()
        self.tally.clear(row)
        resident = _Resident(plan)
        try:
            self._lay(row, resident)
        except Exception:
            for bank, slots in resident.slots:
                bank.release(slots)
            raise
        for used in resident.uses:
            used.users += 1
        self._residents[row] = resident
        self._turn_over()

    def _turn_over(self) -> None:
        """After a row came or went: what frames keep of the rows before is of no use."""
        self._edition += 1
        for frame in self._frames.values():
            frame.vectors.clear()

    def _lay(self, row: int, resident: _Resident) -> None:
        """Writes the edits of a run into the tables."""
        plan = resident.plan
        met = self._seat_conditions(row, resident)
        located = [
            (site, part, phase, stage)
            for site, parts in [(self._site(point), parts) for point, parts in plan.parts.items()]
            for part, (phase, stage) in zip(parts, self._locate(site, parts), strict=True)
        ]
        self._widen()
        content = self.columns.host_row()
        lead = 0
        for site, part, phase, stage in located:
            column = phase.start + stage
            if part.lead:
                lead = column
                resident.leads.setdefault(part.intervention, []).append(column)
            content.lead[column] = lead
            resident.seats.append((phase, column))
            resident.slots.append((phase.bank, fill(content, column, row, part, site, phase, met)))
            resident.uses.add(phase)
        for used in resident.uses:
            if isinstance(used, UpdatePhase):
                relate(used, row, content.slots[:, used.start : used.stop])
        self.columns.put(row, content)

    def release(self, row: int) -> None:
        """Takes the edits out of a row. Its receipts are gone with them."""
        self.settle()
        resident = self._residents.pop(row)
        self._turn_over()
        for bank, slots in resident.slots:
            bank.release(slots)
        for used in resident.uses:
            used.users -= 1
        self.columns.put(row, self.columns.host_row())

    def adopt(self, row: int, other: Plan, other_row: int) -> None:
        """Puts the edits of another plan's row into a free row, with what its forwards have left: receipts and means.

        For a plan that takes over from one that has become too short.
        """
        other.settle()
        given = other._residents[other_row]
        self.place(row, given.plan)
        for (old, column), (new, own_column) in zip(given.seats, self._residents[row].seats, strict=True):
            self.tally.copy(row, own_column, other.tally, other_row, column)
            if isinstance(old, OverwritePhase) and isinstance(new, OverwritePhase) and old.pooled and new.pooled:
                new.memory[row] = old.memory[other_row]

    # A forward.

    def step(self, positions: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Begins a forward over tokens at absolute positions [batch, pos], -1 for padding.

        `rows` [batch] are the rows of the plan that the batch's rows are; all of them in order when left out. One that
        nobody has been placed in may stand for several.
        """
        self.settle()
        frame = self._frame_for(*positions.shape, whole=rows is None)
        positions = positions.to(self.device)
        self._turn_to(frame, rows)
        inside = (positions >= 0) & (positions < self.max_length)
        frame.places.copy_(torch.where(inside, positions, self.max_length))
        frame.active.copy_(frame.at_places(self.columns.gate))
        for noted in (frame.met, frame.fired, frame.clipped):
            noted.zero_()
        frame.met[..., 0] = True
        self._frame, self._unsettled = frame, True

    def _turn_to(self, frame: Frame, rows: torch.Tensor | None) -> None:
        """Makes a frame show these rows. While no row comes or goes, the tensor of the step before needs nothing."""
        if frame.edition == self._edition and frame.chosen is rows:
            return
        frame.edition, frame.chosen = self._edition, rows
        frame.vectors.clear()
        if rows is not None:
            frame.rows.copy_(rows)
            frame.columns = self.columns.of(frame.rows)

    def edits(self) -> dict[HookPoint, Edit]:
        """The functions that edit sites. To be asked for anew when rows have come or gone."""
        return {
            point: partial(self._edit, site, phases)
            for point, site in self._tables.items()
            if (phases := tuple(phase for phase in site.phases if phase.users or not self.specialise))
        }

    def condition_reads(self) -> frozenset[HookPoint]:
        """Sites that have to be shown to `observe`, as they are read for conditions and not edited."""
        edited = self.edits()
        return frozenset(
            point
            for point, site in self._tables.items()
            if point not in edited and any(probe.users or not self.specialise for probe in site.probes)
        )

    def observe(self, point: HookPoint, value: torch.Tensor) -> None:
        """Takes the value of a site that conditions read."""
        assert self._frame is not None, "a step begins a forward"
        observe_site(self._tables[point], self._frame, value)

    def abandon(self) -> None:
        """Forgets the forward that was begun, as it did not come to its end."""
        self._unsettled = False

    # Afterwards.

    def settle(self) -> None:
        """Adds the last forward to the receipts. Everything that comes after a forward does this by itself."""
        if self._unsettled and self._frame is not None:
            self.tally.settle(self._frame)
        self._unsettled = False

    def receipts(self, row: int, length: int | None = None) -> tuple[Receipt, ...]:
        """What the interventions of a row did; `length` is how many of the run's positions the forwards have seen.

        Waits for the device.
        """
        self.settle()
        resident, tally = self._residents[row], self.tally.of_row(row)
        return tuple(
            receipt(index, resident.plan.rows_selected(index, length), tally[:, resident.leads.get(index, [])])
            for index in range(len(resident.plan.edits.interventions))
        )

    # Room.

    @property
    def vectors_held(self) -> int:
        """How many different vectors the rows hold, in all."""
        return sum(map(len, self._banks.values()))

    def _edit(self, site: SiteTables, phases: tuple[Phase, ...], value: torch.Tensor) -> torch.Tensor:
        assert self._frame is not None, "a step begins a forward"
        return edit_site(site, phases, self._frame, value)

    def _site(self, point: HookPoint) -> SiteTables:
        if point not in self._tables:
            self._tables[point] = SiteTables(Geometry.of(self.sites[point.site]), len(self._tables))
        return self._tables[point]

    def _bank(self, width: int) -> Bank:
        if width not in self._banks:
            self._banks[width] = Bank(width, self.dtype, self.device, self._slots)
        return self._banks[width]

    def _locate(self, site: SiteTables, parts: Sequence[Part]) -> list[tuple[Phase, int]]:
        """Phase and stage of each part, in phases that are added where there is no room."""
        rooms = [(phase.kind, phase.stop - phase.start) for phase in site.phases]
        found = align(parts, rooms)
        for part, (at, _) in zip(parts, found, strict=True):
            if at == len(site.phases):
                stages = max(stage + 1 for where, stage in found if where == at)
                room = max(_ROOM, 1 << (stages - 1).bit_length())
                self._add_phase(site, type(part.action), room if part.action.__class__ is Update else 1)
        return [(site.phases[at], stage) for at, stage in found]

    def _add_phase(self, site: SiteTables, kind: type[Action], stages: int) -> None:
        """Adds a phase behind the others of a site, and claims columns for it."""
        start = self.columns.count + len(self._claimed)
        stop, geometry = start + stages, site.geometry
        self._claimed += [site.index] * stages
        width = self.max_length if geometry.of_keys else geometry.width
        bank = self._bank(geometry.groups * width if kind is Overwrite else width)
        room = Room(self.rows, self.max_length, self.dtype, self.device, general=not self.specialise)
        site.phases.append(new_phase(kind, start, stop, bank, geometry, room))

    def _widen(self) -> None:
        """Adds all columns that have been claimed, at once: each time the tables are copied."""
        if self._claimed:
            self.columns.widen(self._claimed)
            self.tally.widen(len(self._claimed))
            self._claimed = []

    def _seat_conditions(self, row: int, resident: _Resident) -> dict[int, int]:
        """Puts a run's conditions among those that are read; gives where each is found."""
        met, taken = {}, dict[HookPoint, int]()
        for number, when in enumerate(resident.plan.conditions):
            point = when.hook_point
            probe, seat = self._seat(point, taken.setdefault(point, 0))
            taken[point] += 1
            slots = probe.bank.acquire(when.direction[None])
            resident.slots.append((probe.bank, slots))
            resident.uses.add(probe)
            probe.slots[row, seat] = slots[0]
            probe.thresholds[row, seat] = when.threshold
            probe.signs[row, seat] = 1.0 if when.comparison is Comparison.GREATER else -1.0
            met[number] = probe.start + seat
        return met

    def _seat(self, point: HookPoint, taken: int) -> tuple[Probe, int]:
        """The seat after those that a row has taken at a site."""
        site = self._site(point)
        while taken >= _ROOM * len(site.probes):
            start, self._conditions = self._conditions, self._conditions + _ROOM
            slots, numbers = (
                self._zeros(self.rows, _ROOM, dtype=torch.long),
                self._zeros(self.rows, _ROOM, dtype=self.dtype),
            )
            bank = self._bank(site.geometry.width)
            site.probes.append(Probe(start, self._conditions, bank, slots, numbers, numbers.clone()))
        return site.probes[taken // _ROOM], taken % _ROOM

    def _frame_for(self, batch: int, positions: int, *, whole: bool) -> Frame:
        """The frame for a batch of this shape: the one it had before, unless the plan has grown."""
        assert batch == self.rows or not whole, "a step over all rows has a row for each"
        count, sites = self.columns.count, len(self._tables)
        shape = (batch, positions, count, self._conditions, sites, int(whole))
        if shape in self._frames:
            return self._frames[shape]
        # Of frames made before the plan grew none is asked for again; and prompts come in all lengths.
        self._frames = {key: frame for key, frame in self._frames.items() if key[1] == 1 and key[2:5] == shape[2:5]}
        per_column = (batch, positions, count)
        frame = self._frames[shape] = Frame(
            rows=torch.arange(batch, device=self.device),
            places=self._zeros(batch, positions, dtype=torch.long),
            whole=whole,
            columns=self.columns,
            active=self._zeros(*per_column, dtype=torch.bool),
            met=self._zeros(batch, positions, self._conditions, dtype=torch.bool),
            fired=self._zeros(*per_column, dtype=torch.bool),
            moved=self._zeros(*per_column, dtype=torch.bool),
            clipped=self._zeros(*per_column, dtype=torch.bool),
            change=self._zeros(*per_column, dtype=self.dtype),
            norm=self._zeros(*per_column, dtype=self.dtype),
            differs=self._zeros(batch, positions, sites, dtype=torch.bool),
            keeps=self.specialise,
        )
        return frame

    def _zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.device)


def compile_batch(
    rows: Sequence[RowEdits],
    sites: Sites,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int | None = None,
) -> Plan:
    """A plan that has just the room for some runs' edits, in order."""
    plans = [compile_row(row, sites) for row in rows]
    longest = max_length if max_length is not None else max(row.max_length for row in rows)
    plan = Plan(sites, rows=len(rows), max_length=longest, device=device, dtype=dtype)
    plan.reserve(plans)
    for row, compiled in enumerate(plans):
        plan.place(row, compiled)
    return plan
