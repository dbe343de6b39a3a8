"""Interventions: what a caller may write, and what travels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import patchclamp as pc
from client.stand_in import tokenized
from patchclamp._interventions import Known
from patchclamp._tensors import IncomingTensor
from patchclamp.v1 import hook_point_pb2, prompt_pb2, vector_pb2
from patchclamp.v1 import intervention_pb2 as pb

D = np.array([1.0, 2.0, 3.0, 4.0])
SITE = "blocks.3.resid_post"
HANDLE = pc.Handle("replicas/r0/handles/abc", "blocks.2.resid_post", (8, 4), "bfloat16", 64)
TARGET = pb.Target(hook_point=hook_point_pb2.HookPoint(site=hook_point_pb2.SITE_RESID_POST, layer=3))
REFUSAL = vector_pb2.VectorSource(direction="refusal")
PROMPT = tokenized(prompt_pb2.Prompt(text="Fact: the capital of Texas is Austin Texas"))

# For what a type checker would refuse.
untyped: Any = pc

# Every function that makes one, with as few arguments as it takes.
MAKERS: dict[str, Callable[..., pc.Intervention]] = {
    "add": lambda **options: pc.add(SITE, "refusal", **options),
    "ablate": lambda **options: pc.ablate(SITE, "refusal", **options),
    "ablate_everywhere": lambda **options: pc.ablate_everywhere("refusal", **options),
    "set_coordinate": lambda **options: pc.set_coordinate(SITE, "refusal", 2, **options),
    "clamp": lambda **options: pc.clamp(SITE, "refusal", min=-1, **options),
    "scale": lambda **options: pc.scale(SITE, "refusal", 0.5, **options),
    "feature": lambda **options: pc.feature(3, 17, ablate=True, **options),
    "zero": lambda **options: pc.zero(SITE, **options),
    "mean": lambda **options: pc.mean(SITE, **options),
    "resample": lambda **options: pc.resample(SITE, sources=[1], **options),
    "knockout": lambda **options: pc.knockout(3, [1], [(-1, 2)], **options),
    "patch": lambda **options: pc.patch(SITE, source=0, **options),
    "freeze": lambda **options: pc.freeze(0, **options),
}
OF_SITES = sorted(set(MAKERS) - {"ablate_everywhere", "feature", "knockout", "freeze"})


def messages(intervention: pc.Intervention) -> list[pb.Intervention]:
    found = intervention.messages(Known("interventions", PROMPT, {1: PROMPT}, {" Austin": 9}))
    assert len(found) == intervention.count
    return found


def message(intervention: pc.Intervention) -> pb.Intervention:
    (found,) = messages(intervention)
    return found


def test_every_kind_of_the_protos_can_be_made() -> None:
    assert list(MAKERS) == [arm.name for arm in pb.Intervention.DESCRIPTOR.oneofs_by_name["op"].fields]
    for name, make in MAKERS.items():
        assert make().kind == message(make()).WhichOneof("op") == name
        assert isinstance(make(), pc.Intervention)


@pytest.mark.parametrize(
    ("intervention", "sent"),
    [
        (
            pc.add(SITE, "refusal", strength=4, unit="norm_fraction", cap=20, keep_norm=True),
            pb.Intervention(
                add=pb.AddEdit(
                    target=TARGET,
                    vector=REFUSAL,
                    strength=4,
                    unit=pb.STRENGTH_UNIT_NORM_FRACTION,
                    cap=20,
                    keep_norm=True,
                )
            ),
        ),
        (
            pc.add(SITE, pc.unembed(" Austin"), unit="direction"),
            pb.Intervention(
                add=pb.AddEdit(
                    target=TARGET,
                    vector=vector_pb2.VectorSource(unembed_token=9),
                    strength=1,
                    unit=pb.STRENGTH_UNIT_DIRECTION,
                )
            ),
        ),
        (MAKERS["ablate"](), pb.Intervention(ablate=pb.AblateEdit(target=TARGET, directions=REFUSAL))),
        (
            MAKERS["ablate_everywhere"](),
            pb.Intervention(ablate_everywhere=pb.AblateEverywhereEdit(directions=REFUSAL)),
        ),
        (
            MAKERS["set_coordinate"](),
            pb.Intervention(set_coordinate=pb.SetCoordinateEdit(target=TARGET, direction=REFUSAL, value=2)),
        ),
        (MAKERS["clamp"](), pb.Intervention(clamp=pb.ClampEdit(target=TARGET, direction=REFUSAL, min=-1))),
        (
            pc.clamp(SITE, "refusal", min=0, max=0),
            pb.Intervention(clamp=pb.ClampEdit(target=TARGET, direction=REFUSAL, min=0, max=0)),
        ),
        (MAKERS["scale"](), pb.Intervention(scale=pb.ScaleEdit(target=TARGET, direction=REFUSAL, factor=0.5))),
        (
            pc.feature(3, 17, set=0, transcoder="skip"),
            pb.Intervention(
                feature=pb.FeatureEdit(
                    feature=vector_pb2.FeatureRow(transcoder="skip", layer=3, feature=17),
                    set=0,
                )
            ),
        ),
        (
            pc.feature(3, 17, scale=-2),
            pb.Intervention(
                feature=pb.FeatureEdit(feature=vector_pb2.FeatureRow(layer=3, feature=17), scale=-2),
            ),
        ),
        (
            pc.feature(3, 17, ablate=True),
            pb.Intervention(
                feature=pb.FeatureEdit(feature=vector_pb2.FeatureRow(layer=3, feature=17), ablate=True),
            ),
        ),
        (
            pc.feature(3, 17, clamp=(None, 5)),
            pb.Intervention(
                feature=pb.FeatureEdit(feature=vector_pb2.FeatureRow(layer=3, feature=17), clamp=pb.Bounds(max=5)),
            ),
        ),
        (MAKERS["zero"](), pb.Intervention(zero=pb.ZeroEdit(target=TARGET))),
        (MAKERS["mean"](), pb.Intervention(mean=pb.MeanEdit(target=TARGET))),
        (pc.mean(SITE, "refusal"), pb.Intervention(mean=pb.MeanEdit(target=TARGET, mean=REFUSAL))),
        (
            pc.resample(SITE, [2, 1], seed=2**64 - 1),
            pb.Intervention(resample=pb.ResampleEdit(target=TARGET, source_runs=[2, 1], seed=2**64 - 1)),
        ),
        (
            MAKERS["knockout"](),
            pb.Intervention(knockout=pb.KnockoutEdit(layer=3, heads=[1], edges=[pb.AttentionEdge(query=-1, key=2)])),
        ),
        (MAKERS["patch"](), pb.Intervention(patch=pb.PatchEdit(target=TARGET, source_run=0))),
        (
            pc.patch(SITE, HANDLE, source_positions=slice(0, 2)),
            pb.Intervention(
                patch=pb.PatchEdit(
                    target=TARGET,
                    handle=HANDLE.name,
                    source_positions=hook_point_pb2.Positions(range=hook_point_pb2.PositionRange(start=0, stop=2)),
                )
            ),
        ),
        (pc.patch(SITE, HANDLE.name), pb.Intervention(patch=pb.PatchEdit(target=TARGET, handle=HANDLE.name))),
        (
            pc.freeze(2, mlps=True),
            pb.Intervention(freeze=pb.FreezeEdit(source_run=2, attention=True, norms=True, mlps=True)),
        ),
    ],
)
def test_what_travels(intervention: pc.Intervention, sent: pb.Intervention) -> None:
    sent.positions.span = hook_point_pb2.POSITION_SPAN_ALL
    assert message(intervention) == sent


def test_vectors_travel_as_float32() -> None:
    tensor = message(pc.add(SITE, D)).add.vector.tensor
    np.testing.assert_array_equal(IncomingTensor(tensor).array(), D.astype(np.float32))
    assert list(message(pc.ablate(SITE, np.ones((2, 4)))).ablate.directions.tensor.shape) == [2, 4]
    assert list(message(pc.mean("blocks.0.attn.z", np.ones((2, 4)))).mean.mean.tensor.shape) == [2, 4]
    assert list(message(pc.patch(SITE, np.ones((3, 4)))).patch.tensor.shape) == [3, 4]
    assert list(message(pc.patch("attn.z", np.ones((3, 2, 4)))).patch.tensor.shape) == [3, 2, 4]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_all_take_positions_conditions_and_leave_to_miss(make: Callable[..., pc.Intervention]) -> None:
    condition = pc.when("blocks.2.resid_pre", "refusal", greater=1.5)
    found = message(make(positions=pc.at("capital"), when=condition, allow_never_fired=True))
    assert list(found.positions.indices.indices) == [4]
    assert found.allow_never_fired
    assert found.when == pb.Condition(
        hook_point=hook_point_pb2.HookPoint(site=hook_point_pb2.SITE_RESID_PRE, layer=2),
        direction=REFUSAL,
        comparison=pb.COMPARISON_GREATER,
        threshold=1.5,
    )


def test_conditions_look_up_their_tokens() -> None:
    edit = pc.zero(SITE, when=pc.when("embed", pc.unembed(" Austin"), less=0))
    assert list(edit.token_texts()) == [("when.direction", " Austin")]
    found = message(edit).when
    assert (found.comparison, found.threshold) == (pb.COMPARISON_LESS, 0)
    assert found.direction.unembed_token == 9


@pytest.mark.parametrize(
    ("positions", "sent"),
    [
        (pc.LAST, hook_point_pb2.Positions(span=hook_point_pb2.POSITION_SPAN_LAST)),
        ("generated", hook_point_pb2.Positions(span=hook_point_pb2.POSITION_SPAN_GENERATED)),
        (None, hook_point_pb2.Positions(span=hook_point_pb2.POSITION_SPAN_ALL)),
        (-1, hook_point_pb2.Positions(indices=hook_point_pb2.PositionIndices(indices=[-1]))),
        (range(2, 4), hook_point_pb2.Positions(indices=hook_point_pb2.PositionIndices(indices=[2, 3]))),
        (np.array([5, 0]), hook_point_pb2.Positions(indices=hook_point_pb2.PositionIndices(indices=[5, 0]))),
        (slice(1, None), hook_point_pb2.Positions(range=hook_point_pb2.PositionRange(start=1))),
    ],
)
def test_positions(positions: Any, sent: hook_point_pb2.Positions) -> None:
    assert message(pc.zero(SITE, positions=positions)).positions == sent


@pytest.mark.parametrize("name", OF_SITES)
def test_heads_and_neurons_are_part_of_the_target(name: str) -> None:
    op = getattr(message(MAKERS[name](heads=1, neurons=np.array([5, 3]))), name)
    assert (list(op.target.heads), list(op.target.neurons)) == ([1], [5, 3])


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.3.hook_resid_post", 3), ("blocks.*.resid_post", None), ("resid_post", None), ("blocks.0.resid_post", 0)],
)
def test_hooks_have_the_names_that_reads_take(hook: str, layer: int | None) -> None:
    found = message(pc.zero(hook)).zero.target.hook_point
    assert found.site == hook_point_pb2.SITE_RESID_POST
    assert (found.layer if found.HasField("layer") else None) == layer


def test_several_hooks_travel_as_several_in_their_order() -> None:
    edit = pc.add(["blocks.2.resid_post", "blocks.0.hook_attn_out"], "refusal", strength=3, positions=pc.LAST)
    first, second = messages(edit)
    assert (first.add.target.hook_point.layer, second.add.target.hook_point.layer) == (2, 0)
    assert second.add.target.hook_point.site == hook_point_pb2.SITE_ATTN_OUT
    for found in (first, second):
        found.add.ClearField("target")
    assert first == second
    assert edit.where == "blocks.2.resid_post, blocks.0.attn.out"


def test_several_layers_of_a_knockout_travel_as_several() -> None:
    found = messages(pc.knockout([2, 0], None, [(3, 1), (3, 2)]))
    assert [each.knockout.layer for each in found] == [2, 0]
    assert not found[0].knockout.heads and len(found[0].knockout.edges) == 2


@pytest.mark.parametrize(
    ("edges", "sent"),
    [
        ((5, 2), [(5, 2)]),
        ([5, 2], [(5, 2)]),
        ([(5, 2), [3, 3]], [(5, 2), (3, 3)]),
        (np.array([[5, 2], [4, 1]]), [(5, 2), (4, 1)]),
        ((pc.LAST, pc.at("capital")), [(-1, 4)]),
        ((pc.LAST, pc.at("the capital")), [(-1, 3), (-1, 4)]),
        ((pc.at("Texas is"), pc.at("of Texas")), [(6, 5), (6, 6), (7, 5), (7, 6)]),
        ((-9, pc.at("Fact:")), [(-9, 1)]),
    ],
)
def test_edges(edges: Any, sent: list[tuple[int, int]]) -> None:
    edit = pc.knockout(0, 0, edges)
    assert [(edge.query, edge.key) for edge in message(edit).knockout.edges] == sent
    assert edit.needs_prompt == ("pc.at" in repr(edges))


def test_an_edge_to_what_comes_later_is_none() -> None:
    with pytest.raises(pc.InvalidArgument, match=r"^interventions\.edges\[0\]: pc.at\('of Texas'\) comes after"):
        message(pc.knockout(0, 0, [(pc.at("the capital"), pc.at("of Texas"))]))


def test_rows_of_the_source_are_looked_up_in_its_own_prompt() -> None:
    edit = pc.patch(SITE, source=1, positions=3, source_positions=pc.at("capital"))
    assert (edit.looked_up_run, edit.needs_prompt) == (1, False)
    assert list(message(edit).patch.source_positions.indices.indices) == [4]
    assert pc.patch(SITE, source=1, source_positions=[2]).looked_up_run is None
    with pytest.raises(pc.InvalidArgument, match=r"^source_positions: .* this source has none, give numbers"):
        pc.patch(SITE, source=HANDLE, source_positions=pc.at("capital"))


def test_they_are_values() -> None:
    def make(strength: float) -> pc.Intervention:
        return pc.add(SITE, D, strength=strength, positions=[1, 2], when=pc.when("embed", D, less=3))

    assert make(1) == make(1) and hash(make(1)) == hash(make(1))
    assert make(1) != make(2)
    with pytest.raises(AttributeError):
        make(1).strength = 2  # type: ignore[attr-defined]
    positions = [1, 2]
    edit = pc.zero(SITE, positions=positions)
    positions.append(3)
    assert list(message(edit).positions.indices.indices) == [1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "pc.add('blocks.3.resid_post', <float32 [4]>, positions=pc.LAST, strength=2.0, unit='direction')",
        "pc.ablate(['blocks.1.resid_post', 'blocks.2.resid_post'], 'refusal', heads=[1, 2])",
        "pc.ablate_everywhere('refusal', when=pc.when('blocks.2.resid_pre', pc.decoder(1, 2), greater=1.0))",
        "pc.set_coordinate('embed', pc.unembed(' Austin'), 3.0)",
        "pc.clamp('embed', 'refusal', positions=[1, 2], max=1.0)",
        "pc.zero('blocks.*.attn.z', allow_never_fired=True)",
        "pc.resample('blocks.*.attn.z', sources=[1, 2], seed=7)",
        "pc.knockout([1, 2], [0], [(pc.LAST, pc.at('Dallas'))])",
        "pc.knockout([1], None, [(3, 2)])",
        "pc.patch('blocks.2.resid_post', positions=pc.at('D'), source=0)",
        "pc.feature(1, 2, clamp=(0.0, None))",
        "pc.freeze(0, mlps=True)",
    ],
)
def test_they_print_as_they_are_written(text: str) -> None:
    made = eval(text.replace("<float32 [4]>", "D"))  # noqa: S307
    assert repr(made) == text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: untyped.add("blocks.3.resid_pots", D), "hook: no hook point is called"),
        (lambda: untyped.add([], D), "hook: an empty list"),
        (lambda: untyped.add([SITE, SITE], D), "hook: 'blocks.3.resid_post' is there already"),
        (lambda: untyped.add(["resid_post", SITE], D), "hook: .* is there already, as 'blocks.*.resid_post'"),
        (lambda: untyped.add(SITE, [np.inf]), "vector: holds values that are not finite"),
        (lambda: untyped.add(SITE, np.ones((2, 4))), "vector: 2 vectors"),
        (lambda: untyped.add(SITE, D, strength=float("nan")), "strength: nan is not finite"),
        (lambda: untyped.add(SITE, D, strength=10**400), "strength: .* is not finite"),
        (lambda: untyped.add(SITE, D, unit="sigma"), "unit: 'sigma' is not one of absolute, direction, norm_fraction"),
        (lambda: untyped.add(SITE, D, cap=3), "cap: belongs to unit='norm_fraction'"),
        (lambda: untyped.add(SITE, D, unit="norm_fraction", cap=0), "cap: 0 is not greater than 0"),
        (lambda: untyped.add(SITE, D, positions=[]), "positions: an empty list"),
        (lambda: untyped.add(SITE, D, positions=[1, 1]), "positions: position 1 is there twice"),
        (lambda: untyped.zero("attn.z", heads=[]), "heads: an empty list selects nothing"),
        (lambda: untyped.zero("attn.z", heads=[1, 1]), "heads: a head is there twice"),
        (lambda: untyped.zero("attn.z", neurons=[-1]), "neurons: -1 is no neuron"),
        (lambda: untyped.ablate(SITE, np.ones((1, 1, 1))), "directions: an array of shape"),
        (lambda: untyped.set_coordinate(SITE, D, np.inf), "value: inf is not finite"),
        (lambda: untyped.clamp(SITE, D), "min: neither min nor max"),
        (lambda: untyped.clamp(SITE, D, min=2, max=1), "min: 2.0 is above max, 1.0"),
        (lambda: untyped.scale(SITE, D, -np.inf), "factor: -inf is not finite"),
        (lambda: untyped.resample(SITE, []), "sources: there is no run"),
        (lambda: untyped.resample(SITE, [0], seed=-1), "seed: -1 is not"),
        (lambda: untyped.knockout([], 0, (1, 0)), "layer: there is no layer"),
        (lambda: untyped.knockout(-1, 0, (1, 0)), "layer: -1 is no layer"),
        (lambda: untyped.knockout(0, [], (1, 0)), "heads: an empty list selects nothing"),
        (lambda: untyped.knockout(0, 0, []), "edges: an empty list"),
        (lambda: untyped.knockout(0, 0, [(1, 2**40)]), r"edges\[0\]: position 1099511627776 is beyond"),
        (lambda: untyped.patch(SITE, "abc"), "source: 'abc' is no handle's name"),
        (lambda: untyped.patch(SITE, -1), "source: -1 is no run"),
        (lambda: untyped.patch(SITE, D), r"source: an array of shape \(4,\); what fits is \[n, d\] or \[n, head, d\]"),
        (lambda: untyped.feature(0, 1), "feature: takes exactly one of .*; got none"),
        (lambda: untyped.feature(0, 1, set=1, ablate=True), "feature: takes exactly one of .*; got set and ablate"),
        (lambda: untyped.feature(0, 1, clamp=(2, 1)), r"clamp\[0\]: 2.0 is above clamp\[1\], 1.0"),
        (lambda: untyped.feature(0, 1, clamp=(None, None)), r"clamp\[0\]: neither"),
        (lambda: untyped.freeze(0, attention=False, norms=False), "freeze: holds nothing"),
        (lambda: untyped.when(SITE, D), "when: takes exactly one of greater= and less="),
        (lambda: untyped.when(SITE, D, greater=1, less=2), "when: takes exactly one"),
        (lambda: untyped.when(SITE, np.ones((2, 4)), less=2), "direction: 2 vectors"),
    ],
)
def test_refuses_at_once(make: Any, words: str) -> None:
    with pytest.raises(pc.InvalidArgument, match=f"^{words}"):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: untyped.add(3, D), "hook is a name"),
        (lambda: untyped.add([3], D), "hook is a name"),
        (lambda: untyped.add(SITE, D, strength=True), "strength is a number"),
        (lambda: untyped.add(SITE, D, strength="2"), "strength is a number"),
        (lambda: untyped.add(SITE, D, strength=np.ones(1)), "strength is a number"),
        (lambda: untyped.add(SITE, D, keep_norm=1), "keep_norm is True or False"),
        (lambda: untyped.add(SITE, D, positions=True), "positions is an int"),
        (lambda: untyped.add(SITE, D, when=True), r"when is pc\.when\(\.\.\)"),
        (lambda: untyped.zero(SITE, allow_never_fired="yes"), "allow_never_fired is True or False"),
        (lambda: untyped.zero("attn.z", heads=True), "heads is a list of head indices"),
        (lambda: untyped.zero("attn.z", heads=[True]), "heads is a list of head indices"),
        (lambda: untyped.zero("attn.z", heads="0"), "heads is a list of head indices"),
        (lambda: untyped.zero("mlp.post", neurons=np.array([True, False])), "neurons is a boolean mask"),
        (lambda: untyped.patch(SITE, source=True), "source is the index of a run"),
        (lambda: untyped.freeze(True), "source is the index of a run"),
        (lambda: untyped.freeze(0, mlps=1), "mlps is True or False"),
        (lambda: untyped.resample(SITE, [True]), "sources is a list of run indices"),
        (lambda: untyped.resample(SITE, [0], seed=1.5), "seed is a whole number"),
        (lambda: untyped.knockout(True, 0, (1, 0)), "layer is a list of layer indices"),
        (lambda: untyped.knockout(0, 0, 3), "edges is a list of pairs"),
        (lambda: untyped.knockout(0, 0, [3]), r"edges\[0\] is a pair"),
        (lambda: untyped.knockout(0, 0, [(1, 2, 3)]), r"edges\[0\] is a pair"),
        (lambda: untyped.knockout(0, 0, [(True, 0)]), r"edges\[0\] is made of ints"),
        (lambda: untyped.knockout(0, 0, [(pc.ALL, 0)]), r"edges\[0\] is made of ints"),
        (lambda: untyped.feature(0, 1, ablate=1), "ablate is True or False"),
        (lambda: untyped.feature(0, 1, clamp=3), r"clamp is a pair \(low, high\)"),
        (lambda: untyped.feature(0, 1.0, set=3), "feature is the index of a feature"),
    ],
)
def test_wrong_types_are_type_errors(make: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"^{words}"):
        make()
