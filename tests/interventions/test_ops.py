"""Each operation does what its definition says, next to neighbours with other edits, on several families."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from engine.models import ROUNDING, close, look
from interventions.running import (
    FAMILIES,
    PROMPTS,
    agree,
    captured,
    edits_of,
    forward,
    model,
    places,
    planned,
    run_plan,
)
from patchclamp_server.engine.loading import Resident
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.expansion import expanded
from patchclamp_server.interventions.ops import (
    Ablate,
    AblateEverywhere,
    Add,
    Captured,
    Clamp,
    Comparison,
    Condition,
    Freeze,
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
    Unit,
    Zero,
)
from patchclamp_server.positions import LAST, Positions, Range, Span


def vector(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operations(target: Target, width: int) -> list[Op]:
    """Every operation that a site with vectors takes."""
    return [
        Add(target, vector(0, width), 2.5),
        Add(target, vector(1, width), -3.0, Unit.DIRECTION),
        Add(target, vector(2, width), 0.4, Unit.NORM_FRACTION),
        Add(target, vector(2, width), 0.4, Unit.NORM_FRACTION, cap=4.0),
        Ablate(target, vector(4, width)),
        Ablate(target, vector(5, 3, width)),
        Ablate(target, torch.cat([vector(6, 2, width), vector(6, 2, width) * 2])),  # four vectors that span a plane
        SetCoordinate(target, vector(7, width), 3.0),
        Clamp(target, vector(8, width), -0.2, 0.3),
        Clamp(target, vector(8, width), low=0.1),
        Scale(target, vector(9, width), -2.0),
        Zero(target),
        Mean(target, vector(10, width)),
        Mean(target),
    ]


def beside_others(op: Op) -> list[RowEdits]:
    """A batch where one row has an operation everywhere, one has nothing and one has it at some positions."""
    some = Positions(Range(1, -1), exclude=(-2,))
    return [edits_of(PROMPTS[0], op), edits_of(PROMPTS[1]), edits_of(PROMPTS[2], op, positions=some)]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_operation_on_the_stream_does_what_it_says(family: str) -> None:
    target = Target((HookPoint(Site.RESID_PRE, 1),))
    for op in [*operations(target, 32), Add(target, vector(3, 32), 1.5, keep_norm=True)]:
        agree(model(family), beside_others(op))


@pytest.mark.parametrize(
    ("site", "heads", "width"),
    [(Site.ATTN_Q, (2,), 8), (Site.ATTN_V, (), 8), (Site.ATTN_Z, (3, 0), 8), (Site.ATTN_RESULT, (1,), 32)],
)
def test_an_operation_on_heads_changes_these_heads(site: Site, heads: tuple[int, ...], width: int) -> None:
    target = Target((HookPoint(site, 0),), heads)
    for op in [*operations(target, width), Add(target, vector(3, width), 1.5, keep_norm=True)]:
        agree(model("llama"), beside_others(op))


def test_an_operation_on_neurons_changes_these_neurons() -> None:
    target = Target((HookPoint(Site.MLP_POST, 0),), neurons=(40, 3, 17, 22))
    for op in operations(target, 48):
        agree(model("llama"), beside_others(op))


def test_vectors_may_be_as_wide_as_the_neurons() -> None:
    neurons = (40, 3, 17)
    target = Target((HookPoint(Site.MLP_POST, 0),), neurons=neurons)
    full = torch.zeros(48)
    full[list(neurons)] = vector(0, 3)
    narrow, wide = (edits_of(PROMPTS[0], Add(target, given)) for given in (full[list(neurons)], full))
    outcome = run_plan(model(), planned(model(), [narrow, wide]), [PROMPTS[0]] * 2)
    assert torch.equal(outcome.logits[0], outcome.logits[1])


def test_an_operation_on_experts_changes_every_expert() -> None:
    """Whether a token is sent to it or not; an expert that it is not sent to has no weight."""
    for op in operations(Target((HookPoint(Site.EXPERT_POST, 1),)), 24):
        agree(model("qwen3_moe"), beside_others(op))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_writable_site_takes_an_operation(family: str) -> None:
    resident = model(family)
    for info in resident.facts.sites:
        if info.writable:
            point = HookPoint(info.site, info.layers[-1] if info.site.in_block else None)
            agree(resident, beside_others(Zero(Target((point,)))))
            if info.width:
                agree(resident, beside_others(Scale(Target((point,)), vector(0, info.width), 1.5)))


def test_a_mean_may_differ_between_heads() -> None:
    target = Target((HookPoint(Site.ATTN_Z, 0),), (2, 1))
    agree(model(), beside_others(Mean(target, vector(0, 2, 8))))


# Replacement.


@pytest.mark.parametrize("site", [Site.RESID_POST, Site.ATTN_Z, Site.MLP_POST, Site.ATTN_PATTERN, Site.LN2_SCALE])
def test_patched_rows_are_those_of_the_source(site: Site) -> None:
    """At the same positions, and at chosen ones in their order; of one head, where there are heads."""
    resident, point = model(), HookPoint(site, 0)
    source = Captured(captured(resident, PROMPTS[0], [point]))
    heads = (1,) if resident.facts.site_info[site].site.head_axis else ()
    same = edits_of(PROMPTS[2], Replace(Target((point,)), source), positions=Positions((1, 4)))
    others = Replace(Target((point,), heads), source, Positions((5, 0, -1)))
    moved = edits_of(PROMPTS[1], others, positions=Positions((2, -1, 1)))
    agree(resident, [edits_of(PROMPTS[0]), moved, same])


def test_inline_rows_are_taken_in_order() -> None:
    point = HookPoint(Site.ATTN_Z, 1)
    rows = Inline(vector(0, 2, 3, 8))
    op = Replace(Target((point,), (3, 0, 2)), rows)
    turned = Replace(Target((point,), (3, 0, 2)), rows, Positions((1, 0)))
    neurons = Replace(Target((HookPoint(Site.MLP_POST, 0),), neurons=(4, 2)), Inline(vector(1, 1, 2)))
    some = Positions((4, 1))
    agree(
        model(),
        [
            edits_of(PROMPTS[0], op, positions=some),
            edits_of(PROMPTS[1], turned, positions=some),
            edits_of(PROMPTS[2], neurons, positions=LAST),
        ],
    )


def test_a_run_patched_everywhere_is_the_source_from_there_on() -> None:
    resident, point = model("gpt2"), HookPoint(Site.RESID_POST, 0)
    other = PROMPTS[1] + PROMPTS[1][:2]
    source = Captured(captured(resident, other, [point]))
    edits = edits_of(PROMPTS[0], Replace(Target((point,)), source))
    patched = run_plan(resident, planned(resident, [edits]), [PROMPTS[0]])
    close(patched.logits[0], forward(resident, [other], {}).logits[0], ROUNDING["cpu"])


def test_a_pattern_of_fewer_keys_leaves_the_others_without_attention() -> None:
    resident, point = model(), HookPoint(Site.ATTN_PATTERN, 0)
    source = Captured(captured(resident, PROMPTS[1], [point]))
    edits = edits_of(PROMPTS[0], Replace(Target((point,)), source), positions=Positions((3, 4)))
    outcome = agree(resident, [edits], PROMPTS[:1])
    new = outcome.edits[0][2]
    assert new is not None and not new[0, :, 3:5, 5:].any()


def test_zeroed_scores_stay_masked() -> None:
    """A zero would let a query look ahead."""
    outcome = agree(model(), beside_others(Zero(Target((HookPoint(Site.ATTN_SCORES, 0),), (1,)))))
    new = outcome.edits[0][2]
    assert new is not None and new[0, 1].triu(1).eq(0).sum() == 7 * 8 / 2 and new[0, 1].isneginf().sum() == 7 * 6 / 2


def test_zeroed_scores_stay_within_the_sliding_window() -> None:
    """Four tokens wide in the first layer of this model."""
    scores = HookPoint(Site.ATTN_SCORES, 0)
    outcome = agree(model("gemma2"), beside_others(Zero(Target((scores,)))))
    new = outcome.edits[0][2]
    assert new is not None and bool(new[0, :, 6, :3].isneginf().all()) and not new[0, :, 6, 3:].any()


# Attention.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_a_knocked_out_edge_carries_nothing_and_all_others_carry_all(family: str) -> None:
    resident = model(family)
    edges = ((-1, 0), (-1, 1), (3, 1), (4, 1), (4, 0))
    op = Knockout(1, edges, (2, 0))
    agree(resident, beside_others(op))
    point = HookPoint(Site.ATTN_PATTERN, 1)
    plan = planned(resident, [edits_of(PROMPTS[0], op)])
    pattern = run_plan(resident, plan, PROMPTS[:1], [point]).values[point][0]
    before = captured(resident, PROMPTS[0], [point])[point]
    cut = torch.zeros(4, 7, 7, dtype=torch.bool)
    for query, key in edges:
        cut[[0, 2], query, key] = True
    assert not pattern[cut].any() and (pattern[~cut.any(-1)] == before[~cut.any(-1)]).all()
    close(pattern.sum(-1), torch.ones(4, 7), 1e-6)  # a float32 softmax over seven keys


def test_positions_choose_among_the_queries_of_a_knockout() -> None:
    edits = edits_of(PROMPTS[0], Knockout(0, ((3, 1), (4, 1), (5, 1))), positions=Positions((4,)))
    agree(model(), [edits], PROMPTS[:1])


def test_knockouts_of_one_layer_add_up() -> None:
    edits = edits_of(PROMPTS[0], Knockout(0, ((3, 1), (4, 1))), Knockout(0, ((3, 2),), (1,)))
    agree(model(), [edits], PROMPTS[:1])


# What is short for many.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_direction_ablated_everywhere_never_enters_the_stream(family: str) -> None:
    resident, directions = model(family), vector(0, 2, 32)
    plan = planned(resident, [edits_of(PROMPTS[0], AblateEverywhere(directions)), edits_of(PROMPTS[1])])
    stream = [HookPoint(Site.RESID_PRE, 0), HookPoint(Site.RESID_POST, 0), HookPoint(Site.RESID_POST, 1)]
    seen = run_plan(resident, plan, PROMPTS[:2], stream)
    for point in stream:
        left = seen.values[point][0] @ torch.nn.functional.normalize(directions).T
        # Values of some ten units in float32, each write rounded.
        close(left, torch.zeros_like(left), ROUNDING["cpu"], point)
    assert plan.receipts(0)[0].rows_changed > 7 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_run_keeps_what_is_frozen(family: str) -> None:
    """Patterns, divisors and MLP outputs stay those of the clean run, however the stream is changed before."""
    resident = model(family)
    sites = resident.facts.site_info
    every = Freeze(Captured({}), attention=True, norms=True, mlps=True)
    points = [point for op in expanded(every, sites) for point in op.target.hook_points]  # type: ignore[union-attr]
    kinds = {point.site for point in points}
    assert {Site.ATTN_PATTERN, Site.MLP_OUT, Site.LN_FINAL_SCALE} <= kinds
    clean = Captured(captured(resident, PROMPTS[0], points))
    steer = Add(Target((HookPoint(Site.RESID_PRE, 0),)), vector(0, 32), 3.0)
    plan = planned(resident, [edits_of(PROMPTS[0], steer, Freeze(clean, attention=True, norms=True, mlps=True))])
    seen = run_plan(resident, plan, PROMPTS[:1], [HookPoint(Site.RESID_POST, 1)])
    for point, _, new in seen.edits:
        if point in clean.values:
            assert new is not None and torch.equal(new[0], clean.values[point].double()), point
    assert plan.receipts(0)[1].rows_selected == 7 * len(points)


def test_with_all_frozen_the_effect_of_an_edit_is_linear() -> None:
    """Twice the vector moves the logits twice as far: only direct effects are left."""
    resident = model("llama")
    op = Freeze(Captured({}), attention=True, norms=True, mlps=True)
    points = [p for written in expanded(op, resident.facts.site_info) for p in written.target.hook_points]  # type: ignore[union-attr]
    freeze = Freeze(Captured(captured(resident, PROMPTS[0], points)), attention=True, norms=True, mlps=True)
    target = Target((HookPoint(Site.RESID_PRE, 0),))
    rows = [edits_of(PROMPTS[0], Add(target, vector(0, 32), strength), freeze) for strength in (0.0, 1.0, 2.0)]
    still, once, twice = run_plan(resident, planned(resident, rows), [PROMPTS[0]] * 3).logits
    assert (once - still).abs().max() > 0.1
    close(twice - still, 2 * (once - still), 4 * ROUNDING["cpu"])


# Conditions.


@pytest.mark.parametrize(
    ("family", "read", "edit"),
    [
        ("llama", HookPoint(Site.RESID_PRE, 0), HookPoint(Site.RESID_POST, 1)),
        ("llama", HookPoint(Site.RESID_POST, 0), HookPoint(Site.RESID_POST, 0)),
        ("gpt2", HookPoint(Site.EMBED), HookPoint(Site.ATTN_Z, 0)),
        ("gpt2", HookPoint(Site.MLP_POST, 0), HookPoint(Site.ATTN_PATTERN, 1)),
        ("gpt_neox", HookPoint(Site.LN1_NORMALIZED, 0), HookPoint(Site.MLP_OUT, 0)),
        ("gemma2", HookPoint(Site.RESID_MID, 0), HookPoint(Site.LN2_POST_SCALE, 0)),
        ("qwen3_moe", HookPoint(Site.ROUTER_LOGITS, 0), HookPoint(Site.MLP_OUT, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("comparison", Comparison)
def test_an_edit_applies_to_the_tokens_that_meet_its_condition(
    family: str, read: HookPoint, edit: HookPoint, comparison: Comparison
) -> None:
    resident = model(family)
    when = Condition(read, vector(0, resident.facts.site_info[read.site].width), comparison, 0.1)
    conditional = Intervention(Zero(Target((edit,))), Positions(Range(1)), when)
    # Another edit at the site of the condition does not change what it sees there.
    moving = Scale(Target((read,)), vector(0, resident.facts.site_info[read.site].width), -1.0)
    before = [moving] if resident.facts.site_info[read.site].writable else []
    agree(
        resident,
        [
            edits_of(PROMPTS[0], conditional),
            edits_of(PROMPTS[1], *before, conditional),
            edits_of(PROMPTS[2], Zero(Target((edit,)))),
        ],
    )


def test_conditions_decide_between_two_edits() -> None:
    point, direction = HookPoint(Site.RESID_PRE, 1), vector(0, 32)
    target = Target((point,))
    high, low = (Condition(point, direction, side, 0.0) for side in (Comparison.GREATER, Comparison.LESS))
    edits = edits_of(
        PROMPTS[0],
        Intervention(SetCoordinate(target, direction, 5.0), when=high),
        Intervention(SetCoordinate(target, direction, -5.0), when=low),
    )
    outcome = agree(model(), [edits], PROMPTS[:1])
    _, given, new = outcome.edits[0]
    unit = torch.nn.functional.normalize(direction.double(), dim=0)
    assert new is not None
    close(new[0] @ unit, 5 * (given[0] @ unit).sign(), 1e-6)


# In list order, and in a batch as alone.


def test_the_order_of_the_list_decides() -> None:
    target, direction = Target((HookPoint(Site.RESID_PRE, 1),)), vector(0, 32)
    put, remove = Add(target, direction, 4.0), Ablate(target, direction)
    plan = planned(model(), [edits_of(PROMPTS[0], put, remove), edits_of(PROMPTS[0], remove, put)])
    _, _, new = run_plan(model(), plan, [PROMPTS[0]] * 2).edits[0]
    assert new is not None
    coordinates = new @ torch.nn.functional.normalize(direction.double(), dim=0)
    close(coordinates[0], torch.zeros(7), 1e-6)
    close(coordinates[1], torch.full((7,), 4.0 * float(direction.norm())), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_in_a_batch_is_the_run_alone(family: str) -> None:
    """Float32, and edits that make values up to ten times as large as those that the engine's bound is for."""
    resident = model(family)
    stream = Target((HookPoint(Site.RESID_PRE, 1),))
    heads = Target((HookPoint(Site.ATTN_Z, 0),), (1,))
    rows = [
        edits_of(PROMPTS[0], Add(stream, vector(0, 32)), Ablate(stream, vector(1, 2, 32)), Zero(heads)),
        edits_of(PROMPTS[1], AblateEverywhere(vector(2, 32)), positions=Positions(Span.PROMPT)),
        edits_of(PROMPTS[2], Clamp(stream, vector(3, 32), 0.0, 0.5), Knockout(1, ((4, 2), (5, 0)))),
    ]
    together = logits(resident, rows, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        close(together[row], logits(resident, [rows[row]], [prompt])[0], 10 * ROUNDING["cpu"])


def logits(resident: Resident, rows: Sequence[RowEdits], prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    """As the engine runs it, in float32."""
    plan = planned(resident, rows, torch.float32)
    plan.step(places(prompts))
    return look(resident, prompts, reads=[], edits=plan.edits()).logits
