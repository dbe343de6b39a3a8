"""Targets of edits: sites that may be written, with the heads and neurons that are meant."""

from __future__ import annotations

from dataclasses import dataclass

from patchclamp.v1 import intervention_pb2
from patchclamp_server.adapters.facts import ModelFacts
from patchclamp_server.hookpoints import HookPoint, SiteInfo
from patchclamp_server.interventions.ops import Target
from patchclamp_server.service.selection import are_indices, parse_heads
from patchclamp_server.service.sites import parse_site
from patchclamp_server.service.violations import Violations

NOWHERE = Target(())
"""Stands for a target that is invalid, so that the rest of its edit can be looked at."""


@dataclass(frozen=True)
class Aim:
    """Where an edit goes: its site, None where that is invalid; its target, NOWHERE where anything of it is; and how
    many neurons it names."""

    info: SiteInfo | None
    target: Target
    neurons: int

    @property
    def width(self) -> int:
        """Size of the site's last axis; 0 where it is not known."""
        return 0 if self.info is None else self.info.width


def parse_target(wire: intervention_pb2.Target, path: str, facts: ModelFacts, found: Violations) -> Aim:
    """Where an edit goes; notes what is wrong with it."""
    site = parse_site(wire.hook_point, f"{path}.hook_point", facts, found)
    if site is None:
        return Aim(None, NOWHERE, len(wire.neurons))
    info, layers = site
    if not info.writable:
        found.add(f"{path}.hook_point.site", f"{info.site} is read-only: {info.read_only_reason}")
    heads = parse_heads(wire.heads, wire.hook_point, path, info, found)
    _check_neurons(wire, f"{path}.neurons", info, found)
    points = tuple(HookPoint(info.site, layer) for layer in layers)
    target = NOWHERE if found.names(path) else Target(points, heads or (), tuple(wire.neurons))
    return Aim(info, target, len(wire.neurons))


def _check_neurons(wire: intervention_pb2.Target, path: str, info: SiteInfo, found: Violations) -> None:
    if wire.neurons and not info.width:
        found.add(path, f"the last axis of {info.site} is over positions: knock out edges instead")
    elif wire.neurons:
        are_indices(wire.neurons, path, info.width, "neuron", found)
