"""Names of hook points.

`blocks.3.resid_post` is the site `resid_post` in layer 3; `blocks.*.resid_post`, or `resid_post` alone, is that site in
every layer that has it; `embed`, `ln_final` and `logits` lie outside the blocks. The names that TransformerLens gives
the same places (`blocks.3.hook_resid_post`, `blocks.3.attn.hook_z`, `ln_final.hook_out`) are understood too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from patchclamp.errors import invalid_field
from patchclamp.v1 import hook_point_pb2 as pb

SITES: dict[str, pb.Site] = {
    "embed": pb.SITE_EMBED,
    "pos_embed": pb.SITE_POS_EMBED,
    "resid_pre": pb.SITE_RESID_PRE,
    "ln1.scale": pb.SITE_LN1_SCALE,
    "ln1.normalized": pb.SITE_LN1_NORMALIZED,
    "attn.in": pb.SITE_ATTN_IN,
    "attn.q_input": pb.SITE_ATTN_Q_INPUT,
    "attn.k_input": pb.SITE_ATTN_K_INPUT,
    "attn.v_input": pb.SITE_ATTN_V_INPUT,
    "attn.q": pb.SITE_ATTN_Q,
    "attn.k": pb.SITE_ATTN_K,
    "attn.v": pb.SITE_ATTN_V,
    "attn.rot_q": pb.SITE_ATTN_ROT_Q,
    "attn.rot_k": pb.SITE_ATTN_ROT_K,
    "attn.scores": pb.SITE_ATTN_SCORES,
    "attn.pattern": pb.SITE_ATTN_PATTERN,
    "attn.gate": pb.SITE_ATTN_GATE,
    "attn.z": pb.SITE_ATTN_Z,
    "attn.result": pb.SITE_ATTN_RESULT,
    "attn.out_raw": pb.SITE_ATTN_OUT_RAW,
    "attn.out": pb.SITE_ATTN_OUT,
    "resid_mid": pb.SITE_RESID_MID,
    "ln1_post.scale": pb.SITE_LN1_POST_SCALE,
    "ln2.scale": pb.SITE_LN2_SCALE,
    "ln2.normalized": pb.SITE_LN2_NORMALIZED,
    "ln2_post.scale": pb.SITE_LN2_POST_SCALE,
    "attn.q_norm.scale": pb.SITE_ATTN_Q_NORM_SCALE,
    "attn.k_norm.scale": pb.SITE_ATTN_K_NORM_SCALE,
    "mlp.in": pb.SITE_MLP_IN,
    "mlp.pre": pb.SITE_MLP_PRE,
    "mlp.pre_linear": pb.SITE_MLP_PRE_LINEAR,
    "mlp.post": pb.SITE_MLP_POST,
    "mlp.out_raw": pb.SITE_MLP_OUT_RAW,
    "mlp.out": pb.SITE_MLP_OUT,
    "resid_post": pb.SITE_RESID_POST,
    "features.pre": pb.SITE_FEATURES_PRE,
    "features": pb.SITE_FEATURES,
    "router.logits": pb.SITE_ROUTER_LOGITS,
    "router.weights": pb.SITE_ROUTER_WEIGHTS,
    "expert.post": pb.SITE_EXPERT_POST,
    "ln_final.scale": pb.SITE_LN_FINAL_SCALE,
    "ln_final": pb.SITE_LN_FINAL,
    "logits": pb.SITE_LOGITS,
}
_NAMES: dict[int, str] = {site: name for name, site in SITES.items()}
OUTSIDE_BLOCKS = frozenset({"embed", "pos_embed", "ln_final.scale", "ln_final", "logits"})

# Sites that TransformerLens calls the same but for `hook_` before the last part.
_HOOKED = (
    "embed pos_embed resid_pre resid_mid resid_post ln1.scale ln1.normalized ln2.scale ln2.normalized ln1_post.scale "
    "ln2_post.scale ln_final.scale attn.q attn.k attn.v attn.q_norm.scale attn.k_norm.scale attn.rot_q attn.rot_k "
    "attn.pattern attn.z attn.result mlp.pre mlp.pre_linear mlp.post"
).split()
# All that TransformerLens calls what is the same there; tests/golden/README.md has how it was compared. Other names
# are not guessed: `mlp.hook_in` is not our `mlp.in`.
ALIASES: dict[str, str] = {re.sub(r"([^.]+)$", r"hook_\1", site): site for site in _HOOKED} | {
    "hook_attn_in": "attn.in",
    "hook_q_input": "attn.q_input",
    "hook_k_input": "attn.k_input",
    "hook_v_input": "attn.v_input",
    "hook_attn_out": "attn.out",
    "hook_mlp_in": "mlp.in",
    "hook_mlp_out": "mlp.out",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_out": "attn.out_raw",
    "mlp.hook_out": "mlp.out_raw",
    "mlp.gate.hook_out": "router.logits",
    "mlp.hook_expert_weights": "router.weights",
    "ln_final.hook_out": "ln_final",
}
# Names of TransformerLens that one may take for a site of ours, and why they are none.
_LOOKALIKES: dict[str, str] = {
    "ln_final.hook_normalized": "in TransformerLens that is before the final norm's weight and bias; 'ln_final' is "
    "after them, and 'ln_final.scale' what the norm divides by",
    "ln1.hook_out": "that is after the norm's weight and bias; 'ln1.normalized' is before them",
    "ln2.hook_out": "that is after the norm's weight and bias; 'ln2.normalized' is before them",
    "attn.hook_in": "that is attention's input after the norm; 'attn.in' is the stream before it, one copy per head",
    "mlp.hook_in": "that is the MLP's input after the norm; 'mlp.in' is the stream before it",
    "unembed.hook_out": "that is before the final soft cap; 'logits' is after it",
}

_IN_BLOCK = re.compile(r"blocks\.([^.]*)\.(.+)", re.DOTALL)
_LAYERS = 2**32


@dataclass(frozen=True, order=True)
class HookName:
    """A site, in one layer or (`layer` None) in every layer that has it; sites outside the blocks have no layer."""

    site: str
    layer: int | None = None

    def __str__(self) -> str:
        if self.site in OUTSIDE_BLOCKS:
            return self.site
        return f"blocks.{'*' if self.layer is None else self.layer}.{self.site}"

    def to_message(self) -> pb.HookPoint:
        """The hook point as it travels."""
        return pb.HookPoint(site=SITES[self.site], layer=self.layer)


def name_of(message: pb.HookPoint) -> str:
    """The canonical name of a hook point that a server told; `site 99` for a site that this SDK does not know."""
    site = _NAMES.get(message.site)
    if site is None:
        return f"site {message.site}"
    return str(HookName(site, message.layer if message.HasField("layer") else None))


def parse(text: str, field: str = "hook") -> HookName:
    """The hook point of a name. `field` is where the caller got it from, for the message of InvalidArgument."""
    in_block = _IN_BLOCK.fullmatch(text)
    written = in_block[2] if in_block else text
    site = ALIASES.get(written, written)
    if written in _LOOKALIKES:
        raise invalid_field(field, f"{text!r} is no hook point here: {_LOOKALIKES[written]}")
    if site not in SITES:
        raise invalid_field(field, f"no hook point is called {text!r}{_advice(site, in_block[1] if in_block else '*')}")
    if not in_block:
        return HookName(site)
    if site in OUTSIDE_BLOCKS:
        raise invalid_field(field, f"{site!r} lies outside the blocks: write {site!r}, not {text!r}")
    layer = in_block[1]
    if layer == "*":
        return HookName(site)
    if not (layer.isascii() and layer.isdigit() and int(layer) < _LAYERS):
        raise invalid_field(
            field, f"{layer!r} is no layer: write 'blocks.0.{site}', or 'blocks.*.{site}' for every layer"
        )
    return HookName(site, int(layer))


def _advice(site: str, layer: str) -> str:
    near = get_close_matches(site.replace("hook_", ""), SITES, n=3, cutoff=0.6)
    if not near:
        return "; client.describe().sites lists those that the model has"
    names = [name if name in OUTSIDE_BLOCKS else f"blocks.{layer}.{name}" for name in near]
    return f"; did you mean {' or '.join(map(repr, names))}?"
