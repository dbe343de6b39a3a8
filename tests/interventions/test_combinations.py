"""Whatever edits stand in a list, and whatever the neighbours have, each run gets what its own list says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interventions.running import PROMPTS, agree, edits_of, model, planned, planned_in_turn
from patchclamp_server.engine.loading import Resident
from patchclamp_server.hookpoints import HookPoint, Site, SiteInfo
from patchclamp_server.interventions.ops import (
    Ablate,
    Add,
    Captured,
    Clamp,
    Comparison,
    Condition,
    Intervention,
    Knockout,
    Mean,
    Op,
    Replace,
    RowEdits,
    Scale,
    SetCoordinate,
    Target,
    Unit,
    Zero,
)
from patchclamp_server.interventions.plan import Plan
from patchclamp_server.interventions.validation import validate
from patchclamp_server.positions import Positions, Range, Span

# Few sites and few directions, so that edits meet: the third direction lies between the first two.
SITES = (Site.RESID_PRE, Site.MLP_POST, Site.ATTN_Z, Site.ATTN_K, Site.LN2_NORMALIZED)
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox")
Facts = dict[Site, SiteInfo]


def direction(number: int, width: int) -> torch.Tensor:
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(7))
    return vectors[number] if number < 2 else vectors.sum(0) * 0.1


def rows_at(point: HookPoint, sites: Facts) -> torch.Tensor:
    """Rows of another run, as many as the longest prompt has."""
    shape = (7, *(size for _, size in sites[point.site].axes[1:]))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


small = st.floats(-3, 3, width=16)
layers = st.integers(0, 1)
positions = st.one_of(
    st.sampled_from([Positions(), Positions(Span.LAST), Positions(Range(1, -1)), Positions(exclude=(0, -1))]),
    st.lists(st.integers(-5, 4), min_size=1, max_size=3, unique_by=lambda p: p % 5).map(lambda p: Positions(tuple(p))),
)


@st.composite
def targets(draw: st.DrawFn, sites: Facts) -> tuple[Target, int]:
    site = draw(st.sampled_from(SITES))
    points = tuple(HookPoint(site, layer) for layer in draw(st.sampled_from([(0,), (1,), (0, 1)])))
    heads = draw(st.sampled_from([(), (1,), (1, 0)])) if site.head_axis else ()
    neurons = draw(st.sampled_from([(), (), (5, 2, 7)]))
    return Target(points, heads, neurons), sites[site].width


@st.composite
def operations(draw: st.DrawFn, sites: Facts) -> Op:
    if draw(st.integers(0, 8)) == 0:
        edges = draw(st.lists(st.tuples(st.integers(2, 4), st.integers(0, 1)), min_size=1, max_size=3))
        return Knockout(draw(layers), tuple(edges), draw(st.sampled_from([(), (2,), (3, 1)])))
    target, width = draw(targets(sites))
    vector = direction(draw(st.integers(0, 2)), width)
    match draw(st.integers(0, 8)):
        case 0 | 1:
            unit = draw(st.sampled_from(Unit))
            cap = draw(st.sampled_from([None, 1.0])) if unit is Unit.NORM_FRACTION else None
            return Add(target, vector, draw(small), unit, cap, not target.neurons and draw(st.booleans()))
        case 2:
            return Ablate(target, torch.stack([vector, direction(0, width)]))
        case 3:
            return SetCoordinate(target, vector, draw(small))
        case 4:
            low = draw(small)
            return Clamp(target, vector, low, low + draw(st.floats(0, 2, width=16)))
        case 5:
            return Scale(target, vector, draw(small))
        case 6:
            return Mean(target, draw(st.sampled_from([None, vector])))
        case 7:
            return Replace(target, Captured({point: rows_at(point, sites) for point in target.hook_points}))
        case _:
            return Zero(target)


@st.composite
def interventions(draw: st.DrawFn, sites: Facts) -> Intervention:
    op, when = draw(operations(sites)), None
    if draw(st.integers(0, 2)) == 0:
        read = HookPoint(Site.RESID_PRE, draw(layers))
        when = Condition(read, direction(1, 32), draw(st.sampled_from(Comparison)), 0.05)
    return Intervention(op, draw(positions), when)


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, list[RowEdits]]:
    """A family, and three runs with lists of edits, less those that validation refuses."""
    family = draw(st.sampled_from(FAMILIES))
    sites = model(family).facts.site_info
    rows = []
    for prompt in PROMPTS:
        chosen: list[Intervention] = []
        for intervention in draw(st.lists(interventions(sites), max_size=5)):
            if not validate(edits_of(prompt, *chosen, intervention), sites):
                chosen.append(intervention)
        rows.append(edits_of(prompt, *chosen))
    return family, rows


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batches(), st.sampled_from([planned, planned_in_turn]))
def test_lists_of_edits_do_what_they_say(
    batch: tuple[str, list[RowEdits]], make: Callable[[Resident, Sequence[RowEdits]], Plan]
) -> None:
    """In a plan made for the batch, and in a general one whose rows came one by one."""
    family, rows = batch
    agree(model(family), rows, make=make)
