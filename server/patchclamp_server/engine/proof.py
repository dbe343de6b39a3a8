"""Proving an adapter at load, before the server says that it serves.

Claims, each checked on one short forward in the model's own dtype: the hooked logits are the un-hooked ones; every site
has the shape that Describe states; attention patterns are causal and their rows sum to one; the stream adds up
(`resid_pre + attn.out = resid_mid`, `+ mlp.out = resid_post`); an edit at every writable site changes the logits of its
own row and of no other. A claim that fails refuses the model, with the hook point and the figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from patchclamp_server.engine.runner import Batch, Edit, Forward, Runner
from patchclamp_server.engine.slots import Slots
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.hookpoints import HookPoint, Site, SiteInfo

# Largest difference relative to the largest value: kernels differ in the order of their sums.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one forward with everything hooked gave."""

    values: dict[HookPoint, torch.Tensor]
    logits: torch.Tensor


def prove(runner: Runner, ids: torch.Tensor, plain_logits: torch.Tensor) -> None:
    """Checks every claim above. Raises FailedPrecondition for the first that does not hold."""
    tolerance = _TOLERANCE[plain_logits.dtype]
    seen = _run_all(runner, ids)
    _require_close("logits with every site hooked against the un-hooked model", seen.logits, plain_logits[0], tolerance)
    for info in runner.adapter.sites:
        _prove_shape(info, seen, ids.shape[1])
    _prove_patterns(runner, seen, tolerance)
    _prove_stream(runner, seen, tolerance)
    _prove_edits(runner, ids)


def why_no_slots(runner: Runner, ids: torch.Tensor, plain_logits: torch.Tensor) -> str:
    """Why this model's generations cannot share a cache: empty where a prompt that comes in three parts gives the
    logits of the prompt as a whole."""
    if runner.adapter.probes.catches_softmax:
        return "its attention is outside the attention interface of transformers"
    slots = Slots(runner.adapter.probes.windows, runner.input_device)
    length = ids.shape[1]
    found = []
    try:
        for start, stop in ((0, length - 3), (length - 3, length - 1), (length - 1, length)):
            count = stop - start
            positions = slots.begin([0], [start], [count])
            rows = [(0, place) for place in range(count)]
            batch = Batch(ids[:, start:stop], (count,))
            found.append(runner.run(Forward(batch, logit_rows=rows, memory=slots, positions=positions)))
        _require_close("logits of a prompt in parts", torch.cat(found), plain_logits[0], _TOLERANCE[plain_logits.dtype])
    except (FailedPrecondition, RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as fault:
        return f"a prompt that comes in parts gives other results: {fault}"
    return ""


def _run_all(runner: Runner, ids: torch.Tensor) -> _Seen:
    values: dict[HookPoint, torch.Tensor] = {}
    batch = Batch(ids, (ids.shape[1],))
    logits = runner.run(
        Forward(
            batch,
            reads=frozenset(runner.adapter.read_taps),
            capture=lambda point, value: values.__setitem__(point, value[0].clone()),
            logit_rows=[(0, position) for position in range(ids.shape[1])],
        )
    )
    missed = sorted(str(point) for point in runner.adapter.read_taps.keys() - values.keys())
    if missed:
        raise FailedPrecondition(f"the forward never passed these hook points: {', '.join(missed)}")
    return _Seen(values, logits)


def _prove_shape(info: SiteInfo, seen: _Seen, length: int) -> None:
    expected = tuple(size or length for _, size in info.axes)
    for layer in info.layers or (None,):
        point = HookPoint(info.site, layer)
        value = seen.logits if info.site is Site.LOGITS else seen.values[point]
        if tuple(value.shape) != expected:
            raise FailedPrecondition(f"{point} has shape {tuple(value.shape)} where {expected} was expected")
        if info.site is not Site.ATTN_SCORES and not bool(value.isfinite().all()):
            raise FailedPrecondition(f"{point} is not finite on a short prompt")


def _prove_patterns(runner: Runner, seen: _Seen, tolerance: float) -> None:
    for point, pattern in seen.values.items():
        if point.site is Site.ATTN_PATTERN:
            sums = pattern.float().sum(-1)
            # An attention sink takes probability and gives nothing: rows may sum to less.
            bound = sums.clamp_max(1.0) if runner.adapter.probes.sinks else torch.ones_like(sums)
            _require_close(f"{point}: row sums against one", sums, bound, tolerance)
            if bool(pattern.triu(1).any()):
                raise FailedPrecondition(f"{point} attends to later tokens: the model is not causal")


def _prove_stream(runner: Runner, seen: _Seen, tolerance: float) -> None:
    values = seen.values
    for layer in range(runner.adapter.dims.n_layers):
        pre, attn, mlp, post = (
            values[HookPoint(site, layer)].float()
            for site in (Site.RESID_PRE, Site.ATTN_OUT, Site.MLP_OUT, Site.RESID_POST)
        )
        mid = values.get(HookPoint(Site.RESID_MID, layer))
        if mid is not None:
            _require_close(f"blocks.{layer}: resid_pre + attn.out against resid_mid", pre + attn, mid, tolerance)
        _require_close(f"blocks.{layer}: the sum of writes against resid_post", pre + attn + mlp, post, tolerance)


def _prove_edits(runner: Runner, ids: torch.Tensor) -> None:
    """One batch, a row per writable site: row i is edited at site i in the first and in the last layer, row 0 not."""
    points = [
        point for point in runner.adapter.write_taps if point.layer in (None, 0, runner.adapter.dims.n_layers - 1)
    ]
    limit = max(1, 4096 // ids.shape[1])
    for start in range(0, len(points), limit):
        _prove_edits_of(runner, ids, points[start : start + limit])


def _prove_edits_of(runner: Runner, ids: torch.Tensor, points: list[HookPoint]) -> None:
    rows = len(points) + 1
    batch = Batch(ids.expand(rows, -1), (ids.shape[1],) * rows)
    asked = [(row, ids.shape[1] - 1) for row in range(rows)]
    edits: dict[HookPoint, Edit] = {point: _nudge(row + 1, point.site) for row, point in enumerate(points)}
    logits = runner.run(Forward(batch, edits=edits, logit_rows=asked))
    # The same sites, so the same kernels: a router sends a token elsewhere for a difference in rounding.
    idle = runner.run(Forward(batch, edits=dict.fromkeys(edits, _leave), logit_rows=asked))
    changes = (logits - idle).abs().amax(-1)
    _require_close("an unedited row beside edited ones", logits[0], idle[0], _TOLERANCE[logits.dtype])
    dead = [str(point) for point, change in zip(points, changes[1:].tolist(), strict=True) if not change > 0]
    if dead:
        raise FailedPrecondition(f"an edit at these writable hook points does not reach the logits: {', '.join(dead)}")


def _leave(value: torch.Tensor) -> torch.Tensor:
    return value


def _nudge(row: int, site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
    """Changes one row of the batch at every position, in a way that no norm or softmax undoes."""

    def edit(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        if site in (Site.ATTN_SCORES, Site.ATTN_PATTERN):
            # Each token's attention to itself: the one edge that every causal or sliding mask allows.
            value[row].diagonal(dim1=-2, dim2=-1).add_(10.0 if site is Site.ATTN_SCORES else 2.0)
        else:
            # Not the same for every entry: a norm would subtract or divide a uniform change away.
            ramp = torch.linspace(0.5, 2.0, value.shape[-1], device=value.device, dtype=value.dtype)
            value[row] = value[row] * (1 + ramp) + ramp
        return value

    return edit


def _require_close(claim: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    found, expected = found.float(), expected.to(found.device).float()
    difference = float((found - expected).abs().max())
    bound = tolerance * float(expected.abs().max().clamp_min(1e-6))
    if not difference <= bound:
        raise FailedPrecondition(f"{claim}: they differ by {difference:.2g}, more than {bound:.2g}")
