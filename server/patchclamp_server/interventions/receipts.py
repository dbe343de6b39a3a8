"""Receipts: what each intervention of a run did, counted on the device and read once at the end.

While sites are edited they note into the frame of the step; `settle` then adds a whole step up in a few operations for
all sites together. Nothing waits for the device until a receipt is read. Several forwards of one run (chunks of its
prompt, then tokens) add up.

A row is one token's value at one hook point, with all the target's heads. Its change is measured against the norm of
the row as the model computed it, before any intervention at that site; a row that was zero changes by 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchclamp_server.interventions.tables import Frame


@dataclass(frozen=True)
class Receipt:
    """What one intervention did in one run. Counts are of rows, summed over its hook points.

    `rows_changed` are those which the intervention moved and which left the site other than they came. `mean_delta` and
    `max_delta` are over the rows that fired. `clipped` rows met a bound or a cap.
    """

    intervention: int
    rows_selected: int
    rows_fired: int
    rows_changed: int
    mean_delta: float
    max_delta: float
    clipped: int

    @property
    def no_effect(self) -> bool:
        """Rows were selected and fired, and nothing changed."""
        return self.rows_fired > 0 and self.rows_changed == 0


@dataclass(eq=False)
class Tally:
    """Sums over all steps: `counts` [row, 3, column] of rows fired, changed, clipped; `total` and `largest` delta
    [row, column]."""

    counts: torch.Tensor
    total: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Tally:
        # Sums of up to millions of small numbers. Apple's devices have no float64.
        wide = torch.float32 if device.type == "mps" else torch.float64
        return cls(
            torch.zeros(rows, 3, 0, dtype=torch.long, device=device),
            torch.zeros(rows, 0, dtype=wide, device=device),
            torch.zeros(rows, 0, dtype=wide, device=device),
        )

    def widen(self, columns: int) -> None:
        self.counts = torch.nn.functional.pad(self.counts, (0, columns))
        self.total = torch.nn.functional.pad(self.total, (0, columns))
        self.largest = torch.nn.functional.pad(self.largest, (0, columns))

    def clear(self, row: int) -> None:
        for table in (self.counts, self.total, self.largest):
            table[row] = 0

    def copy(self, row: int, column: int, other: Tally, other_row: int, other_column: int) -> None:
        """Takes one column of a row from another plan's tally."""
        self.counts[row, :, column] = other.counts[other_row, :, other_column]
        self.total[row, column] = other.total[other_row, other_column]
        self.largest[row, column] = other.largest[other_row, other_column]

    def of_row(self, row: int) -> torch.Tensor:
        """What one row has, [5, column]: fired, changed, clipped, total and largest delta."""
        numbers = [*self.counts[row].to(self.total.dtype), self.total[row], self.largest[row]]
        return torch.stack(numbers).cpu()

    def settle(self, frame: Frame) -> None:
        """Adds one step."""
        columns = frame.columns
        lead = columns.lead[:, None].expand_as(frame.change)  # [batch, pos, column]
        zero = torch.zeros_like(frame.change)
        # The updates that ablate one subspace are orthogonal: their squares add up at the first of them.
        change = zero.scatter_add(-1, lead, torch.where(frame.fired, frame.change, 0.0))
        moved = zero.scatter_add(-1, lead, (frame.fired & frame.moved).to(zero.dtype)) > 0
        changed = moved & frame.differs[..., columns.site]
        norm = torch.where(frame.norm > 0, frame.norm, change)
        delta = torch.where(frame.fired & (change > 0), change / norm, 0.0).sqrt().to(self.total.dtype)
        counted = torch.stack([frame.fired, changed & frame.fired, frame.clipped & frame.fired], 1).sum(2)
        self.counts.index_add_(0, frame.rows, counted)
        self.total.index_add_(0, frame.rows, delta.sum(1))
        largest = torch.maximum(self.largest.index_select(0, frame.rows), delta.amax(1))
        self.largest.index_copy_(0, frame.rows, largest)


def receipt(intervention: int, rows_selected: int, tally: torch.Tensor) -> Receipt:
    """The receipt of one intervention from the tallies [5, columns] of its leading columns."""
    if tally.shape[1] == 0:
        return Receipt(intervention, rows_selected, 0, 0, 0.0, 0.0, 0)
    fired, changed, clipped, total = (float(number) for number in tally[:4].sum(1))
    return Receipt(
        intervention,
        rows_selected,
        int(fired),
        int(changed),
        total / fired if fired else 0.0,
        float(tally[4].max()),
        int(clipped),
    )
