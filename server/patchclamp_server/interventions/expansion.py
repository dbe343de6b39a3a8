"""Expansion: operations that are short for many site-level ones, written out for a model.

Everything that writes to the residual stream is the embedding (of tokens, and of positions where the model learns
them), each attention's output and each MLP's. Freezing holds attention patterns, the divisors of all norms or MLP
outputs, wherever the model lets them be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from patchclamp_server.hookpoints import HookPoint, Site, SiteInfo
from patchclamp_server.interventions.ops import (
    Ablate,
    AblateEverywhere,
    Freeze,
    Knockout,
    Op,
    Replace,
    SiteOp,
    Target,
)

Sites = Mapping[Site, SiteInfo]

STREAM_WRITES = (Site.EMBED, Site.POS_EMBED, Site.ATTN_OUT, Site.MLP_OUT)
NORM_SCALES = tuple(site for site in Site if site.value.endswith("scale"))


def expanded(op: Op, sites: Sites) -> tuple[SiteOp, ...]:
    """The site-level operations that an operation stands for; itself where it is one."""
    match op:
        case AblateEverywhere(directions):
            return (Ablate(Target(writable(STREAM_WRITES, sites)), directions),)
        case Freeze(source):
            return (Replace(Target(writable(_frozen(op), sites)), source, arm=op.arm),)
        case _:
            return (op,)


def hook_points(op: SiteOp) -> tuple[HookPoint, ...]:
    """Where a site-level operation writes."""
    return (HookPoint(Site.ATTN_SCORES, op.layer),) if isinstance(op, Knockout) else op.target.hook_points


def writable(wanted: Iterable[Site], sites: Sites) -> tuple[HookPoint, ...]:
    """All hook points of some sites that the model has and lets be written."""
    found = (sites[site] for site in wanted if site in sites and sites[site].writable)
    return tuple(point for info in found for point in _points(info))


def _points(info: SiteInfo) -> Iterator[HookPoint]:
    return (HookPoint(info.site, layer) for layer in (info.layers if info.site.in_block else (None,)))


def _frozen(op: Freeze) -> Iterator[Site]:
    if op.attention:
        yield Site.ATTN_PATTERN
    if op.norms:
        yield from NORM_SCALES
    if op.mlps:
        yield Site.MLP_OUT
