"""What cannot be done is refused before anything runs, with the field and every reason at once."""

from __future__ import annotations

import math

import pytest
import torch

from interventions.running import PROMPTS, edits_of, model
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.flow import known_before
from patchclamp_server.interventions.ops import (
    Ablate,
    AblateEverywhere,
    Add,
    Captured,
    Clamp,
    Comparison,
    Condition,
    Freeze,
    FromRun,
    Inline,
    Intervention,
    Knockout,
    Mean,
    Op,
    Replace,
    RowEdits,
    Scale,
    SetCoordinate,
    Target,
    UnembedRow,
    Unit,
    Zero,
)
from patchclamp_server.interventions.problems import InvalidInterventions
from patchclamp_server.interventions.validation import validate
from patchclamp_server.positions import Positions, Span

STREAM = Target((HookPoint(Site.RESID_PRE, 1),))
HEADS = Target((HookPoint(Site.ATTN_Z, 0),))
NEURONS = Target((HookPoint(Site.MLP_POST, 0),), neurons=(1, 2))
PATTERN = Target((HookPoint(Site.ATTN_PATTERN, 0),))
ONE, ZERO, NAN = torch.ones(32), torch.zeros(32), torch.full((32,), math.nan)
LATER = Condition(HookPoint(Site.RESID_POST, 1), ONE, Comparison.LESS, 0.0)


def problems(*edits: Op | Intervention, positions: Positions = Positions()) -> list[tuple[str, str]]:
    found = validate(edits_of(PROMPTS[0], *edits, positions=positions), model().facts.site_info)
    return [(f"[{problem.index}].{problem.field}", problem.text) for problem in found]


@pytest.mark.parametrize(
    ("op", "field", "text"),
    [
        (Add(STREAM, ZERO, 1.0, Unit.DIRECTION), "add.vector", "must not be zero"),
        (Add(STREAM, NAN), "add.vector", "finite"),
        (Add(STREAM, torch.ones(31)), "add.vector", "must be 32 wide"),
        (Add(STREAM, torch.ones(2, 32)), "add.vector", "one vector is needed, there are 2"),
        (Add(STREAM, ONE, math.inf), "add.strength", "finite"),
        (Add(STREAM, ONE, 1e39), "add.strength", "finite in float32"),
        (Add(STREAM, ONE, 1.0, Unit.NORM_FRACTION, cap=0.0), "add.cap", "greater than 0"),
        (Add(STREAM, ONE, 1.0, Unit.NORM_FRACTION, cap=math.nan), "add.cap", "greater than 0"),
        (Add(STREAM, ONE, cap=2.0), "add.cap", "norm fraction"),
        (Add(NEURONS, torch.ones(2), keep_norm=True), "add.keep_norm", "beyond the target's neurons"),
        (Ablate(STREAM, torch.stack([ONE, ZERO])), "ablate.directions", "must not be zero"),
        (Ablate(NEURONS, torch.eye(48)[5]), "ablate.directions", "must not be zero"),
        (AblateEverywhere(ZERO), "ablate_everywhere.directions", "must not be zero"),
        (SetCoordinate(STREAM, ZERO, 1.0), "set_coordinate.direction", "must not be zero"),
        (SetCoordinate(STREAM, ONE, math.nan), "set_coordinate.value", "finite"),
        (Scale(STREAM, ONE, math.inf), "scale.factor", "finite"),
        (Clamp(STREAM, ONE), "clamp.min", "at least one bound"),
        (Clamp(STREAM, ONE, 2.0, 1.0), "clamp.min", "2.0 > 1.0"),
        (Clamp(STREAM, ONE, high=math.nan), "clamp.max", "finite"),
        (Zero(Target(())), "zero.target.hook_point", "no layer"),
        (
            Zero(Target((HookPoint(Site.RESID_PRE, 2),))),
            "zero.target.hook_point",
            "this model has no blocks.2.resid_pre",
        ),
        (Zero(Target((HookPoint(Site.POS_EMBED),))), "zero.target.hook_point", "this model has no pos_embed"),
        (Zero(Target((HookPoint(Site.ATTN_IN, 0),))), "zero.target.hook_point", "read-only"),
        (Zero(Target((HookPoint(Site.LOGITS),))), "zero.target.hook_point", "read-only"),
        (Zero(Target(HEADS.hook_points, (1, 2, 1))), "zero.target.heads[2]", "head 1 is named twice"),
        (Zero(Target(HEADS.hook_points, (4,))), "zero.target.heads[0]", "there is no head 4: 0 .. 3"),
        (Zero(Target((HookPoint(Site.ATTN_V, 0),), (2,))), "zero.target.heads[0]", "there is no head 2: 0 .. 1"),
        (Zero(Target(STREAM.hook_points, (0,))), "zero.target.heads", "no head axis"),
        (Zero(Target(STREAM.hook_points, neurons=(3, 3))), "zero.target.neurons[1]", "named twice"),
        (Zero(Target(STREAM.hook_points, neurons=(32,))), "zero.target.neurons[0]", "there is no neuron 32"),
        (Zero(Target(PATTERN.hook_points, neurons=(1,))), "zero.target.neurons", "use a knockout"),
        (Mean(PATTERN), "mean.target.hook_point", "zeroed, replaced or knocked out"),
        (Scale(PATTERN, ONE, 2.0), "scale.target.hook_point", "zeroed, replaced or knocked out"),
        (Mean(HEADS, torch.ones(3, 8)), "mean.mean", "one row, or 4"),
        (Replace(STREAM, Inline(torch.ones(6, 32))), "patch.source_positions", "6 rows of the source for 7"),
        (Replace(STREAM, Inline(torch.ones(7, 31))), "patch.tensor", "must be [32] beside its rows"),
        (Replace(STREAM, Inline(torch.ones(7, 1, 32))), "patch.tensor", "must have 2 axes"),
        (Replace(HEADS, Inline(torch.ones(7, 2, 8))), "patch.tensor", "must be [4, 8] beside its rows"),
        (Replace(PATTERN, Inline(torch.ones(4, 7, 9))), "patch.tensor", "has 9 keys"),
        (Replace(STREAM, Inline(NAN.expand(7, 32))), "patch.tensor", "finite"),
        (Replace(STREAM, Inline(torch.ones(7, 32)), Positions((9,))), "patch.source_positions", "outside a run of 7"),
        (Freeze(FromRun(0)), "freeze", "at least one"),
        (Knockout(2, ((1, 0),)), "knockout.layer", "no attention scores in layer 2"),
        (Knockout(0, ((1, 0),), (4,)), "knockout.heads[0]", "there is no head 4"),
        (Knockout(0, ()), "knockout.edges", "at least one"),
        (Knockout(0, ((1, 0), (2, 3))), "knockout.edges[1]", "position 2 does not attend to 3"),
        (Knockout(0, ((7, 0),)), "knockout.edges[0]", "position 7 is outside"),
        (Knockout(0, ((1, -8),)), "knockout.edges[0]", "position -8 is outside"),
        (Knockout(0, ((1, 0), (1, 1))), "knockout.edges", "position 1 would have nothing left"),
    ],
)
def test_what_cannot_be_done_is_refused(op: Op, field: str, text: str) -> None:
    ((found, said),) = problems(op)
    assert found == f"[0].{field}" and text in said


@pytest.mark.parametrize(
    ("when", "field", "text"),
    [
        (LATER, "when.hook_point", "not known before the edit of blocks.1.resid_pre"),
        (Condition(HookPoint(Site.EMBED), ZERO, Comparison.LESS, 0.0), "when.direction", "must not be zero"),
        (Condition(HookPoint(Site.EMBED), ONE, Comparison.LESS, math.nan), "when.threshold", "finite"),
        (Condition(HookPoint(Site.ATTN_Z, 0), ONE, Comparison.LESS, 0.0), "when.hook_point", "one row for each token"),
        (Condition(HookPoint(Site.RESID_PRE, 5), ONE, Comparison.LESS, 0.0), "when.hook_point", "this model has no"),
    ],
)
def test_a_condition_that_cannot_be_read_is_refused(when: Condition, field: str, text: str) -> None:
    ((found, said),) = problems(Intervention(Zero(STREAM), when=when))
    assert found == f"[0].{field}" and text in said


def test_positions_outside_the_run_are_refused() -> None:
    for positions in (Positions((7,)), Positions((-8,)), Positions(exclude=(9,))):
        ((field, text),) = problems(Zero(STREAM), positions=positions)
        assert field == "[0].positions" and "outside a run of 7 tokens" in text


def test_a_mean_over_no_position_of_the_prompt_is_refused() -> None:
    row = RowEdits((Intervention(Mean(STREAM), Positions(Span.GENERATED)),), 7, 9)
    (problem,) = validate(row, model().facts.site_info)
    assert problem.field == "positions" and "give the mean" in problem.text


def test_a_position_cannot_take_two_rows() -> None:
    for source, order in ((Inline(torch.ones(2, 32)), None), (Captured({}), Positions((0, 1)))):
        ((field, text),) = problems(Replace(STREAM, source, order), positions=Positions((3, 3)))
        assert field == "[0].positions" and "twice" in text


def test_a_resample_is_called_by_its_own_name() -> None:
    ((field, _),) = problems(Replace(Target(()), FromRun(1), arm="resample"))
    assert field == "[0].resample.target.hook_point"


def test_all_problems_are_told_at_once() -> None:
    clamp = Clamp(STREAM, ZERO, 2.0, 1.0)
    found = problems(Zero(STREAM), Intervention(clamp, Positions((99,)), LATER))
    assert [field for field, _ in found] == [
        "[1].positions", "[1].clamp.direction", "[1].clamp.min", "[1].when.hook_point",
    ]  # fmt: skip
    error = InvalidInterventions(validate(edits_of(PROMPTS[0], clamp), model().facts.site_info))
    assert len(error.problems) == 2 and "interventions[0].clamp.min" in str(error)


@pytest.mark.parametrize(
    "pair",
    [
        (Zero(STREAM), Zero(STREAM)),
        (Mean(STREAM), Mean(STREAM, ONE)),
        (Replace(STREAM, FromRun(0)), Replace(STREAM, FromRun(1))),
        (SetCoordinate(STREAM, ONE, 1.0), SetCoordinate(STREAM, -2 * ONE, 1.0)),
    ],
)
def test_an_edit_that_undoes_another_is_a_conflict(pair: tuple[Op, Op]) -> None:
    ((field, text),) = problems(*pair)
    assert field == f"[1].{pair[1].arm}" and "undoes what interventions[0] does" in text
    first, second = Intervention(pair[0], Positions((0, 1))), Intervention(pair[1], Positions((2,)))
    assert problems(first, second) == []
    when = Condition(HookPoint(Site.EMBED), ONE, Comparison.LESS, 0.0)
    assert problems(pair[0], Intervention(pair[1], when=when)) == []


@pytest.mark.parametrize(
    "pair",
    [
        (Add(STREAM, ONE), Add(STREAM, ONE)),
        (Zero(STREAM), Add(STREAM, ONE)),
        (Freeze(FromRun(0), mlps=True), Zero(Target((HookPoint(Site.MLP_OUT, 0),)))),
        (SetCoordinate(STREAM, ONE, 1.0), SetCoordinate(STREAM, torch.eye(32)[0], 1.0)),
        (Zero(Target(HEADS.hook_points, (1,))), Zero(Target(HEADS.hook_points, (2,)))),
        (Zero(Target(NEURONS.hook_points, neurons=(1,))), Zero(Target(NEURONS.hook_points, neurons=(2,)))),
        (Add(STREAM, UnembedRow(3)), SetCoordinate(STREAM, UnembedRow(3), 1.0)),
    ],
)
def test_edits_that_go_together_are_let_pass(pair: tuple[Op, Op]) -> None:
    assert problems(*pair) == []


def test_knockouts_that_together_silence_a_query_are_refused() -> None:
    cut = Knockout(0, ((2, 0), (2, 1)), (1, 3))
    assert problems(cut, Knockout(0, ((2, 2),), (0,)), Knockout(1, ((2, 2),))) == []
    assert problems(cut, Intervention(Knockout(0, ((2, 2),)), Positions((4,)))) == []
    ((field, text),) = problems(cut, Knockout(0, ((2, 2),), (3,)))
    assert field == "[1].knockout.edges" and "position 2 would have nothing left" in text


def test_sites_are_in_the_order_of_the_data_flow() -> None:
    order = [
        HookPoint(Site.EMBED),
        HookPoint(Site.RESID_PRE, 0),
        HookPoint(Site.ATTN_PATTERN, 0),
        HookPoint(Site.ATTN_OUT, 0),
        HookPoint(Site.RESID_MID, 0),
        HookPoint(Site.MLP_POST, 0),
        HookPoint(Site.RESID_POST, 0),
        HookPoint(Site.RESID_PRE, 1),
        HookPoint(Site.LN_FINAL),
    ]
    for i, read in enumerate(order):
        assert [known_before(read, edit) for edit in order] == [j >= i for j in range(len(order))]
    assert not known_before(HookPoint(Site.ATTN_Q, 0), HookPoint(Site.ATTN_K, 0))
