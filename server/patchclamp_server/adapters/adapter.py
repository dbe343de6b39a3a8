"""The adapter: every hook point of one model, as taps on its unmodified modules, and the reason for each it lacks.

It is built from three things: where the parts are (`layout`), how they work together (`algebra`, solved from one
recorded forward) and the model's configuration. Nothing here runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from patchclamp_server.adapters import taps
from patchclamp_server.adapters.algebra import Algebra, BlockAlgebra
from patchclamp_server.adapters.facts import Dims
from patchclamp_server.adapters.heads import count_heads, head_views
from patchclamp_server.adapters.layout import Block, Layout, widths
from patchclamp_server.adapters.norms import Norm, fit
from patchclamp_server.adapters.probes import Probes, Stage
from patchclamp_server.adapters.recording import Recording
from patchclamp_server.adapters.taps import Tap
from patchclamp_server.hookpoints import AbsentSite, HookPoint, Site, SiteInfo

Found = Tap | str
"""A tap, or the reason why there is none."""


@dataclass(frozen=True, eq=False)
class Unembed:
    """From a row of the residual stream to logits: final norm, unembedding, multiplier and softcap."""

    norm: nn.Module | None
    head: nn.Module
    factor: float
    softcap: float

    def logits(self, stream: torch.Tensor) -> torch.Tensor:
        """Logits of rows [.., d_model] as [.., d_vocab]. Calls `forward` itself, so that no hook sees it."""
        rows = stream if self.norm is None else self.norm.forward(stream)
        logits: torch.Tensor = self.head.forward(rows) * self.factor
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def row(self, token_id: int) -> torch.Tensor:
        """The unembedding row of a token, [d_model]: the direction that raises its logit."""
        weight = self.head.weight
        assert isinstance(weight, torch.Tensor)
        return weight[token_id]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Hook points of one model.

    `read_taps` and `write_taps` differ only where a site is read from one place and written at another (`resid_mid`).
    """

    model: nn.Module
    layout: Layout
    dims: Dims
    parallel: bool
    probes: Probes
    unembed: Unembed
    read_taps: dict[HookPoint, Tap]
    write_taps: dict[HookPoint, Tap]
    reasons: dict[HookPoint, str]
    norm_axes: dict[HookPoint, tuple[tuple[str, int], ...]]

    @cached_property
    def sites(self) -> tuple[SiteInfo, ...]:
        """The sites that the model has, in the order of Site."""
        return tuple(
            SiteInfo(site, tuple(layer for layer in layers if layer is not None), self._axes(site), self._why_not(site))
            for site in Site
            if (layers := self._layers(site)) or site is Site.LOGITS
        )

    @cached_property
    def site_info(self) -> dict[Site, SiteInfo]:
        """The same by site."""
        return {info.site: info for info in self.sites}

    def own_cache(self) -> Any:
        """An empty cache of the model's own kind, for one run."""
        return DynamicCache(config=self.model.config)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        dims = self.dims
        return 2 * dims.n_layers * dims.n_kv_heads * dims.d_head * self.probes.dtype.itemsize

    @cached_property
    def absent(self) -> tuple[AbsentSite, ...]:
        """The sites that it lacks, per reason."""
        found: dict[tuple[Site, str], list[int]] = {}
        for point, reason in self.reasons.items():
            found.setdefault((point.site, reason), []).extend([] if point.layer is None else [point.layer])
        everywhere = self.dims.n_layers
        return tuple(
            AbsentSite(site, () if len(layers) == everywhere else tuple(layers), reason)
            for (site, reason), layers in found.items()
        )

    def _layers(self, site: Site) -> list[int | None]:
        return [point.layer for point in self.read_taps if point.site is site]

    def _why_not(self, site: Site) -> str:
        if any(point.site is site for point in self.write_taps):
            return ""
        return _READ_ONLY.get(site, "several sites share this tensor, so a write would change them too")

    def _axes(self, site: Site) -> tuple[tuple[str, int], ...]:
        special = next((axes for point, axes in self.norm_axes.items() if point.site is site), None)
        if special is not None:
            return special
        d = self.dims
        sizes = {
            "one": 1, "d_model": d.d_model, "d_head": d.d_head, "d_mlp": self._neurons(site), "d_vocab": d.d_vocab,
            "head": d.n_heads, "kv_head": d.n_kv_heads, "expert": d.n_experts,
        }  # fmt: skip
        return tuple((axis, sizes.get(axis, 0)) for axis in site.axes)

    def _neurons(self, site: Site) -> int:
        """Neurons at a site. Some mixtures of experts have plain MLPs in their first layers, of another width."""
        layers = [layer for layer in self._layers(site) if layer is not None]
        return mlp_width(self.layout.blocks[layers[0]]) if layers else 0


_READ_ONLY = {
    Site.ATTN_IN: "the copies per head are one tensor in the forward",
    Site.ATTN_Q_INPUT: "the copies per head are one tensor in the forward",
    Site.ATTN_K_INPUT: "the copies per head are one tensor in the forward",
    Site.ATTN_V_INPUT: "the copies per head are one tensor in the forward",
    Site.ROUTER_LOGITS: "the routing is computed from them inside the same module; write router.weights",
    Site.LOGITS: "they are the result; write ln_final",
}


def build_adapter(layout: Layout, algebra: Algebra, recording: Recording, dims: Dims, probes: Probes) -> Adapter:
    """All taps of a model. `probes` has proved which of its attention modules it reaches."""
    found: dict[HookPoint, Found] = {}
    writes: dict[HookPoint, Tap] = {}
    norm_axes: dict[HookPoint, tuple[tuple[str, int], ...]] = {}
    found.update(_outside(layout, algebra, recording))
    for layer, (block, solved) in enumerate(zip(layout.blocks, algebra.blocks, strict=True)):
        parts = _BlockTaps(layer, block, solved, recording, dims, probes)
        found.update(parts.all())
        writes.update(parts.other_writes())
        norm_axes.update(parts.head_norm_axes())
    read_taps = {point: tap for point, tap in found.items() if isinstance(tap, Tap)}
    write_taps = {point: tap for point, tap in read_taps.items() if tap.write is not None} | writes
    return Adapter(
        model=layout.model,
        layout=layout,
        dims=dims,
        parallel=all(block.parallel for block in algebra.blocks),
        probes=probes,
        unembed=Unembed(algebra.ln_final, layout.unembed, algebra.logit_factor, algebra.logit_softcap),
        read_taps=read_taps,
        write_taps=write_taps,
        reasons={point: reason for point, reason in found.items() if isinstance(reason, str)},
        norm_axes=norm_axes,
    )


def _outside(layout: Layout, algebra: Algebra, recording: Recording) -> Iterator[tuple[HookPoint, Found]]:
    """Sites outside the blocks."""
    embed = HookPoint(Site.EMBED)
    pos_embed = HookPoint(Site.POS_EMBED)
    yield embed, taps.after(embed, algebra.embed.module, factor=algebra.embed.factor)
    yield (
        pos_embed,
        taps.broadcast_after(pos_embed, layout.pos_embed)
        if layout.pos_embed is not None
        else "this model has no learned position embeddings",
    )
    ln_final, scale = HookPoint(Site.LN_FINAL), HookPoint(Site.LN_FINAL_SCALE)
    norm = fit(recording.call(algebra.ln_final)) if algebra.ln_final is not None else None
    yield scale, taps.norm_scale(scale, norm) if norm else "this model has no final norm of a known form"
    yield (
        ln_final,
        taps.after(ln_final, algebra.ln_final) if algebra.ln_final is not None else "this model has no final norm",
    )


class _BlockTaps:
    """The taps of one block."""

    def __init__(
        self,
        layer: int,
        block: Block,
        solved: BlockAlgebra,
        recording: Recording,
        dims: Dims,
        probes: Probes,
    ) -> None:
        self.layer, self.block, self.solved = layer, block, solved
        self.recording, self.dims, self.probes = recording, dims, probes
        self.counts = count_heads(block.attention, dims.n_heads)

    def point(self, site: Site) -> HookPoint:
        return HookPoint(site, self.layer)

    def all(self) -> Iterator[tuple[HookPoint, Found]]:
        for part in (self.stream(), self.norms(), self.branches(), self.attention(), self.mlp(), self.experts()):
            for site, found in part:
                yield self.point(site), found
        for site in (Site.FEATURES_PRE, Site.FEATURES):
            yield self.point(site), "no transcoders are loaded"

    def other_writes(self) -> dict[HookPoint, Tap]:
        """Sites that are written elsewhere than read."""
        if self.solved.parallel:
            return {}
        point = self.point(Site.RESID_MID)
        return {point: taps.resid_mid_write(point, self.solved.attention, self.block.module)}

    def stream(self) -> Iterator[tuple[Site, Found]]:
        solved, block = self.solved, self.block
        yield Site.RESID_PRE, taps.before(self.point(Site.RESID_PRE), block.module)
        yield (
            Site.RESID_MID,
            "attention and MLP run in parallel in this block"
            if solved.mid_reader is None
            # Before an edit of mlp.in, which is a branch of the stream.
            else taps.before(self.point(Site.RESID_MID), solved.mid_reader, writable=False, rank=-1),
        )
        yield Site.RESID_POST, taps.after(self.point(Site.RESID_POST), block.module)
        for site, raw_site, write in (
            (Site.ATTN_OUT, Site.ATTN_OUT_RAW, solved.attention),
            (Site.MLP_OUT, Site.MLP_OUT_RAW, solved.mlp),
        ):
            yield site, taps.after(self.point(site), write.module, factor=write.factor, rank=3)
            yield raw_site, taps.after(self.point(raw_site), write.raw, rank=2)

    def norms(self) -> Iterator[tuple[Site, Found]]:
        solved = self.solved
        none_before = "this block has no norm before its {}"
        for scale, normalized, module, branch in (
            (Site.LN1_SCALE, Site.LN1_NORMALIZED, solved.ln1, "attention"),
            (Site.LN2_SCALE, Site.LN2_NORMALIZED, solved.ln2, "MLP"),
        ):
            norm = self._norm(module)
            reason = none_before.format(branch) if module is None else "this norm is of no known form"
            if branch == "MLP" and module is None and solved.parallel and solved.ln1 is not None:
                reason = "attention and MLP share one norm (ln1)"
            yield scale, taps.norm_scale(self.point(scale), norm) if norm else reason
            yield normalized, taps.norm_normalized(self.point(normalized), norm) if norm else reason
        for site, write, branch in (
            (Site.LN1_POST_SCALE, solved.attention, "attention's output"),
            (Site.LN2_POST_SCALE, solved.mlp, "the MLP's output"),
        ):
            norm = self._norm(write.post_norm)
            yield site, taps.norm_scale(self.point(site), norm) if norm else f"this block has no norm on {branch}"

    def branches(self) -> Iterator[tuple[Site, Found]]:
        """The stream as attention and MLP receive it."""
        solved, block = self.solved, self.block
        into_attention = taps.before(self.point(Site.ATTN_IN), solved.ln1 or block.attention.module)
        kv_heads = self.counts.n_kv_heads if self.counts else 0
        for site, heads in (
            (Site.ATTN_IN, self.dims.n_heads),
            (Site.ATTN_Q_INPUT, self.dims.n_heads),
            (Site.ATTN_K_INPUT, kv_heads),
            (Site.ATTN_V_INPUT, kv_heads),
        ):
            yield site, taps.head_inputs(self.point(site), into_attention, heads) if heads else _UNKNOWN_HEADS
        shared = solved.parallel and solved.ln2 is None
        reader = solved.ln2 or solved.mid_reader or solved.ln1 or block.mlp.module
        yield Site.MLP_IN, taps.before(self.point(Site.MLP_IN), reader, writable=not shared)

    def attention(self) -> Iterator[tuple[Site, Found]]:
        parts, counts = self.block.attention, self.counts
        views = head_views(parts, counts) if counts else None
        for index, site in enumerate((Site.ATTN_Q, Site.ATTN_K, Site.ATTN_V)):
            yield site, taps.heads(self.point(site), views[index]) if views else _UNKNOWN_HEADS
        for site, make in ((Site.ATTN_Z, taps.attention_z), (Site.ATTN_RESULT, taps.attention_result)):
            yield site, make(self.point(site), parts.output, counts.n_heads) if counts else _UNKNOWN_HEADS
        if any(parameter.is_meta for parameter in parts.output.parameters()):
            yield Site.ATTN_RESULT, "W_O is offloaded from the device"
        yield Site.ATTN_GATE, "this model's attention has no gate"
        yield from self.scores()
        for site, module in ((Site.ATTN_Q_NORM_SCALE, parts.query_norm), (Site.ATTN_K_NORM_SCALE, parts.key_norm)):
            norm = self._norm(module)
            found = taps.norm_scale(self.point(site), norm, heads_first=self._heads_first(module)) if norm else None
            yield site, found or "this model does not norm queries and keys"

    def scores(self) -> Iterator[tuple[Site, Found]]:
        module = self.block.attention.module
        for site, stage in (
            (Site.ATTN_ROT_Q, Stage.ROT_Q),
            (Site.ATTN_ROT_K, Stage.ROT_K),
            (Site.ATTN_SCORES, Stage.SCORES),
            (Site.ATTN_PATTERN, Stage.PATTERN),
        ):
            rotated = stage in (Stage.ROT_Q, Stage.ROT_K)
            if rotated and not self._rotary():
                yield site, "this model has no rotary embedding: attention uses attn.q and attn.k"
            elif rotated and self.probes.catches_softmax:
                yield site, "this model's attention is outside the attention interface of transformers"
            else:
                yield site, taps.probe(self.point(site), module, stage)

    def mlp(self) -> Iterator[tuple[Site, Found]]:
        parts = self.block.mlp
        if parts.experts is not None:
            for site in (Site.MLP_PRE, Site.MLP_PRE_LINEAR, Site.MLP_POST):
                yield site, "this block is a mixture of experts: see expert.post"
            return
        unknown = "the MLP's projections are under no known name"
        pre, linear = self.point(Site.MLP_PRE), self.point(Site.MLP_PRE_LINEAR)
        if parts.fused is not None:
            yield Site.MLP_PRE, taps.half(pre, parts.fused, 0)
            yield Site.MLP_PRE_LINEAR, taps.half(linear, parts.fused, 1)
        else:
            first = parts.gate or parts.up
            yield Site.MLP_PRE, taps.after(pre, first) if first else unknown
            gated = parts.gate is not None and parts.up is not None
            yield Site.MLP_PRE_LINEAR, taps.after(linear, parts.up) if gated and parts.up else "the MLP is not gated"
        yield Site.MLP_POST, taps.before(self.point(Site.MLP_POST), parts.down) if parts.down else unknown

    def experts(self) -> Iterator[tuple[Site, Found]]:
        parts = self.block.mlp
        if parts.experts is None or parts.router is None:
            for site in (Site.ROUTER_LOGITS, Site.ROUTER_WEIGHTS, Site.EXPERT_POST):
                yield site, "this block is not a mixture of experts"
            return
        logits, weights, neurons = map(self.point, (Site.ROUTER_LOGITS, Site.ROUTER_WEIGHTS, Site.EXPERT_POST))
        call = self.recording.call(parts.router)
        # Logits, the chosen experts' weights, and which experts those are.
        known, unknown = call is not None and call.parts == 3, "this router gives out other values than the known ones"
        yield Site.ROUTER_LOGITS, taps.router_logits(logits, parts.router) if known else unknown
        yield Site.ROUTER_WEIGHTS, taps.router_weights(weights, parts.router) if known else unknown
        plain = _plain_experts(parts.experts)
        yield (
            Site.EXPERT_POST,
            taps.expert_neurons(neurons, parts.experts)
            if plain
            else "the experts' weights are laid out in another way",
        )

    def head_norm_axes(self) -> dict[HookPoint, tuple[tuple[str, int], ...]]:
        """Axes of query and key norms: one scale per head, or one for all heads together."""
        parts, axes = self.block.attention, {}
        for site, module, heads in (
            (Site.ATTN_Q_NORM_SCALE, parts.query_norm, self.dims.n_heads),
            (Site.ATTN_K_NORM_SCALE, parts.key_norm, self.dims.n_kv_heads),
        ):
            call = self.recording.call(module) if module is not None else None
            if call is not None and call.given is not None:
                per_head = ((site.head_axis or "head", heads),) if call.given.ndim == 4 else ()
                axes[self.point(site)] = (("pos", 0), *per_head, ("one", 1))
        return axes

    def _norm(self, module: nn.Module | None) -> Norm | None:
        return fit(self.recording.call(module)) if module is not None else None

    def _heads_first(self, module: nn.Module | None) -> bool:
        call = self.recording.call(module) if module is not None else None
        whole = self.recording.call(self.block.module)
        if call is None or call.given is None or whole is None or whole.given is None:
            return False
        return call.given.ndim == 4 and call.given.shape[2] == whole.given.shape[1]

    def _rotary(self) -> bool:
        return self.probes.rotates


_UNKNOWN_HEADS = "the attention's projections do not divide into heads in a known way"


def _plain_experts(experts: nn.Module) -> bool:
    """Whether the experts are gated, with gate and up side by side and no bias: what the experts probe computes."""
    flags = [getattr(experts, name, None) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")]
    return flags == [True, False, False, True] and not getattr(experts, "has_post_expert_norm", False)


def mlp_width(block: Block) -> int:
    """Neurons of a block's MLP, or of one expert; 0 where neither is found."""
    if block.mlp.experts is not None:
        weight = getattr(block.mlp.experts, "down_proj", None)
        return int(weight.shape[-1]) if weight is not None else 0
    return widths(block.mlp.down)[0] if block.mlp.down is not None else 0
