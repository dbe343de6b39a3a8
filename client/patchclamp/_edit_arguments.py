"""The arguments of interventions, checked: only what is wrong whatever the model; the rest is the server's to say."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, TypedDict

from patchclamp import _positions
from patchclamp._arguments import flag, indices, number
from patchclamp._hookpoints import HookName, parse
from patchclamp._interventions import Condition
from patchclamp._operations import Place
from patchclamp._positions import LAST, At, Positions, Span, is_whole_number
from patchclamp.errors import invalid_field

_INT32 = range(-(2**31), 2**31)
_SEEDS = 2**64


class Reach(TypedDict):
    """Which tokens an intervention applies to."""

    positions: Positions
    when: Condition | None
    allow_never_fired: bool


class Part(TypedDict):
    """Which part of a site an intervention applies to; empty: all."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def reach(positions: Any, when: Any, allow_never_fired: Any) -> Reach:
    """The arguments that all interventions take."""
    if when is not None and not isinstance(when, Condition):
        raise TypeError(f"when is pc.when(..), not {when!r}")
    return Reach(
        positions=_positions.settled(positions, "positions"),
        when=when,
        allow_never_fired=flag(allow_never_fired, "allow_never_fired"),
    )


def part(heads: Any, neurons: Any) -> Part:
    """Heads and neurons. Empty lists are refused: on the wire they would mean all."""
    chosen = Part(heads=indices(heads, "heads", "head"), neurons=indices(neurons, "neurons", "neuron"))
    for name, given, found in (("heads", heads, chosen["heads"]), ("neurons", neurons, chosen["neurons"])):
        if given is not None and not found:
            raise invalid_field(name, "an empty list selects nothing; leave it out for all")
    return chosen


def hook_name(hook: Any) -> HookName:
    """One hook point."""
    if not isinstance(hook, str):
        raise TypeError(f"hook is a name such as 'blocks.3.resid_post', not {hook!r}")
    return parse(hook)


def hook_names(hook: Any) -> tuple[HookName, ...]:
    """One hook point, or several that do not overlap: an edit is not made twice."""
    if isinstance(hook, str):
        return (parse(hook),)
    if not isinstance(hook, Iterable):
        raise TypeError(f"hook is a name such as 'blocks.3.resid_post', or a list of names, not {hook!r}")
    hooks = tuple(hook_name(item) for item in hook)
    if not hooks:
        raise invalid_field("hook", "an empty list; give one name at least")
    for number_of_hook, one in enumerate(hooks):
        for other in hooks[:number_of_hook]:
            if one.site == other.site and (one.layer == other.layer or None in (one.layer, other.layer)):
                raise invalid_field("hook", f"{str(one)!r} is there already, as {str(other)!r}")
    return hooks


def bounds(low: Any, high: Any, low_name: str, high_name: str) -> tuple[float | None, float | None]:
    """A lower and an upper bound, one of them at least."""
    if low is None and high is None:
        raise invalid_field(low_name, f"neither {low_name} nor {high_name} is given; one bound is needed")
    least = None if low is None else number(low, low_name)
    most = None if high is None else number(high, high_name)
    if least is not None and most is not None and least > most:
        raise invalid_field(low_name, f"{least} is above {high_name}, {most}")
    return least, most


def pair_of_bounds(pair: Any) -> tuple[float | None, float | None]:
    """Bounds as a pair."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"clamp is a pair (low, high), not {pair!r}")
    low, high = pair
    return bounds(low, high, "clamp[0]", "clamp[1]")


def seed_number(seed: Any) -> int:
    """A seed that can travel."""
    if not is_whole_number(seed):
        raise TypeError(f"seed is a whole number, not {seed!r}")
    found = operator.index(seed)
    if not 0 <= found < _SEEDS:
        raise invalid_field("seed", f"{found} is not a number of 64 bits, 0 or more")
    return found


def edge_places(edges: Any) -> tuple[tuple[Place, Place], ...]:
    """Attention edges as pairs (query, key); one pair alone is a list of one."""
    if isinstance(edges, str) or not isinstance(edges, Iterable):
        raise TypeError(f"edges is a list of pairs (query, key), not {edges!r}")
    items = list(edges)
    if len(items) == 2 and all(is_whole_number(item) or isinstance(item, At | Span) for item in items):
        items = [items]
    if not items:
        raise invalid_field("edges", "an empty list; give one pair (query, key) at least")
    return tuple(_edge(item, f"edges[{number_of_edge}]") for number_of_edge, item in enumerate(items))


def _edge(edge: Any, field: str) -> tuple[Place, Place]:
    pair = list(edge) if isinstance(edge, Iterable) and not isinstance(edge, str) else []
    if len(pair) != 2:
        raise TypeError(f"{field} is a pair (query, key), not {edge!r}")
    return _place(pair[0], field), _place(pair[1], field)


def _place(place: Any, field: str) -> Place:
    if isinstance(place, At) or place == LAST:
        return place
    if not is_whole_number(place):
        raise TypeError(f"{field} is made of ints, pc.LAST or pc.at('text'), not {place!r}")
    position = operator.index(place)
    if position not in _INT32:
        raise invalid_field(field, f"position {position} is beyond any context")
    return position
