"""What a model says it has and lacks: every site of every layer once, with a reason for what is absent or read-only."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.models import adapter_of, every_family, resident
from families import Family, family_named
from patchclamp_server.hookpoints import HookPoint, Site


@every_family
def test_every_site_of_every_layer_is_there_or_absent_and_never_both(family: Family) -> None:
    facts = resident(family).facts
    everywhere = tuple(range(facts.dims.n_layers))
    stated = [(info.site, info.layers) for info in facts.sites] + [(lack.site, lack.layers) for lack in facts.absent]
    told = Counter(
        HookPoint(site, layer)
        for site, layers in stated
        for layer in ((layers or everywhere) if site.in_block else (None,))
    )
    wanted = {HookPoint(site, layer) for site in Site for layer in (everywhere if site.in_block else (None,))}
    assert told.keys() == wanted
    assert set(told.values()) == {1}


@every_family
def test_what_is_told_is_what_can_be_done(family: Family) -> None:
    model = resident(family)
    reads = {HookPoint(info.site, layer) for info in model.facts.sites for layer in info.layers or (None,)}
    writes = {point for point in reads if model.facts.site_info[point.site].writable}
    assert reads == adapter_of(model).read_taps.keys() | {HookPoint(Site.LOGITS)}
    assert writes == adapter_of(model).write_taps.keys()


@every_family
def test_every_absent_or_read_only_site_has_a_reason(family: Family) -> None:
    facts = resident(family).facts
    assert all(absent.reason for absent in facts.absent)
    assert {info.site for info in facts.sites if not info.writable} >= {Site.LOGITS, Site.ATTN_IN}


@every_family
def test_sites_are_told_in_order_with_ascending_layers(family: Family) -> None:
    facts = resident(family).facts
    assert [info.site for info in facts.sites] == [site for site in Site if site in facts.site_info]
    assert all(list(info.layers) == sorted(info.layers) for info in facts.sites)


PARALLEL = "attention and MLP run in parallel in this block"
NO_NORM = "this block has no norm before its {}"
REASONS: dict[str, dict[Site, str]] = {
    "gpt_neox": {Site.RESID_MID: PARALLEL},
    "gptj": {
        Site.RESID_MID: PARALLEL,
        Site.LN2_SCALE: "attention and MLP share one norm (ln1)",
        Site.ATTN_ROT_Q: "this model's attention is outside the attention interface of transformers",
    },
    "phi": {Site.RESID_MID: PARALLEL, Site.LN2_NORMALIZED: "attention and MLP share one norm (ln1)"},
    "falcon": {Site.RESID_MID: PARALLEL},
    "falcon_grouped": {Site.RESID_MID: PARALLEL},
    "gpt2": {
        Site.ATTN_ROT_Q: "this model has no rotary embedding: attention uses attn.q and attn.k",
        Site.MLP_PRE_LINEAR: "the MLP is not gated",
        Site.ATTN_Q_NORM_SCALE: "this model does not norm queries and keys",
        Site.ROUTER_WEIGHTS: "this block is not a mixture of experts",
        Site.FEATURES: "no transcoders are loaded",
        Site.ATTN_GATE: "this model's attention has no gate",
    },
    "bloom": {
        Site.ATTN_ROT_K: "this model has no rotary embedding: attention uses attn.q and attn.k",
        Site.POS_EMBED: "this model has no learned position embeddings",
    },
    "llama": {
        Site.POS_EMBED: "this model has no learned position embeddings",
        Site.LN1_POST_SCALE: "this block has no norm on attention's output",
        Site.LN2_POST_SCALE: "this block has no norm on the MLP's output",
    },
    "olmo2": {Site.LN1_SCALE: NO_NORM.format("attention"), Site.LN2_SCALE: NO_NORM.format("MLP")},
    "mixtral": dict.fromkeys(
        (Site.MLP_PRE, Site.MLP_PRE_LINEAR, Site.MLP_POST), "this block is a mixture of experts: see expert.post"
    ),
    "qwen3_moe": {Site.MLP_POST: "this block is a mixture of experts: see expert.post"},
}


@pytest.mark.parametrize(("name", "site"), [(name, site) for name, sites in REASONS.items() for site in sites], ids=str)
def test_an_absent_site_says_why(name: str, site: Site) -> None:
    told = [absent for absent in resident(family_named(name)).facts.absent if absent.site is site]
    assert [(absent.layers, absent.reason) for absent in told] == [((), REASONS[name][site])]


@every_family
def test_a_parallel_model_is_told_to_be_one(family: Family) -> None:
    parallel = {"gpt_neox", "phi", "gptj", "falcon", "falcon_grouped"}
    assert resident(family).facts.parallel == (family.name in parallel)


@every_family
def test_the_sizes_are_the_configured_ones(family: Family) -> None:
    dims, settings = resident(family).facts.dims, family.settings
    kv_heads = {"falcon": 1, "falcon_grouped": 2}.get(family.name, settings.get("num_key_value_heads", 4))
    d_mlp = settings.get("moe_intermediate_size", 128 if family.name == "bloom" else 48)
    experts = settings.get("num_experts", settings.get("num_local_experts", 0))
    assert (dims.n_layers, dims.n_heads, dims.n_kv_heads, dims.d_model) == (2, 4, kv_heads, 32)
    assert (dims.d_head, dims.d_mlp, dims.d_vocab) == (settings.get("head_dim", 8), d_mlp, 56)
    assert (dims.n_experts, dims.n_experts_per_token) == (experts, settings.get("num_experts_per_tok", 0))
