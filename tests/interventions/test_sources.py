"""What interventions need from elsewhere is named before the run and put in its place."""

from __future__ import annotations

import pytest
import torch

from interventions.running import PROMPTS, captured, edits_of, model, planned, run_plan
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.compiling import compile_row
from patchclamp_server.interventions.expansion import NORM_SCALES, STREAM_WRITES, expanded, hook_points
from patchclamp_server.interventions.ops import (
    Ablate,
    AblateEverywhere,
    Add,
    Captured,
    Comparison,
    Condition,
    Freeze,
    FromRun,
    Intervention,
    Mean,
    Replace,
    RowEdits,
    Scale,
    Target,
    UnembedRow,
    Zero,
)
from patchclamp_server.interventions.problems import InvalidInterventions
from patchclamp_server.interventions.sources import drawn, required_sources, resolved
from patchclamp_server.positions import Positions, Range

POINT = HookPoint(Site.RESID_PRE, 1)
STREAM = Target((POINT,))


def test_sources_are_the_runs_and_hook_points_that_are_patched_from() -> None:
    sites = model().facts.site_info
    heads = HookPoint(Site.ATTN_Z, 0)
    edits = edits_of(
        PROMPTS[0],
        Replace(Target((POINT, heads)), FromRun(2)),
        Replace(STREAM, Captured({})),
        Freeze(FromRun(1), mlps=True),
        Zero(STREAM),
    )
    assert required_sources(edits.interventions, sites) == {
        (2, POINT),
        (2, heads),
        (1, HookPoint(Site.MLP_OUT, 0)),
        (1, HookPoint(Site.MLP_OUT, 1)),
    }


def test_names_are_replaced_by_tensors() -> None:
    sites, row = model().facts.site_info, torch.randn(32, dtype=torch.bfloat16)
    named = UnembedRow(7)
    edits = edits_of(
        PROMPTS[0],
        Add(STREAM, named),
        Ablate(STREAM, named),
        AblateEverywhere(named),
        Mean(STREAM, named),
        Intervention(Scale(STREAM, named, 2.0), when=Condition(POINT, named, Comparison.LESS, 0.0)),
        Replace(STREAM, FromRun(1)),
    )
    value = torch.randn(7, 32)
    found = resolved(edits, sites, lambda token: row * token, lambda run, point: value * run)
    held = row.mul(7).float()
    ops = [edit.op for edit in found.interventions]
    vectors = [ops[0].vector, ops[1].directions, ops[2].directions, ops[3].mean, ops[4].direction]  # type: ignore[union-attr]
    when = found.interventions[4].when
    assert when is not None and isinstance(when.direction, torch.Tensor)
    assert all(torch.equal(vector, held) for vector in [*vectors, when.direction])  # type: ignore[arg-type]
    assert isinstance(ops[5], Replace) and isinstance(ops[5].source, Captured)
    assert torch.equal(ops[5].source.values[POINT], value)
    compile_row(found, sites)


def test_a_frozen_run_needs_what_it_holds_and_no_more() -> None:
    sites = model("gemma2").facts.site_info
    (norms,) = expanded(Freeze(FromRun(0), norms=True), sites)
    points = hook_points(norms)
    assert {point.site for point in points} == {site for site in NORM_SCALES if site in sites}
    assert {Site.LN1_SCALE, Site.LN1_POST_SCALE, Site.LN2_POST_SCALE, Site.LN_FINAL_SCALE} <= {p.site for p in points}


def test_position_embeddings_write_to_the_stream_where_they_are_learned() -> None:
    for name, expected in (("gpt2", set(STREAM_WRITES)), ("llama", set(STREAM_WRITES) - {Site.POS_EMBED})):
        (ablate,) = expanded(AblateEverywhere(torch.ones(32)), model(name).facts.site_info)
        assert {point.site for point in hook_points(ablate)} == expected


def test_a_source_that_is_too_short_is_refused() -> None:
    sites = model().facts.site_info
    short = Captured({POINT: torch.zeros(5, 32)})
    with pytest.raises(InvalidInterventions, match=r"interventions\[0\].positions: the source has 5 rows, none at 5"):
        compile_row(edits_of(PROMPTS[0], Replace(STREAM, short)), sites)
    with pytest.raises(InvalidInterventions, match=r"source_positions: position 6 is outside a run of 5 tokens"):
        compile_row(edits_of(PROMPTS[0], Replace(STREAM, short, Positions((6,))), positions=Positions((1,))), sites)
    with pytest.raises(InvalidInterventions, match=r"source_positions: 2 rows of the source for 1 selected"):
        compile_row(edits_of(PROMPTS[0], Replace(STREAM, short, Positions((1, 2))), positions=Positions((1,))), sites)


def test_generated_rows_that_the_source_does_not_have_are_left_alone() -> None:
    patch = Intervention(Replace(STREAM, Captured({POINT: torch.zeros(6, 32)})), Positions(Range(3)))
    plan = compile_row(RowEdits((patch,), 5, 9), model().facts.site_info)
    assert plan.rows_selected(0) == 3


def test_a_patch_from_another_run_of_a_real_model() -> None:
    resident = model("gpt_neox")
    edits = edits_of(PROMPTS[0], Replace(STREAM, FromRun(1)), positions=Positions((0, 3)))
    values = captured(resident, PROMPTS[2], [POINT])
    edits = resolved(edits, resident.facts.site_info, lambda token: torch.zeros(32), lambda run, point: values[point])
    seen = run_plan(resident, planned(resident, [edits]), PROMPTS[:1], [POINT])
    assert torch.equal(seen.values[POINT][0, [0, 3]], values[POINT][[0, 3]])


def test_a_draw_depends_on_seed_and_run_alone() -> None:
    draws = [drawn((3, 5, 8), seed, run) for seed in range(20) for run in range(5)]
    assert draws == [drawn((3, 5, 8), seed, run) for seed in range(20) for run in range(5)]
    assert set(draws) == {3, 5, 8}
