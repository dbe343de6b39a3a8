"""Applying: what happens to the value of a site, as tensor code without branches on data and without host syncs.

The value is taken as rows [batch, n, width], n being positions times groups, in float32 (float64 for float64 models),
and passes through the phases of the site.

Updates are carried out in rank space. All z are read at once, `z = h.A^T`; a loop over the stages, in order, turns each
into its coefficient w and adds to the z of later stages what this one changes of them, w times a_s . b_t from the Gram
matrix; then one product with B writes everything. So the row is read once and written once, and overlapping directions
keep their order.

Rows behind a shut gate are the very rows that came in, bit for bit: they are selected, never multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from patchclamp_server.interventions.tables import (
    CutPhase,
    Frame,
    Number,
    OverwritePhase,
    Phase,
    Probe,
    SiteTables,
    UpdatePhase,
)


def edit_site(site: SiteTables, phases: Sequence[Phase], frame: Frame, value: torch.Tensor) -> torch.Tensor:
    """The value `[batch, *axes]` of a site after these phases. Conditions read here see it before them."""
    observe_site(site, frame, value)
    given = site.geometry.rows(value)
    # [batch, pos, group, width]
    rows = given.to(device=frame.change.device, dtype=frame.change.dtype)
    norms = _finite(rows, site).square().sum(-1)  # [batch, pos, group]
    for phase in phases:
        match phase:
            case UpdatePhase():
                rows = _update(phase, frame, rows, norms)
            case OverwritePhase():
                rows = _overwrite(phase, frame, rows, norms, masked=site.geometry.of_keys)
            case CutPhase():
                rows = _cut(phase, frame, rows, norms)
            case _:
                rows = _shift(phase, frame, rows, norms)
    new = rows.to(device=given.device, dtype=given.dtype)
    frame.differs[:, :, site.index] = (new != given).any(-1).any(-1)
    return site.geometry.value(new)


def observe_site(site: SiteTables, frame: Frame, value: torch.Tensor) -> None:
    """Reads the conditions of a site from its value `[batch, pos, width]`."""
    for probe in site.probes:
        _observe(probe, frame, value.to(device=frame.change.device, dtype=frame.change.dtype))


def _observe(probe: Probe, frame: Frame, value: torch.Tensor) -> None:
    directions = probe.bank.vectors[frame.pick(probe.slots)]  # [batch, condition, width]
    signs = frame.pick(probe.signs)[:, None]
    projection = torch.bmm(value, directions.mT) * signs  # [batch, pos, condition]
    frame.met[:, :, probe.start : probe.stop] = projection > frame.pick(probe.thresholds)[:, None] * signs


def _update(phase: UpdatePhase, frame: Frame, rows: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Low-rank updates, in rank space."""
    active = _active(phase, frame, rows.shape[2])  # [batch, pos, group, stage]
    open_ = active.flatten(1, 2)  # [batch, n, stage]
    numbers = frame.columns.numbers[:, :, phase.start : phase.stop].unsqueeze(2)  # [batch, Number, 1, stage]
    slots = frame.columns.slots[:, :, phase.start : phase.stop]
    flat = rows.flatten(1, 2)  # [batch, n, width]
    if phase.reads:
        w = _coefficients(phase, frame, flat, open_, numbers, slots)
    else:
        w = open_ * numbers[:, Number.C]
    new = torch.baddbmm(flat, w, frame.looked_up(phase.bank, 1, phase.start, phase.stop))
    change = (w * numbers[:, Number.B_NORM]).square().unflatten(1, rows.shape[1:3]).sum(2)  # [batch, pos, stage]
    _note(phase, frame, active, change, change != 0, norms)
    return torch.where(open_.any(-1, keepdim=True), new, flat).view(rows.shape)


def _coefficients(
    phase: UpdatePhase,
    frame: Frame,
    flat: torch.Tensor,
    open_: torch.Tensor,
    numbers: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """How much of each b is added, [batch, n, stage]."""
    c, alpha, beta = numbers[:, Number.C], numbers[:, Number.ALPHA], numbers[:, Number.BETA]  # [batch, 1, stage]
    low, high = numbers[:, Number.LOW], numbers[:, Number.HIGH]
    gram = frame.pick(phase.gram).unsqueeze(1)  # [batch, 1, stage, stage]
    z = torch.bmm(flat, frame.looked_up(phase.bank, 0, phase.start, phase.stop).mT)  # [batch, n, stage]
    # A stage that is shut or reads nothing must not turn an infinite entry of the row into NaN.
    z = torch.where(open_ & (slots[:, :1] > 0), z, 0.0)
    offset = open_ * c
    # Without bounds alpha and beta act on the same z.
    slope = open_ * (beta if phase.clips else beta - alpha)
    bounded = open_ * alpha
    coefficients, clipped = [], []
    for stage in range(phase.stop - phase.start):
        read = z[..., stage]
        w = torch.addcmul(offset[..., stage], slope[..., stage], read, value=-1)
        if phase.clips:
            kept = read.clamp(low[..., stage], high[..., stage])
            w = torch.addcmul(w, bounded[..., stage], kept)
            clipped.append((kept != read) & open_[..., stage])
        coefficients.append(w)
        z = torch.addcmul(z, w.unsqueeze(-1), gram[..., stage])
    if phase.clips:
        groups = flat.shape[1] // frame.places.shape[1]
        found = torch.stack(clipped, -1).unflatten(1, (-1, groups)).any(2)
        frame.clipped[:, :, phase.start : phase.stop] = found
    return torch.stack(coefficients, -1)


def _shift(phase: Phase, frame: Frame, rows: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """An addition that knows the norm of the row as it stands."""
    active = _active(phase, frame, rows.shape[2])  # [batch, pos, group, 1]
    numbers = frame.columns.numbers[:, :, phase.start, None, None, None]  # [batch, Number, 1, 1, 1]
    relative, keep_norm = numbers[:, Number.RELATIVE] > 0, numbers[:, Number.KEEP_NORM] > 0
    b = phase.bank.vectors[frame.columns.slots[:, 1, phase.start]][:, None, None]  # [batch, 1, 1, width]
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    cap = numbers[:, Number.CAP]
    unit = torch.where(relative, torch.minimum(norm, cap), 1.0)
    new = rows + numbers[:, Number.C] * unit * b
    after = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
    new = torch.where(keep_norm & (after > 0), new * (norm / after), new)
    new = torch.where(active, new, rows)
    frame.clipped[:, :, phase.start] = (active & relative & (norm > cap)).any(2).any(-1)
    _note_difference(phase, frame, active, rows, new, norms)
    return new


def _overwrite(
    phase: OverwritePhase, frame: Frame, rows: torch.Tensor, norms: torch.Tensor, *, masked: bool
) -> torch.Tensor:
    """Masked replacement. Rows over keys may be longer than what replaces them: the rest is zero."""
    active = _active(phase, frame, rows.shape[2])  # [batch, pos, group, 1]
    content = phase.bank.vectors[frame.at_places(phase.index)].unflatten(-1, (rows.shape[2], -1))
    if phase.pooled:
        content = torch.where(frame.pick(phase.pools)[:, None, None, None], _pooled(phase, frame, rows), content)
    content = functional.pad(content, (0, max(rows.shape[-1] - content.shape[-1], 0)))[..., : rows.shape[-1]]
    chosen = active
    if phase.partial:
        chosen = chosen & frame.pick(phase.neurons)[:, None, None]
    if masked:
        # What the model's mask forbids stays forbidden, and no pattern looks at keys that are not there yet.
        keys = torch.arange(rows.shape[-1], device=rows.device)
        chosen = chosen & (keys <= frame.places[..., None, None]) & (rows != float("-inf"))
    new = torch.where(chosen, content, rows)
    _note_difference(phase, frame, active, rows, new, norms)
    return new


def _pooled(phase: OverwritePhase, frame: Frame, rows: torch.Tensor) -> torch.Tensor:
    """Each batch row's mean over its pool, [batch, 1, group, width]; the last one where no position is of the pool."""
    pool = frame.at_places(phase.pool)  # [batch, pos]
    total = torch.where(pool[..., None, None], rows, 0.0).sum(1).flatten(1)  # [batch, group * width]
    count = pool.sum(1, keepdim=True)
    mean = torch.where(count > 0, total / count.clamp(min=1), frame.pick(phase.memory))
    phase.memory.index_copy_(0, frame.rows, mean)
    return mean.unflatten(-1, rows.shape[2:])[:, None]


def _cut(phase: CutPhase, frame: Frame, scores: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Edges set to minus infinity in scores [batch, query, head, key]: products of query sets and key sets."""
    active = _active(phase, frame, scores.shape[2])
    n_keys = scores.shape[-1]
    keys = frame.pick(phase.keys)[..., :n_keys]
    keys = functional.pad(keys, (0, n_keys - keys.shape[-1])).to(scores.dtype)  # [batch, term, key]
    terms = frame.places[:, None].expand(-1, keys.shape[1], -1)
    queries = frame.pick(phase.queries).gather(2, terms).to(scores.dtype)  # [batch, term, query]
    edges = (torch.bmm(queries.mT, keys) > 0).unsqueeze(2) & active  # [batch, query, head, key]
    lost = torch.where(edges & (scores != float("-inf")), scores, 0.0)
    new = scores.masked_fill(edges, float("-inf"))
    moved = ((new != scores).any(-1) & active[..., 0]).any(2).unsqueeze(-1)
    _note(phase, frame, active, lost.square().sum(-1, keepdim=True).sum(2), moved, norms)
    return new


def _active(phase: Phase, frame: Frame, groups: int) -> torch.Tensor:
    """Where the stages of a phase hold, [batch, pos, group, stage]."""
    some = slice(phase.start, phase.stop)
    active = frame.active[..., some]
    if phase.conditional:
        wanted = frame.columns.condition[:, None, some].expand_as(active)
        active = active & frame.met.gather(-1, wanted)
    frame.fired[..., some] = active
    if phase.headed:
        return active.unsqueeze(2) & frame.columns.heads[:, None, :groups, some]
    return active.unsqueeze(2).expand(-1, -1, groups, -1)


def _note(
    phase: Phase, frame: Frame, active: torch.Tensor, change: torch.Tensor, moved: torch.Tensor, norms: torch.Tensor
) -> None:
    """For the receipts: the squares of the change [batch, pos, stage] and of the row's norm over the target's heads."""
    some = slice(phase.start, phase.stop)
    frame.change[..., some] = change
    frame.moved[..., some] = moved
    if phase.headed:
        norms = torch.where(active, norms.unsqueeze(-1), 0.0).sum(2)
    else:
        norms = norms.sum(-1, keepdim=True)
    frame.norm[..., some] = norms


def _note_difference(
    phase: Phase, frame: Frame, active: torch.Tensor, old: torch.Tensor, new: torch.Tensor, norms: torch.Tensor
) -> None:
    difference = torch.where(new != old, new - old, 0.0)
    change = difference.square().sum(-1).sum(-1, keepdim=True)  # [batch, pos, 1]
    _note(phase, frame, active, change, (new != old).any(-1).any(-1, keepdim=True), norms)


def _finite(rows: torch.Tensor, site: SiteTables) -> torch.Tensor:
    """Rows for their norms: masked scores count as zero."""
    return rows.masked_fill(rows == float("-inf"), 0.0) if site.geometry.of_keys else rows
