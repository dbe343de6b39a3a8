"""Interventions as callers write them: `pc.add`, `pc.ablate`, `pc.patch` and so on.

All take `positions` (which tokens; all of them unless told otherwise), `when` (a condition on each token) and
`allow_never_fired` (an edit that selects no position is reported, where it else fails its run). Whatever takes a `hook`
takes each name that `pc.read` does, or a list of them, and `heads` and `neurons` to edit only some of a site.
"""

# Arguments are called what they are called on the wire and in the papers.
# ruff: noqa: A002

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsFloat, SupportsIndex, TypeAlias

from numpy.typing import ArrayLike

from patchclamp import _operations as kinds
from patchclamp import _positions, _vectors
from patchclamp._arguments import flag, index, indices, number, unicode_text
from patchclamp._edit_arguments import (
    bounds,
    edge_places,
    hook_name,
    hook_names,
    pair_of_bounds,
    part,
    reach,
    seed_number,
)
from patchclamp._handles import Handle, is_handle_name
from patchclamp._interventions import Condition, Intervention
from patchclamp._operations import Unit
from patchclamp._positions import ALL, At, Positions, Span, is_whole_number
from patchclamp._vectors import Vector
from patchclamp.errors import invalid_field

Hooks: TypeAlias = "str | Sequence[str]"
Indices: TypeAlias = "SupportsIndex | Sequence[SupportsIndex] | None"
Edge: TypeAlias = "tuple[SupportsIndex | At | Span, SupportsIndex | At | Span]"


def when(
    hook: str, direction: Vector, *, greater: SupportsFloat | None = None, less: SupportsFloat | None = None
) -> Condition:
    """A condition: an intervention that has it applies only to tokens that meet it.

    Args:
        hook: Where the value is read, at the same token: `"blocks.3.resid_post"`. It must come no later in the forward
            pass than the edit.
        direction: The value is the projection of the row on this vector, normalised to unit length. [d]
        greater: Met above this.
        less: Met below this. Exactly one of the two is given.
    """
    if (greater is None) == (less is None):
        raise invalid_field("when", "takes exactly one of greater= and less=")
    return Condition(
        hook_name(hook),
        _vectors.vector(direction, "direction"),
        greater=None if greater is None else number(greater, "greater"),
        less=None if less is None else number(less, "less"),
    )


def add(
    hook: Hooks,
    vector: Vector,
    *,
    strength: SupportsFloat = 1.0,
    unit: Unit = "absolute",
    cap: SupportsFloat | None = None,
    keep_norm: bool = False,
    heads: Indices = None,
    neurons: Indices = None,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Adds a vector to the rows of a hook point.

    Args:
        hook: Where: `"blocks.3.resid_post"`, `"blocks.*.resid_post"` (every layer), or a list of names: the edits are
            made one after the other, and `run.receipts` sums them up.
        vector: What is added: an array [d], float64 sent as float32; a registered direction's name; a handle;
            `pc.decoder(layer, feature)`, `pc.encoder(layer, feature)` or `pc.unembed(token)`.
        strength: How much of it.
        unit: What strength is measured in: `"absolute"`: the vector as it is; `"direction"`: the unit vector;
            `"norm_fraction"`: the unit vector times the norm of the token's own row.
        cap: For `"norm_fraction"`: the most that the row's norm counts for.
        keep_norm: Rescale each edited row to the norm that it had.
        heads: Which heads, at sites with a head axis. Left out: all.
        neurons: Which entries of the last axis. Left out: all.
        positions: Which tokens: an int, a list, a slice, `pc.LAST`, `pc.PROMPT`, `pc.GENERATED`, `pc.at("text")`.
        when: Only tokens that meet this: `pc.when(..)`.
        allow_never_fired: Do not fail the run when no position is selected.
    """
    if unit not in kinds.UNITS:
        raise invalid_field("unit", f"{unit!r} is not one of {', '.join(kinds.UNITS)}")
    most = None if cap is None else number(cap, "cap")
    if most is not None and unit != "norm_fraction":
        raise invalid_field("cap", "belongs to unit='norm_fraction'")
    if most is not None and most <= 0:
        raise invalid_field("cap", f"{cap} is not greater than 0")
    return kinds.Add(
        hook_names(hook),
        _vectors.vector(vector, "vector"),
        strength=number(strength, "strength"),
        unit=unit,
        cap=most,
        keep_norm=flag(keep_norm, "keep_norm"),
        **part(heads, neurons),
        **reach(positions, when, allow_never_fired),
    )


def ablate(
    hook: Hooks,
    directions: Vector,
    *,
    heads: Indices = None,
    neurons: Indices = None,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Projects a direction, or the span of several, out of the rows of a hook point.

    `directions` is one vector [d] or a stack [n, d]; they need be neither unit nor orthogonal. The other arguments are
    those of `pc.add`.
    """
    return kinds.Ablate(
        hook_names(hook),
        _vectors.vector(directions, "directions", stack=True),
        **part(heads, neurons),
        **reach(positions, when, allow_never_fired),
    )


def ablate_everywhere(
    directions: Vector,
    *,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Projects a direction, or the span of several, out of everything that writes to the residual stream: embedding,
    attention and MLPs. `directions` is one vector [d_model] or a stack [n, d_model]."""
    return kinds.AblateEverywhere(
        _vectors.vector(directions, "directions", stack=True), **reach(positions, when, allow_never_fired)
    )


def set_coordinate(
    hook: Hooks,
    direction: Vector,
    value: SupportsFloat,
    *,
    heads: Indices = None,
    neurons: Indices = None,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Sets the coordinate of the rows along a direction [d], normalised to unit length, to a value. The other arguments
    are those of `pc.add`."""
    return kinds.SetCoordinate(
        hook_names(hook),
        _vectors.vector(direction, "direction"),
        number(value, "value"),
        **part(heads, neurons),
        **reach(positions, when, allow_never_fired),
    )


def clamp(
    hook: Hooks,
    direction: Vector,
    *,
    min: SupportsFloat | None = None,
    max: SupportsFloat | None = None,
    heads: Indices = None,
    neurons: Indices = None,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Bounds the coordinate of the rows along a direction [d], normalised to unit length: below by `min`, above by
    `max`, one of them at least. The other arguments are those of `pc.add`."""
    low, high = bounds(min, max, "min", "max")
    return kinds.Clamp(
        hook_names(hook),
        _vectors.vector(direction, "direction"),
        min=low,
        max=high,
        **part(heads, neurons),
        **reach(positions, when, allow_never_fired),
    )


def scale(
    hook: Hooks,
    direction: Vector,
    factor: SupportsFloat,
    *,
    heads: Indices = None,
    neurons: Indices = None,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Multiplies the coordinate of the rows along a direction [d], normalised to unit length. The other arguments are
    those of `pc.add`."""
    return kinds.Scale(
        hook_names(hook),
        _vectors.vector(direction, "direction"),
        number(factor, "factor"),
        **part(heads, neurons),
        **reach(positions, when, allow_never_fired),
    )


def zero(
    hook: Hooks,
    *,
    heads: Indices = None,
    neurons: Indices = None,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Replaces the rows of a hook point, or some heads or neurons, by zero. The arguments are those of `pc.add`."""
    return kinds.Zero(hook_names(hook), **part(heads, neurons), **reach(positions, when, allow_never_fired))


def mean(
    hook: Hooks,
    mean: Vector | None = None,
    *,
    heads: Indices = None,
    neurons: Indices = None,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Replaces the rows of a hook point, or some heads or neurons of it, by a mean.

    `mean` is as wide as the target: [d], or [head, d] with a row for each head. Left out: the mean over the run's own
    selected positions. The other arguments are those of `pc.add`.
    """
    return kinds.Mean(
        hook_names(hook),
        mean=None if mean is None else _vectors.vector(mean, "mean", stack=True),
        **part(heads, neurons),
        **reach(positions, when, allow_never_fired),
    )


def resample(
    hook: Hooks,
    sources: Indices,
    *,
    seed: SupportsIndex = 0,
    heads: Indices = None,
    neurons: Indices = None,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Replaces the rows of a hook point, or some heads or neurons of it, by those of another run of the call.

    `sources` are indices of runs in the list that `run_many` takes; one of them is drawn, by `seed`. The other
    arguments are those of `pc.add`.
    """
    runs = indices(sources, "sources", "run")
    if not runs:
        raise invalid_field("sources", "there is no run to draw from")
    return kinds.Resample(
        hook_names(hook),
        sources=runs,
        seed=seed_number(seed),
        **part(heads, neurons),
        **reach(positions, when, allow_never_fired),
    )


def patch(
    hook: Hooks,
    source: SupportsIndex | str | Handle | ArrayLike,
    *,
    source_positions: Positions | None = None,
    heads: Indices = None,
    neurons: Indices = None,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Replaces rows of a hook point by rows from elsewhere.

    Args:
        hook: Where, as for `pc.add`.
        source: Where the values come from: the index of another run in the list that `run_many` takes; a handle, or
            its name; or an array shaped like the selected rows, [n, d] or [n, head, d], float64 sent as float32.
        source_positions: Rows of the source, as many as are replaced, in order. Left out: the same positions.
            `pc.at("text")` is looked up in the source run's own prompt.
        heads: Which heads, at sites with a head axis. Left out: all.
        neurons: Which entries of the last axis. Left out: all.
        positions: Which rows are replaced, as for `pc.add`.
        when: Only tokens that meet this: `pc.when(..)`.
        allow_never_fired: Do not fail the run when no position is selected.
    """
    taken: int | str | Handle | _vectors.Values
    if isinstance(source, str):
        if not is_handle_name(source):
            raise invalid_field("source", f"{source!r} is no handle's name: replicas/../handles/..")
        taken = unicode_text(source, "source")
    elif isinstance(source, Handle):
        taken = source
    elif isinstance(source, bool) or is_whole_number(source):
        taken = index(source, "source", "run")
    else:
        taken = _vectors.values(source, "source", axes=(2, 3))
    rows = None if source_positions is None else _positions.settled(source_positions, "source_positions")
    if isinstance(rows, At) and not isinstance(taken, int):
        raise invalid_field(
            "source_positions", f"{rows} is looked up in the prompt of a source run; this source has none, give numbers"
        )
    return kinds.Patch(
        hook_names(hook),
        source=taken,
        source_positions=rows,
        **part(heads, neurons),
        **reach(positions, when, allow_never_fired),
    )


def knockout(
    layer: SupportsIndex | Sequence[SupportsIndex],
    heads: Indices,
    edges: Edge | Sequence[Edge],
    *,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Masks attention edges before the softmax.

    Args:
        layer: Which layer, or a list of layers.
        heads: Which heads; None for all.
        edges: Pairs (query, key), the position that attends first: ints, negative ones from the prompt's end, `pc.LAST`
            or `pc.at("text")`. A text of several tokens stands for each of them: the pair then is every edge between
            the two.
        positions: Only edges whose query is selected.
        when: Only queries that meet this: `pc.when(..)`.
        allow_never_fired: Do not fail the run when no position is selected.
    """
    layers = indices(layer, "layer", "layer")
    if not layers:
        raise invalid_field("layer", "there is no layer; give one at least")
    some = part(heads, None)["heads"]
    return kinds.Knockout(layers, some, edge_places(edges), **reach(positions, when, allow_never_fired))


def feature(
    layer: SupportsIndex,
    feature: SupportsIndex,
    *,
    set: SupportsFloat | None = None,
    scale: SupportsFloat | None = None,
    ablate: bool = False,
    clamp: tuple[SupportsFloat | None, SupportsFloat | None] | None = None,
    transcoder: str = "",
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Edits the activation of one transcoder feature; the reconstruction error is kept.

    Args:
        layer: Layer of the feature.
        feature: Its index in that layer.
        set: The activation becomes this.
        scale: The activation is multiplied by this.
        ablate: The activation becomes zero.
        clamp: The activation is bounded by (low, high); None for no bound. Exactly one of these four is given.
        transcoder: Name of the transcoder set, where several are loaded.
        positions: Which tokens, as for `pc.add`.
        when: Only tokens that meet this: `pc.when(..)`.
        allow_never_fired: Do not fail the run when no position is selected.
    """
    given = [
        name
        for name, there in [
            ("set", set is not None),
            ("scale", scale is not None),
            ("ablate", flag(ablate, "ablate")),
            ("clamp", clamp is not None),
        ]
        if there
    ]
    if len(given) != 1:
        said = f"got {' and '.join(given)}" if given else "got none"
        raise invalid_field("feature", f"takes exactly one of set=, scale=, ablate=True and clamp=; {said}")
    row = _vectors.feature_row("decoder", layer, feature, transcoder)
    return kinds.Feature(
        row.layer,
        row.feature,
        set=None if set is None else number(set, "set"),
        scale=None if scale is None else number(scale, "scale"),
        ablate=bool(ablate),
        clamp=None if clamp is None else pair_of_bounds(clamp),
        transcoder=row.transcoder,
        **reach(positions, when, allow_never_fired),
    )


def freeze(
    source: SupportsIndex,
    *,
    attention: bool = True,
    norms: bool = True,
    mlps: bool = False,
    positions: Positions = ALL,
    when: Condition | None = None,
    allow_never_fired: bool = False,
) -> Intervention:
    """Holds parts of the run to the values that they have in another run of the call, in every layer.

    `source` is that run's index in the list that `run_many` takes. Held are attention patterns, the divisors of all
    norms, and, if asked for, MLP outputs: with all three, what is left are direct effects.
    """
    held = flag(attention, "attention"), flag(norms, "norms"), flag(mlps, "mlps")
    if not any(held):
        raise invalid_field("freeze", "holds nothing; one of attention, norms and mlps must be True")
    return kinds.Freeze(
        index(source, "source", "run"),
        attention=held[0],
        norms=held[1],
        mlps=held[2],
        **reach(positions, when, allow_never_fired),
    )
