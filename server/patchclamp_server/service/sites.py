"""Hook points of a request, checked against the sites that the model has."""

from __future__ import annotations

from typing import cast

from patchclamp.v1 import hook_point_pb2
from patchclamp_server.adapters.facts import ModelFacts
from patchclamp_server.hookpoints import Site, SiteInfo
from patchclamp_server.service.violations import Violations

SITE_FROM_WIRE: dict[int, Site] = {
    number: Site[name.removeprefix("SITE_")] for name, number in hook_point_pb2.Site.items() if number
}
SITE_TO_WIRE: dict[Site, hook_point_pb2.Site] = {
    site: cast("hook_point_pb2.Site", number) for number, site in SITE_FROM_WIRE.items()
}


def parse_site(
    wire: hook_point_pb2.HookPoint, path: str, facts: ModelFacts, found: Violations
) -> tuple[SiteInfo, tuple[int | None, ...]] | None:
    """The site and the layers that are meant: the one named, or every one that has it; None when invalid."""
    site = SITE_FROM_WIRE.get(wire.site)
    if site is None:
        unknown = "a site is needed" if not wire.site else f"{wire.site} is not a site that this server knows"
        found.add(f"{path}.site", f"{unknown}; this model has {_available(facts)}")
        return None
    info = facts.site_info.get(site)
    if info is None:
        found.add(f"{path}.site", _absent(site, facts), reason="SITE_ABSENT", available=_available(facts))
        return None
    layers = _layers(wire, f"{path}.layer", info, facts, found)
    return None if layers is None else (info, layers)


def _layers(
    wire: hook_point_pb2.HookPoint, path: str, info: SiteInfo, facts: ModelFacts, found: Violations
) -> tuple[int | None, ...] | None:
    if not wire.HasField("layer"):
        return info.layers if info.site.in_block else (None,)
    if not info.site.in_block:
        found.add(path, f"{info.site} is outside the blocks: leave the layer out")
    elif wire.layer >= facts.dims.n_layers:
        found.add(path, f"{wire.layer} is not a layer of this model: 0 .. {facts.dims.n_layers - 1}")
    elif wire.layer not in info.layers:
        found.add(path, _absent_in_layer(info, wire.layer, facts), reason="SITE_ABSENT", available=_available(facts))
    else:
        return (wire.layer,)
    return None


def _absent(site: Site, facts: ModelFacts) -> str:
    reason = next((absent.reason for absent in facts.absent if absent.site == site), "")
    return f"this model has no {site}{f' ({reason})' if reason else ''}; it has {_available(facts)}"


def _absent_in_layer(info: SiteInfo, layer: int, facts: ModelFacts) -> str:
    lacking = (absent for absent in facts.absent if absent.site == info.site and layer in absent.layers)
    reason = next((f" ({absent.reason})" for absent in lacking), "")
    return f"layer {layer} has no {info.site}{reason}; layers {', '.join(map(str, info.layers))} have it"


def _available(facts: ModelFacts) -> str:
    return ", ".join(info.site.value for info in facts.sites)
