"""The order of the data flow: which site of a forward comes before which.

Sites on one level are computed in an order that depends on the architecture; between them nothing is promised.
"""

from __future__ import annotations

from patchclamp_server.hookpoints import HookPoint, Site

_BEFORE_BLOCKS: tuple[set[Site], ...] = ({Site.EMBED}, {Site.POS_EMBED})

_IN_BLOCK: tuple[set[Site], ...] = (
    {Site.RESID_PRE},
    {Site.ATTN_IN, Site.ATTN_Q_INPUT, Site.ATTN_K_INPUT, Site.ATTN_V_INPUT},
    {Site.LN1_SCALE},
    {Site.LN1_NORMALIZED},
    {Site.ATTN_Q, Site.ATTN_K, Site.ATTN_V, Site.ATTN_GATE, Site.ATTN_Q_NORM_SCALE, Site.ATTN_K_NORM_SCALE},
    {Site.ATTN_ROT_Q},
    {Site.ATTN_ROT_K},
    {Site.ATTN_SCORES},
    {Site.ATTN_PATTERN},
    {Site.ATTN_Z},
    {Site.ATTN_RESULT},
    {Site.ATTN_OUT_RAW},
    {Site.LN1_POST_SCALE},
    {Site.ATTN_OUT},
    {Site.RESID_MID},
    {Site.MLP_IN},
    {Site.LN2_SCALE},
    {Site.LN2_NORMALIZED},
    {Site.MLP_PRE, Site.ROUTER_LOGITS},
    {Site.MLP_PRE_LINEAR, Site.ROUTER_WEIGHTS},
    {Site.MLP_POST, Site.EXPERT_POST},
    {Site.MLP_OUT_RAW},
    {Site.LN2_POST_SCALE},
    {Site.MLP_OUT},
    {Site.RESID_POST},
)

_AFTER_BLOCKS: tuple[set[Site], ...] = ({Site.LN_FINAL_SCALE}, {Site.LN_FINAL}, {Site.LOGITS})

_LEVEL = {
    site: (part, level)
    for part, levels in enumerate((_BEFORE_BLOCKS, _IN_BLOCK, _AFTER_BLOCKS))
    for level, sites in enumerate(levels)
    for site in sites
}


def known_before(read: HookPoint, edit: HookPoint) -> bool:
    """Whether the value at `read` is known when `edit` is reached, in every architecture."""
    return read == edit or _place(read) < _place(edit)


def _place(point: HookPoint) -> tuple[int, int, int]:
    part, level = _LEVEL.get(point.site, (1, len(_IN_BLOCK)))
    return part, -1 if point.layer is None else point.layer, level
