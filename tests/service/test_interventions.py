"""Interventions of a request reach the worker as they were meant, or are refused with every field that is wrong."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from patchclamp.v1 import hook_point_pb2, intervention_pb2, run_pb2, tensor_pb2
from patchclamp_server.config import ServerConfig
from patchclamp_server.engine.messages import Loaded, RunSpec
from patchclamp_server.errors import InvalidArgument, NotServed, TooLarge
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions import ops
from patchclamp_server.interventions.ops import FromRun, Inline, Target, Unit
from patchclamp_server.interventions.sources import drawn
from patchclamp_server.positions import ALL, LAST, Positions, Span
from patchclamp_server.service.parse import parse_run_request
from service.build import between, edit, ids, indices, packed, span, target, unembed, vector
from service.stub import EDITABLE, FACTS

Edit = intervention_pb2.Intervention

ONES = [1.0] * 16
ONE = vector(ONES)
NONE = vector([0.0] * 16)
AT = {"target": target(layer=1)}
POINT = HookPoint(Site.RESID_POST, 1)
CONFIG = ServerConfig(model="stub")


def run_of(length: int, *edits: Edit, **fields: Any) -> run_pb2.RunSpec:
    return run_pb2.RunSpec(prompt=ids(*range(1, length + 1)), interventions=edits, **fields)


def parsed(*runs: run_pb2.RunSpec, facts: Any = EDITABLE, **settings: Any) -> tuple[RunSpec, ...]:
    config = CONFIG.model_copy(update=settings)
    return parse_run_request(run_pb2.RunRequest(runs=runs), Loaded(facts, None), config).runs


def one(*edits: Edit) -> ops.Intervention:
    """The first of some edits of a run of five tokens, beside another of five and one of three."""
    return parsed(run_of(5, *edits), run_of(5), run_of(3))[0].interventions[0]


def refused(*runs: run_pb2.RunSpec, facts: Any = EDITABLE) -> dict[str, str]:
    """What is wrong, by field."""
    with pytest.raises(InvalidArgument) as caught:
        parsed(*runs, facts=facts)
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert len(found) == len(caught.value.violations)
    return found


def op_of(edit: ops.Intervention, kind: type[Any]) -> Any:
    assert isinstance(edit.op, kind)
    return edit.op


def rows(values: Any) -> list[Any]:
    listed: list[Any] = values.tolist()
    return listed


def tensor(array: Any, **fields: Any) -> tensor_pb2.Tensor:
    values = np.asarray(array, "<f4")
    given = {"dtype": "DTYPE_FLOAT32", "shape": values.shape, "inline": values.tobytes()} | fields
    return tensor_pb2.Tensor(**given)


def patch(**fields: Any) -> Edit:
    return edit(patch=AT | fields)


def test_an_addition_is_absolute_and_once_unless_told_otherwise() -> None:
    op = op_of(one(edit(add=AT | {"vector": ONE})), ops.Add)
    assert op.target == Target((POINT,))
    assert rows(op.vector) == [ONES]
    assert (op.strength, op.unit, op.cap, op.keep_norm) == (1.0, Unit.ABSOLUTE, None, False)


@pytest.mark.parametrize("unit", ["ABSOLUTE", "DIRECTION", "NORM_FRACTION"])
def test_the_units_of_a_strength(unit: str) -> None:
    wire = {"vector": ONE, "strength": -2.5, "unit": f"STRENGTH_UNIT_{unit}", "keep_norm": True}
    op = op_of(one(edit(add=AT | wire)), ops.Add)
    assert (op.strength, op.unit.name, op.keep_norm) == (-2.5, unit, True)


def test_a_strength_of_zero_is_not_left_out_and_a_cap_bounds_norm_fractions() -> None:
    wire = {"vector": ONE, "strength": 0.0, "unit": "STRENGTH_UNIT_NORM_FRACTION", "cap": 3.0}
    op = op_of(one(edit(add=AT | wire)), ops.Add)
    assert (op.strength, op.cap) == (0.0, 3.0)


def test_the_other_updates_carry_their_direction_and_numbers() -> None:
    two = vector(np.ones((2, 16)))
    assert rows(op_of(one(edit(ablate=AT | {"directions": two})), ops.Ablate).directions) == [ONES, ONES]
    everywhere = op_of(one(edit(ablate_everywhere={"directions": two})), ops.AblateEverywhere)
    assert rows(everywhere.directions) == [ONES, ONES]
    placed = op_of(one(edit(set_coordinate=AT | {"direction": ONE, "value": 3.5})), ops.SetCoordinate)
    assert (rows(placed.direction), placed.value) == ([ONES], 3.5)
    scaled = op_of(one(edit(scale=AT | {"direction": packed(v=np.ones(16, "f4")), "factor": -1.0})), ops.Scale)
    assert (rows(scaled.direction), scaled.factor) == ([ONES], -1.0)
    low = op_of(one(edit(clamp=AT | {"direction": unembed(7), "min": 0.0})), ops.Clamp)
    assert (low.direction, low.low, low.high) == (ops.UnembedRow(7), 0.0, None)
    both = op_of(one(edit(clamp=AT | {"direction": ONE, "min": -1.0, "max": 2.0})), ops.Clamp)
    assert (both.low, both.high) == (-1.0, 2.0)


def test_a_target_without_a_layer_is_every_layer_that_has_the_site() -> None:
    everywhere = op_of(one(edit(zero={"target": target()})), ops.Zero).target
    assert everywhere.hook_points == tuple(HookPoint(Site.RESID_POST, layer) for layer in (0, 1, 2))
    some = op_of(one(edit(zero={"target": target("MLP_POST", neurons=[3, 1])})), ops.Zero).target
    assert some == Target((HookPoint(Site.MLP_POST, 0), HookPoint(Site.MLP_POST, 2)), (), (3, 1))
    outside = op_of(one(edit(zero={"target": target("EMBED")})), ops.Zero).target
    assert outside.hook_points == (HookPoint(Site.EMBED),)


def test_heads_come_from_the_target_or_its_hook_point() -> None:
    for wire in (target("ATTN_Z", layer=2, heads=[3]), target("ATTN_Z", layer=2, head=3)):
        found = op_of(one(edit(zero={"target": wire})), ops.Zero).target
        assert found == Target((HookPoint(Site.ATTN_Z, 2),), (3,))


def test_vectors_may_be_as_wide_as_the_neurons_of_the_target() -> None:
    at = {"target": target("MLP_POST", layer=0, neurons=[5, 2])}
    assert rows(op_of(one(edit(add=at | {"vector": vector([1.0, 2.0])})), ops.Add).vector) == [[1.0, 2.0]]
    assert rows(op_of(one(edit(mean=at | {"mean": vector([1.0, 2.0])})), ops.Mean).mean) == [[1.0, 2.0]]
    assert op_of(one(edit(add=at | {"vector": vector([1.0] * 24)})), ops.Add).vector.shape == (1, 24)


def test_a_mean_is_given_or_the_runs_own() -> None:
    assert op_of(one(edit(mean=AT)), ops.Mean).mean is None
    assert rows(op_of(one(edit(mean=AT | {"mean": NONE})), ops.Mean).mean) == [[0.0] * 16]
    heads = {"target": target("ATTN_Z", layer=0, heads=[0, 2]), "mean": vector(np.ones((2, 4)))}
    assert op_of(one(edit(mean=heads)), ops.Mean).mean.shape == (2, 4)


def test_a_knockout_names_edges_and_heads() -> None:
    edges = [{"query": 4, "key": 1}, {"query": -1, "key": -2}]
    op = op_of(one(edit(knockout={"layer": 2, "heads": [1, 0], "edges": edges})), ops.Knockout)
    assert (op.layer, op.heads, op.edges) == (2, (1, 0), ((4, 1), (-1, -2)))


def test_a_patch_takes_rows_of_another_run() -> None:
    (spec, *_) = parsed(run_of(5, patch(source_run=1)), run_of(5))
    op = op_of(spec.interventions[0], ops.Replace)
    assert (op.target, op.source, op.source_positions, op.arm) == (Target((POINT,)), FromRun(1), None, "patch")
    assert spec.sources == {(1, POINT)}
    shorter = patch(source_run=1, source_positions=indices(-1, 0))
    shorter.positions.CopyFrom(indices(3, 4))
    (spec, *_) = parsed(run_of(5, shorter), run_of(2))
    assert op_of(spec.interventions[0], ops.Replace).source_positions == Positions((-1, 0))
    last = patch(source_run=1, source_positions=span("LAST"))
    last.positions.CopyFrom(span("LAST"))
    assert parsed(run_of(5, last), run_of(2))[0].sources == {(1, POINT)}


def test_a_source_may_come_later_or_be_edited_itself() -> None:
    specs = parsed(run_of(5, patch(source_run=2)), run_of(5), run_of(5, patch(source_run=1)))
    assert [spec.sources for spec in specs] == [{(2, POINT)}, frozenset(), {(1, POINT)}]


def test_a_patch_brings_its_rows_along_shaped_as_they_are_selected() -> None:
    given = np.arange(32).reshape(2, 16)
    wire = patch(tensor=tensor(given))
    wire.positions.CopyFrom(indices(4, 0))
    op = op_of(one(wire), ops.Replace)
    assert isinstance(op.source, Inline)
    assert rows(op.source.rows) == given.tolist()
    at = {"target": target("ATTN_Z", layer=0, heads=[1, 2, 3]), "tensor": tensor(np.ones((5, 3, 4)))}
    assert op_of(one(edit(patch=at)), ops.Replace).source.rows.shape == (5, 3, 4)
    at = {"target": target("MLP_POST", layer=0, neurons=[7]), "tensor": tensor(np.ones((5, 1)))}
    assert op_of(one(edit(patch=at)), ops.Replace).source.rows.shape == (5, 1)
    at = {"target": target("ATTN_PATTERN", layer=0, head=2), "tensor": tensor(np.ones((1, 5, 5)))}
    assert op_of(one(edit(patch=at)), ops.Replace).source.rows.shape == (1, 5, 5)


def test_rows_are_chosen_of_those_brought_along() -> None:
    wire = patch(tensor=tensor(np.ones((7, 16))), source_positions=between(2, 7))
    op = op_of(one(wire), ops.Replace)
    assert op.source_positions.resolve(7) == (2, 3, 4, 5, 6)
    pattern = {"target": target("ATTN_PATTERN", layer=0), "tensor": tensor(np.ones((4, 7, 5)))}
    op = op_of(one(edit(patch=pattern | {"source_positions": between(2, 7)})), ops.Replace)
    assert op.source.rows.shape == (4, 7, 5)


def test_a_half_precision_tensor_becomes_float32() -> None:
    half = tensor(np.ones((5, 16)), dtype="DTYPE_FLOAT16", inline=np.ones((5, 16), "<f2").tobytes())
    source = op_of(one(patch(tensor=half)), ops.Replace).source
    assert source.rows.dtype == torch.float32
    assert bool((source.rows == 1).all())


def test_a_resample_is_drawn_once_for_each_run_and_seed() -> None:
    def sources(seed: int) -> list[Any]:
        wire = edit(resample=AT | {"source_runs": [2, 3, 4], "seed": seed})
        specs = parsed(run_of(5, wire), run_of(5, wire), run_of(5), run_of(5), run_of(5))
        found = [op_of(spec.interventions[0], ops.Replace) for spec in specs[:2]]
        assert [op.arm for op in found] == ["resample"] * 2
        assert [spec.sources for spec in specs[:2]] == [{(op.source.run, POINT)} for op in found]
        return [op.source.run for op in found]

    assert sources(3) == sources(3) == [drawn((2, 3, 4), 3, 0), drawn((2, 3, 4), 3, 1)]
    assert {source for seed in range(20) for source in sources(seed)} == {2, 3, 4}


def test_freezing_needs_the_values_of_every_site_it_holds() -> None:
    (spec, *_) = parsed(run_of(5, edit(freeze={"source_run": 1, "norms": True, "mlps": True})), run_of(5))
    op = op_of(spec.interventions[0], ops.Freeze)
    assert (op.source, op.attention, op.norms, op.mlps) == (FromRun(1), False, True, True)
    assert {point.site for _, point in spec.sources} == {Site.LN1_SCALE, Site.MLP_OUT}
    assert len(spec.sources) == 6


def test_positions_condition_and_leave_not_to_fire() -> None:
    when = {"hook_point": target(layer=0).hook_point, "direction": ONE, "comparison": "COMPARISON_LESS"}
    found = one(edit(zero=AT, positions=span("LAST"), when=when | {"threshold": -0.5}, allow_never_fired=True))
    assert (found.positions, found.allow_never_fired) == (LAST, True)
    assert found.when is not None
    assert found.when.hook_point == HookPoint(Site.RESID_POST, 0)
    assert (found.when.comparison, found.when.threshold) == (ops.Comparison.LESS, -0.5)
    assert torch.equal(found.when.direction, torch.ones(1, 16))  # type: ignore[arg-type]
    plain = one(edit(zero=AT))
    assert (plain.positions, plain.when, plain.allow_never_fired) == (ALL, None, False)


def test_selecting_nothing_is_for_the_run_to_fail_of() -> None:
    assert one(edit(zero=AT, positions=span("GENERATED"))).positions == Positions(Span.GENERATED)
    assert one(edit(zero=AT, positions=span("LAST", (4,)))).positions.resolve(5) == ()


def test_all_edits_stay_in_their_order() -> None:
    wires = [edit(zero=AT), edit(add=AT | {"vector": ONE}), edit(scale=AT | {"direction": ONE, "factor": 2.0})]
    (spec,) = parsed(run_of(5, *wires))
    assert [intervention.op.arm for intervention in spec.interventions] == ["zero", "add", "scale"]
    assert spec.sources == frozenset()


def add(**fields: Any) -> Edit:
    return edit(add=AT | {"vector": ONE} | fields)


def zero(**fields: Any) -> Edit:
    return edit(zero={"target": target(**fields)})


def cut(*edges: tuple[int, int], **fields: Any) -> Edit:
    return edit(knockout={"edges": [{"query": query, "key": key} for query, key in edges]} | fields)


def when(**fields: Any) -> Edit:
    point = hook_point_pb2.HookPoint(site=hook_point_pb2.SITE_RESID_POST, layer=0)
    given = {"hook_point": point, "direction": ONE, "comparison": "COMPARISON_GREATER"}
    return edit(zero=AT, when=given | fields)


NAN, INF = float("nan"), float("inf")
MLP: dict[str, Any] = {"site": "MLP_POST", "layer": 0}
Z: dict[str, Any] = {"site": "ATTN_Z", "layer": 0}
# The one edit of runs[0], of five tokens, beside runs[1] of five and runs[2] of three: field below it, what is said.
INVALID: dict[str, tuple[Edit, str, str]] = {
    "no site": (edit(zero={}), "zero.target.hook_point.site", "a site is needed"),
    "site of the future": (
        edit(zero={"target": {"hook_point": {"site": 999}}}), "zero.target.hook_point.site", "999 is not a site"
    ),
    "layer too high": (zero(layer=3), "zero.target.hook_point.layer", "0 .. 2"),
    "layer outside blocks": (zero(site="EMBED", layer=0), "zero.target.hook_point.layer", "leave the layer out"),
    "read-only": (zero(site="ATTN_RESULT"), "zero.target.hook_point.site", "read-only: results are computed aside"),
    "heads without an axis": (zero(heads=[0]), "zero.target.heads", "no head axis"),
    "head without an axis": (zero(head=0), "zero.target.hook_point.head", "no head axis"),
    "head too high": (zero(**Z, heads=[0, 4]), "zero.target.heads[1]", "0 .. 3"),
    "key head too high": (zero(site="ATTN_K", head=2), "zero.target.hook_point.head", "0 .. 1"),
    "heads twice": (zero(**Z, heads=[2, 2]), "zero.target.heads", "head 2 is there more than once"),
    "head and heads": (zero(**Z, head=1, heads=[1]), "zero.target.heads", "either"),
    "neuron too high": (zero(site="MLP_POST", neurons=[1, 24]), "zero.target.neurons[1]", "0 .. 23"),
    "neurons twice": (zero(**MLP, neurons=[2, 2]), "zero.target.neurons", "neuron 2 is there more than once"),
    "neurons of a pattern": (zero(site="ATTN_PATTERN", neurons=[1]), "zero.target.neurons", "knock out edges"),
    "adding to a pattern": (
        edit(add={"target": target("ATTN_PATTERN"), "vector": ONE}), "add.target.hook_point", "zeroed, replaced or"
    ),
    "no vector": (edit(add=AT), "add.vector", "set one of its sources"),
    "vector too narrow": (add(vector=vector([1.0] * 15)), "add.vector.tensor", "16 wide"),
    "vector as wide as no part": (
        edit(add={"target": target(site="MLP_POST", neurons=[1, 2]), "vector": vector([1.0] * 3)}),
        "add.vector.tensor", "24 wide, as this site's last axis is, or 2 wide, as the target's neurons are; it is 3",
    ),
    "vector of NaN": (add(vector=vector([NAN] * 16)), "add.vector.tensor", "finite"),
    "two vectors": (add(vector=vector(np.ones((2, 16)))), "add.vector", "one vector is needed"),
    "no direction": (add(vector=NONE, unit="STRENGTH_UNIT_DIRECTION"), "add.vector", "not be zero"),
    "no fraction": (add(vector=NONE, unit="STRENGTH_UNIT_NORM_FRACTION"), "add.vector", "not be zero"),
    "unit of the future": (add(unit=9), "add.unit", "ABSOLUTE, DIRECTION or NORM_FRACTION"),
    "strength infinite": (add(strength=INF), "add.strength", "finite in float32"),
    "strength beyond float32": (add(strength=1e300), "add.strength", "finite in float32"),
    "cap of nothing": (add(cap=0.0, unit="STRENGTH_UNIT_NORM_FRACTION"), "add.cap", "greater than 0"),
    "cap below nothing": (add(cap=-1.0, unit="STRENGTH_UNIT_NORM_FRACTION"), "add.cap", "greater than 0"),
    "cap infinite": (add(cap=INF, unit="STRENGTH_UNIT_NORM_FRACTION"), "add.cap", "finite"),
    "cap of what has none": (add(cap=1.0), "add.cap", "norm fraction"),
    "norm kept of some neurons": (
        edit(add={"target": target(**MLP, neurons=[1]), "vector": vector([1.0]), "keep_norm": True}),
        "add.keep_norm", "beyond the target's neurons",
    ),
    "ablating nothing": (edit(ablate=AT | {"directions": NONE}), "ablate.directions", "not be zero"),
    "ablating too much": (
        edit(ablate=AT | {"directions": vector(np.ones((257, 16)))}), "ablate.directions", "at most 256"
    ),
    "ablating nothing everywhere": (
        edit(ablate_everywhere={"directions": NONE}), "ablate_everywhere.directions", "not be zero"
    ),
    "ablating too narrowly everywhere": (
        edit(ablate_everywhere={"directions": vector([1.0])}), "ablate_everywhere.directions.tensor", "16 wide"
    ),
    "setting along nothing": (
        edit(set_coordinate=AT | {"direction": NONE}), "set_coordinate.direction", "not be zero"
    ),
    "setting to NaN": (
        edit(set_coordinate=AT | {"direction": ONE, "value": NAN}), "set_coordinate.value", "finite in float32"
    ),
    "scaling by infinity": (edit(scale=AT | {"direction": ONE, "factor": -INF}), "scale.factor", "finite in float32"),
    "no bound": (edit(clamp=AT | {"direction": ONE}), "clamp.min", "at least one bound"),
    "bounds crossed": (edit(clamp=AT | {"direction": ONE, "min": 2.0, "max": 1.0}), "clamp.min", "2.0 > 1.0"),
    "bound of NaN": (edit(clamp=AT | {"direction": ONE, "max": NAN}), "clamp.max", "finite in float32"),
    "mean too wide": (edit(mean=AT | {"mean": vector([1.0] * 17)}), "mean.mean.tensor", "16 wide"),
    "means of other heads": (
        edit(mean={"target": target(**Z, heads=[0, 1]), "mean": vector(np.ones((3, 4)))}),
        "mean.mean", "one row, or 2: one for each head",
    ),
    "mean over nothing": (edit(mean=AT, positions=span("GENERATED")), "positions", "position of the prompt"),
    "no run to draw from": (edit(resample=AT), "resample.source_runs", "at least one run"),
    "drawing from itself": (edit(resample=AT | {"source_runs": [1, 0]}), "resample.source_runs[1]", "this run itself"),
    "drawing from a stranger": (edit(resample=AT | {"source_runs": [3]}), "resample.source_runs[0]", "0 .. 2"),
    "drawing from a shorter run": (
        edit(resample=AT | {"source_runs": [1, 2]}), "resample.source_runs[1]", "3 tokens, and none at position 4"
    ),
    "drawing a smaller pattern": (
        edit(resample={"target": target("ATTN_PATTERN"), "source_runs": [2]}, positions=indices(0)),
        "resample.source_runs[0]", "as long as this run: it has 3 tokens, this one 5",
    ),
    "cutting nothing": (cut(layer=0), "knockout.edges", "at least one"),
    "cutting beyond the layers": (cut((1, 0), layer=3), "knockout.layer", "0 .. 2"),
    "cutting a head too high": (cut((1, 0), heads=[4]), "knockout.heads[0]", "0 .. 3"),
    "cutting a head twice": (cut((1, 0), heads=[1, 1]), "knockout.heads", "head 1 is there more than once"),
    "cutting outside": (cut((1, 0), (5, 0)), "knockout.edges[1]", "position 5 is outside"),
    "cutting what comes after": (cut((1, 2)), "knockout.edges[0]", "comes after it"),
    "cutting everything": (cut((1, 0), (1, 1)), "knockout.edges", "position 1 would have nothing left"),
    "patch from nowhere": (patch(), "patch", "set source_run or tensor"),
    "patch from itself": (patch(source_run=0), "patch.source_run", "this run itself"),
    "patch from a stranger": (patch(source_run=3), "patch.source_run", "0 .. 2"),
    "patch from a shorter run": (
        patch(source_run=2), "patch.source_positions", "runs[2] has 3 tokens, and none at position 4"
    ),
    "patch of too few rows": (
        patch(source_run=2, source_positions=span("ALL")), "patch.source_positions", "are needed: 5, not 3"
    ),
    "patch from outside": (
        patch(source_run=2, source_positions=indices(0, 3)),
        "patch.source_positions.indices.indices[1]", "outside a run of 3 tokens",
    ),
    "patch of a smaller pattern": (
        edit(
            patch={"target": target("ATTN_PATTERN"), "source_run": 2, "source_positions": indices(0)},
            positions=indices(0),
        ),
        "patch.source_run", "runs[2] must be as long as this run: it has 3 tokens, this one 5",
    ),
    "tensor too short": (patch(tensor=tensor(np.ones((4, 16)))), "patch.tensor.shape", "must be [5, 16], [pos, d_mod"),
    "tensor flat": (patch(tensor=tensor(ONES)), "patch.tensor.shape", "it is [16]"),
    "tensor without its heads": (
        edit(patch={"target": target(**Z, heads=[1, 2]), "tensor": tensor(np.ones((5, 4, 4)))}),
        "patch.tensor.shape", "must be [5, 2, 4], [pos, head, d_head]",
    ),
    "tensor of too few keys": (
        edit(patch={"target": target("ATTN_PATTERN"), "tensor": tensor(np.ones((4, 5, 3)))}),
        "patch.tensor.shape", "must be [4, 5, 5], [head, query, key]",
    ),
    "tensor for heads too high": (
        edit(patch={"target": target(**Z, heads=[1, 9]), "tensor": tensor(np.ones((5, 2, 4)))}),
        "patch.target.heads[1]", "0 .. 3",
    ),
    "tensor of negative sizes": (
        patch(tensor=tensor(np.ones((5, 16)), shape=[-5, -16]), source_positions=span("ALL")),
        "patch.tensor.shape", "must be [5, 16]",
    ),
    "tensor of integers": (patch(tensor=tensor(np.ones((5, 16)), dtype="DTYPE_INT32")), "patch.tensor.dtype", "float3"),
    "tensor cut off": (patch(tensor=tensor(np.ones((5, 16)), inline=b"1")), "patch.tensor.inline", "320 bytes are nee"),
    "tensor that follows": (
        patch(tensor=tensor_pb2.Tensor(dtype="DTYPE_FLOAT32", shape=[5, 16], streamed={})),
        "patch.tensor.inline", "must be inline",
    ),
    "tensor too large": (
        patch(tensor=tensor(np.ones((1 << 14, 17)))), "patch.tensor.inline", "patch from another run instead"
    ),
    "tensor of NaN": (patch(tensor=tensor(np.full((5, 16), NAN))), "patch.tensor", "finite"),
    "tensor's rows of others": (
        patch(tensor=tensor(np.ones((3, 16))), source_positions=indices(0, 1)),
        "patch.source_positions", "are needed: 5, not 2",
    ),
    "tensor's rows outside": (
        patch(tensor=tensor(np.ones((3, 16))), source_positions=indices(3)),
        "patch.source_positions.indices.indices[0]", "outside a run of 3",
    ),
    "freezing nothing": (edit(freeze={"source_run": 1}), "freeze", "attention, norms and mlps"),
    "freezing to itself": (edit(freeze={"mlps": True}), "freeze.source_run", "this run itself"),
    "freezing to a shorter run": (
        edit(freeze={"source_run": 2, "mlps": True}), "freeze.source_run", "as long as this run: it has 3 tokens"
    ),
    "position outside": (
        edit(zero=AT, positions=indices(5)), "positions.indices.indices[0]", "outside a run of 5 tokens"
    ),
    "no comparison": (when(comparison="COMPARISON_UNSPECIFIED"), "when.comparison", "GREATER or LESS"),
    "comparison of the future": (when(comparison=7), "when.comparison", "GREATER or LESS"),
    "threshold of NaN": (when(threshold=NAN), "when.threshold", "finite in float32"),
    "condition along nothing": (when(direction=NONE), "when.direction", "not be zero"),
    "condition without a vector": (when(direction={}), "when.direction", "set one of its sources"),
    "condition too narrow": (when(direction=vector([1.0])), "when.direction.tensor", "16 wide"),
    "condition nowhere": (when(hook_point={}), "when.hook_point.site", "a site is needed"),
    "condition in every layer": (
        when(hook_point=target().hook_point), "when.hook_point.layer", "one of 0, 1, 2 is needed"
    ),
    "condition of one head": (when(hook_point=target(layer=0, head=1).hook_point), "when.hook_point.head", "no head"),
    "condition of heads": (
        when(hook_point=target(**Z).hook_point, direction=vector([1.0] * 4)), "when.hook_point", "one row for each"
    ),
    "condition on a pattern": (
        when(hook_point=target("ATTN_PATTERN", layer=0).hook_point), "when.hook_point", "one row for each token"
    ),
    "condition too late": (when(hook_point=target(layer=2).hook_point), "when.hook_point", "not known before"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_edit_is_named_with_what_would_be_valid(case: str) -> None:
    wire, field, valid = INVALID[case]
    found = refused(run_of(5, wire), run_of(5), run_of(3))
    assert list(found) == [f"runs[0].interventions[0].{field}"]
    assert valid in found[f"runs[0].interventions[0].{field}"]


def test_every_problem_of_every_edit_is_told_once() -> None:
    found = refused(
        run_of(5, add(vector=vector([NAN] * 16), strength=INF), zero(layer=9), when(threshold=NAN), zero(layer=1)),
        run_of(3),
        run_of(
            4,
            edit(clamp={"target": target(heads=[1]), "direction": vector([1.0]), "min": NAN}, positions=indices(4)),
            edit(),
            patch(source_run=1),
            edit(freeze={"source_run": 7}),
            edit(add=AT | {"unit": 9, "strength": NAN}),
        ),
    )
    assert set(found) == {
        "runs[0].interventions[0].add.vector.tensor",
        "runs[0].interventions[0].add.strength",
        "runs[0].interventions[1].zero.target.hook_point.layer",
        "runs[0].interventions[2].when.threshold",
        "runs[2].interventions[0].clamp.target.heads",
        "runs[2].interventions[0].clamp.direction.tensor",
        "runs[2].interventions[0].clamp.min",
        "runs[2].interventions[0].positions.indices.indices[0]",
        "runs[2].interventions[1]",
        "runs[2].interventions[2].patch.source_positions",
        "runs[2].interventions[3].freeze",
        "runs[2].interventions[3].freeze.source_run",
        "runs[2].interventions[4].add.vector",
        "runs[2].interventions[4].add.unit",
        "runs[2].interventions[4].add.strength",
    }


def test_edits_are_looked_at_even_where_a_prompt_is_invalid() -> None:
    broken = run_pb2.RunSpec(prompt=ids(), interventions=[zero(layer=9), edit(freeze={"source_run": 9, "mlps": True})])
    found = refused(broken, run_of(5, patch(source_run=0, source_positions=indices(40))))
    assert set(found) == {
        "runs[0].prompt.token_ids.ids",
        "runs[0].interventions[0].zero.target.hook_point.layer",
        "runs[0].interventions[1].freeze.source_run",
    }


def test_a_tensor_is_looked_at_even_where_its_place_is_unknown() -> None:
    shapes: list[tuple[list[int], str]] = [([-5, -16], "shape"), ([0, 1 << 62, 1 << 62], "shape"), ([1] * 4, "shape")]
    for shape, field in [*shapes, ([5, 15], "inline"), ([], "inline")]:
        given = tensor(np.ones((5, 16)), shape=shape)
        found = refused(run_of(5, edit(patch={"target": target(layer=9), "tensor": given})))
        assert set(found) == {
            "runs[0].interventions[0].patch.target.hook_point.layer",
            f"runs[0].interventions[0].patch.tensor.{field}",
        }


def test_an_edit_that_undoes_another_is_told_with_the_other() -> None:
    found = refused(run_of(5, zero(layer=9), zero(layer=1), zero()))
    assert "undoes what interventions[1] does" in found["runs[0].interventions[2].zero"]


def test_what_cannot_be_written_says_why() -> None:
    reason = "patterns are read only"
    given = zero(site="ATTN_PATTERN", layer=1), cut((1, 0)), edit(freeze={"source_run": 1, "attention": True})
    found = refused(run_of(5, *given), run_of(5), facts=FACTS)
    assert reason in found["runs[0].interventions[0].zero.target.hook_point.site"]
    assert "scores are read only" in found["runs[0].interventions[1].knockout"]
    assert "Describe says why" in found["runs[0].interventions[2].freeze.attention"]


def test_a_site_that_is_absent_is_told_with_those_there_are() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parsed(run_of(5, zero(site="RESID_MID")))
    assert caught.value.reason == "SITE_ABSENT"
    assert "its blocks are parallel" in caught.value.message
    assert "attn.result" in caught.value.metadata["available"]


def test_runs_that_wait_for_each_other_are_refused_with_their_circle() -> None:
    ring = [run_of(5, patch(source_run=2)), run_of(5), run_of(5, zero(layer=0), patch(source_run=0))]
    pair = [
        run_of(5, edit(resample=AT | {"source_runs": [1, 4]})),
        run_of(5, edit(freeze={"source_run": 3, "mlps": True})),
    ]
    found = refused(*ring, *pair, run_of(5, patch(source_run=0)))
    circles = {text.rpartition(": ")[2] for text in found.values()}
    assert len(found) == 2
    assert circles <= {
        "runs[0] -> runs[2] -> runs[0]", "runs[2] -> runs[0] -> runs[2]",
        "runs[3] -> runs[4] -> runs[3]", "runs[4] -> runs[3] -> runs[4]",
    }  # fmt: skip
    for field, text in found.items():
        assert text.rpartition(": ")[2].startswith(field.partition(".")[0])


def test_a_circle_of_three_is_told_along_its_way() -> None:
    circle = [run_of(5, patch(source_run=(run + 1) % 3)) for run in range(3)]
    (text,) = refused(*circle).values()
    names = text.rpartition(": ")[2].split(" -> ")
    assert len(names) == 4 and names[0] == names[3]
    assert {("runs[0]", "runs[1]"), ("runs[1]", "runs[2]"), ("runs[2]", "runs[0]")} == set(pairwise(names))


@pytest.mark.parametrize(
    ("arm", "wire"),
    [
        ("interventions.feature", edit(feature={"set": 1.0})),
        ("interventions.patch.handle", patch(handle="replicas/r/handles/h")),
        ("vectors.direction", edit(add=AT | {"vector": {"direction": "refusal"}})),
        ("vectors.handle", edit(ablate=AT | {"directions": {"handle": "h"}})),
        ("vectors.decoder", edit(scale=AT | {"direction": {"decoder": {}}})),
        ("vectors.encoder", when(direction={"encoder": {}})),
    ],
)
def test_an_arm_that_is_not_served_is_named(arm: str, wire: Edit) -> None:
    with pytest.raises(NotServed) as caught:
        parsed(run_of(5, wire))
    assert caught.value.metadata["arm"] == arm


def exceeds(*runs: run_pb2.RunSpec, **settings: Any) -> TooLarge:
    with pytest.raises(TooLarge) as caught:
        parsed(*runs, **settings)
    return caught.value


def test_values_held_for_other_runs_count_against_the_bytes_of_results() -> None:
    # 3 layers x 5 positions x 16 entries x 4 bytes, held once for two runs; and one more layer of runs[1] for another
    runs = [run_of(5), run_of(5), run_of(5, edit(patch={"target": target(), "source_run": 0}))]
    runs += [run_of(5, patch(source_run=0)), run_of(5, patch(source_run=1))]
    assert parsed(*runs, max_result_bytes=960 + 320)
    excess = exceeds(*runs, max_result_bytes=960 + 319)
    assert "values that runs take from one another" in excess.message
    assert (excess.metadata["limit"], excess.metadata["demand"]) == ("1279", "1280")


def test_patterns_that_are_held_or_written_are_counted_whole() -> None:
    # 3 layers x 4 heads x 5 x 5 x 4 bytes
    frozen = run_of(5, edit(freeze={"source_run": 1, "attention": True})), run_of(5)
    assert exceeds(*frozen, max_result_bytes=1199).metadata["demand"] == "1200"
    # scores and patterns of one layer, in the making: 2 x 4 x 5 x 5 x 4
    assert exceeds(run_of(5, cut((1, 0))), max_result_bytes=799).metadata["demand"] == "800"
    assert parsed(run_of(5, cut((1, 0))), max_result_bytes=800)


def test_edges_of_one_run_are_limited() -> None:
    edges = [{"query": 4, "key": 0}] * 40_000
    excess = exceeds(run_of(5, *[edit(knockout={"layer": layer, "edges": edges}) for layer in (0, 1)]))
    assert "attention edges" in excess.message
    assert (excess.metadata["limit"], excess.metadata["demand"]) == ("65536", "80000")
