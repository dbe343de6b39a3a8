"""Hook points: the named places in a forward pass, with the axes of what is found there.

The names are those of TransformerLens and the papers. `blocks.3.attn.z` is the site `attn.z` in layer 3; sites outside
the blocks (`embed`, `ln_final`, `logits`) have no layer. Shapes are those of one run: no batch axis, no padding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Site(StrEnum):
    """A kind of place in the forward pass; the value is its canonical text without `blocks.L.`."""

    EMBED = "embed"
    POS_EMBED = "pos_embed"
    RESID_PRE = "resid_pre"
    LN1_SCALE = "ln1.scale"
    LN1_NORMALIZED = "ln1.normalized"
    ATTN_IN = "attn.in"
    ATTN_Q_INPUT = "attn.q_input"
    ATTN_K_INPUT = "attn.k_input"
    ATTN_V_INPUT = "attn.v_input"
    ATTN_Q = "attn.q"
    ATTN_K = "attn.k"
    ATTN_V = "attn.v"
    ATTN_ROT_Q = "attn.rot_q"
    ATTN_ROT_K = "attn.rot_k"
    ATTN_SCORES = "attn.scores"
    ATTN_PATTERN = "attn.pattern"
    ATTN_GATE = "attn.gate"
    ATTN_Z = "attn.z"
    ATTN_RESULT = "attn.result"
    ATTN_OUT_RAW = "attn.out_raw"
    ATTN_OUT = "attn.out"
    RESID_MID = "resid_mid"
    LN1_POST_SCALE = "ln1_post.scale"
    LN2_SCALE = "ln2.scale"
    LN2_NORMALIZED = "ln2.normalized"
    LN2_POST_SCALE = "ln2_post.scale"
    ATTN_Q_NORM_SCALE = "attn.q_norm.scale"
    ATTN_K_NORM_SCALE = "attn.k_norm.scale"
    MLP_IN = "mlp.in"
    MLP_PRE = "mlp.pre"
    MLP_PRE_LINEAR = "mlp.pre_linear"
    MLP_POST = "mlp.post"
    MLP_OUT_RAW = "mlp.out_raw"
    MLP_OUT = "mlp.out"
    RESID_POST = "resid_post"
    FEATURES_PRE = "features.pre"
    FEATURES = "features"
    ROUTER_LOGITS = "router.logits"
    ROUTER_WEIGHTS = "router.weights"
    EXPERT_POST = "expert.post"
    LN_FINAL_SCALE = "ln_final.scale"
    LN_FINAL = "ln_final"
    LOGITS = "logits"

    @property
    def in_block(self) -> bool:
        """Whether each layer has its own."""
        return self not in _OUTSIDE_BLOCKS

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of one run's activation, outermost first."""
        return _AXES.get(self, ("pos", "d_model"))

    @property
    def head_axis(self) -> str | None:
        """`head` or `kv_head` where the site has one value per head, else None."""
        return next((axis for axis in self.axes if axis in ("head", "kv_head")), None)

    @property
    def position_axis(self) -> int:
        """Index of the axis that positions select: queries, for attention scores and patterns."""
        return 1 if "query" in self.axes else 0


_OUTSIDE_BLOCKS = frozenset(
    {Site.EMBED, Site.POS_EMBED, Site.LN_FINAL_SCALE, Site.LN_FINAL, Site.LOGITS},
)

_AXES: dict[Site, tuple[str, ...]] = {
    Site.LN1_SCALE: ("pos", "one"),
    Site.LN2_SCALE: ("pos", "one"),
    Site.LN1_POST_SCALE: ("pos", "one"),
    Site.LN2_POST_SCALE: ("pos", "one"),
    Site.LN_FINAL_SCALE: ("pos", "one"),
    Site.ATTN_Q_NORM_SCALE: ("pos", "head", "one"),
    Site.ATTN_K_NORM_SCALE: ("pos", "kv_head", "one"),
    Site.ATTN_IN: ("pos", "head", "d_model"),
    Site.ATTN_Q_INPUT: ("pos", "head", "d_model"),
    Site.ATTN_K_INPUT: ("pos", "kv_head", "d_model"),
    Site.ATTN_V_INPUT: ("pos", "kv_head", "d_model"),
    Site.ATTN_Q: ("pos", "head", "d_head"),
    Site.ATTN_K: ("pos", "kv_head", "d_head"),
    Site.ATTN_V: ("pos", "kv_head", "d_head"),
    Site.ATTN_ROT_Q: ("pos", "head", "d_head"),
    Site.ATTN_ROT_K: ("pos", "kv_head", "d_head"),
    Site.ATTN_SCORES: ("head", "query", "key"),
    Site.ATTN_PATTERN: ("head", "query", "key"),
    Site.ATTN_GATE: ("pos", "head", "d_head"),
    Site.ATTN_Z: ("pos", "head", "d_head"),
    Site.ATTN_RESULT: ("pos", "head", "d_model"),
    Site.MLP_PRE: ("pos", "d_mlp"),
    Site.MLP_PRE_LINEAR: ("pos", "d_mlp"),
    Site.MLP_POST: ("pos", "d_mlp"),
    Site.FEATURES_PRE: ("pos", "feature"),
    Site.FEATURES: ("pos", "feature"),
    Site.ROUTER_LOGITS: ("pos", "expert"),
    Site.ROUTER_WEIGHTS: ("pos", "expert"),
    Site.EXPERT_POST: ("pos", "expert", "d_mlp"),
    Site.LOGITS: ("pos", "d_vocab"),
}

_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, order=True)
class HookPoint:
    """One place in one model: a site and, inside the blocks, its layer."""

    site: Site
    layer: int | None = None

    def __str__(self) -> str:
        return self.site.value if self.layer is None else f"blocks.{self.layer}.{self.site.value}"

    @classmethod
    def parse(cls, text: str) -> HookPoint:
        """The hook point of a canonical name such as `blocks.3.resid_post`. Raises ValueError for any other text."""
        in_block = _BLOCK_NAME.fullmatch(text)
        site = Site(in_block[2] if in_block else text)
        if site.in_block != bool(in_block):
            raise ValueError(f"{text!r} is not a hook point")
        return cls(site, int(in_block[1]) if in_block else None)


@dataclass(frozen=True)
class SiteInfo:
    """A site that a model has.

    `layers` are ascending, empty outside the blocks. `axes` pairs each axis name with its size, 0 where it depends on
    the prompt. `read_only_reason` is empty when interventions may write to it.
    """

    site: Site
    layers: tuple[int, ...]
    axes: tuple[tuple[str, int], ...]
    read_only_reason: str = ""

    @property
    def writable(self) -> bool:
        return not self.read_only_reason

    @property
    def width(self) -> int:
        """Size of the last axis; 0 where it depends on the prompt."""
        return self.axes[-1][1]

    def axis(self, name: str) -> int:
        """Size of one axis. Raises KeyError where the site has no such axis."""
        return dict(self.axes)[name]


@dataclass(frozen=True)
class AbsentSite:
    """A site that a model lacks, in the given layers (empty: everywhere), and why."""

    site: Site
    layers: tuple[int, ...]
    reason: str
