"""Editing: the edits of one run compiled, and a plan's edits and conditions as a forward takes them."""

from __future__ import annotations

import torch

from patchclamp_server.adapters.adapter import Adapter
from patchclamp_server.engine.runner import Edit
from patchclamp_server.errors import FailedPrecondition, TooLarge
from patchclamp_server.hookpoints import HookPoint
from patchclamp_server.interventions.compiling import RowPlan, compile_row
from patchclamp_server.interventions.ops import RowEdits
from patchclamp_server.interventions.plan import Plan
from patchclamp_server.interventions.sources import Captures, resolved

# Entries of the tables of gates that one run may ask for: a byte each, in every row of the tables.
_MOST_GATES = 4 << 20


def compile_edits(adapter: Adapter, row: RowEdits, captures: Captures) -> RowPlan:
    """Compiles the edits of one run; `captures` gives what they take from others.

    Raises FailedPrecondition for one that selects no row, and TooLarge where they would fill the tables.
    """
    edits = compile_row(resolved(row, adapter.site_info, adapter.unembed.row, captures), adapter.site_info)
    gates = sum(map(len, edits.parts.values())) * row.max_length
    if gates > _MOST_GATES:
        raise TooLarge("edits of one run, counted at every hook point and position", limit=_MOST_GATES, demand=gates)
    for intervention in edits.never_fired:
        what_follows = " and what follows it" if row.max_length > row.prompt_length else ""
        raise FailedPrecondition(
            f"interventions[{intervention}] selects no row of a prompt of {row.prompt_length} tokens{what_follows}",
            reason="INTERVENTION_NEVER_FIRED",
            metadata={"intervention": str(intervention)},
        )
    return edits


class Editing:
    """The edits of one forward; none without a plan. A model's layers may lie on other devices than the tables."""

    def __init__(self, plan: Plan | None) -> None:
        self._plan = plan
        self.edits = None if plan is None else {point: _moved(edit, plan) for point, edit in plan.edits().items()}
        self.conditions = frozenset[HookPoint]() if plan is None else plan.condition_reads()

    def observe(self, point: HookPoint, value: torch.Tensor) -> None:
        """Shows a value to the conditions that are read there, if there are any."""
        if self._plan is not None and point in self.conditions:
            self._plan.observe(point, value.to(self._plan.device))


def _moved(edit: Edit, plan: Plan) -> Edit:
    return lambda value: edit(value.to(plan.device)).to(value.device)
