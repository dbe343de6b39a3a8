"""Every site equals TransformerLens's array wherever there is a right one; the rest is proved by algebra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.models import ROUNDING, block_values, close, every_family, look, resident
from families import FAMILIES, Family, family_named, prompt_ids
from patchclamp_server.hookpoints import HookPoint, Site

GOLDEN = Path(__file__).parents[1] / "golden"
MASKED = -1e30  # TransformerLens masks scores with float32's lowest number
# Sites that no golden array holds in any family; algebra below holds each of them.
UNCOMPARED = {Site.EXPERT_POST}


def golden(family: Family) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{family.name}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@every_family
def test_every_golden_array_is_reproduced(family: Family, device: str) -> None:
    ids = prompt_ids(family)[0]
    seen = look(resident(family, device), [ids])
    ours = {str(point): value for point, value in seen.row(0, len(ids)).items()}
    ours |= {"logits": seen.logits[0], "hf_logits": seen.logits[0]}
    for name, expected in golden(family).items():
        if name.endswith("attn.scores"):
            expected = expected.masked_fill(expected < MASKED, float("-inf"))
        close(ours[name], expected, ROUNDING[device], name)


def test_only_the_grouped_falcon_has_no_arrays_but_the_logits() -> None:
    assert [family.name for family in FAMILIES if golden(family).keys() == {"hf_logits"}] == ["falcon_grouped"]


def test_every_site_is_compared_in_some_family() -> None:
    compared = {HookPoint.parse(name).site for family in FAMILIES for name in golden(family) if name != "hf_logits"}
    ours = {info.site for family in FAMILIES for info in resident(family).facts.sites}
    assert ours - compared == UNCOMPARED


def repeated(per_kv_head: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Keys or values [pos, kv_head, d_head] for every query head."""
    return per_kv_head.repeat_interleave(n_heads // per_kv_head.shape[1], dim=1)


@every_family
def test_the_pattern_is_the_softmax_of_the_scores(family: Family, device: str) -> None:
    for block in block_values(resident(family, device), prompt_ids(family)[0]):
        close(block[Site.ATTN_SCORES].softmax(-1), block[Site.ATTN_PATTERN], 1e-6)  # values below one


@every_family
def test_z_is_the_pattern_over_the_values(family: Family, device: str) -> None:
    for block in block_values(resident(family, device), prompt_ids(family)[0]):
        z = block[Site.ATTN_Z]
        values = repeated(block[Site.ATTN_V], z.shape[1])
        close(torch.einsum("hqk,khd->qhd", block[Site.ATTN_PATTERN], values), z, ROUNDING[device])


@every_family
def test_the_results_of_all_heads_and_the_bias_are_the_raw_output(family: Family, device: str) -> None:
    model = resident(family, device)
    for layer, block in enumerate(block_values(model, prompt_ids(family)[0])):
        bias = getattr(model.runner.adapter.layout.blocks[layer].attention.output, "bias", None)
        whole = block[Site.ATTN_RESULT].sum(1) + (0.0 if bias is None else bias)
        close(whole, block[Site.ATTN_OUT_RAW], ROUNDING[device])


@every_family
def test_every_branch_of_attention_reads_the_stream(family: Family, device: str) -> None:
    dims = resident(family, device).facts.dims
    heads = {
        Site.ATTN_IN: dims.n_heads,
        Site.ATTN_Q_INPUT: dims.n_heads,
        Site.ATTN_K_INPUT: dims.n_kv_heads,
        Site.ATTN_V_INPUT: dims.n_kv_heads,
    }
    for block in block_values(resident(family, device), prompt_ids(family)[0]):
        for site, count in heads.items():
            assert torch.equal(block[site], block[Site.RESID_PRE][:, None].expand(-1, count, -1)), site


def rotated(heads: torch.Tensor, width: int, *, interleaved: bool) -> torch.Tensor:
    """Rotary embedding of the first `width` entries of [pos, head, d_head], by its definition: pair i turns by
    pos / 10000^(2i / width)."""
    half = width // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(heads.shape[0], dtype=torch.float64)[:, None] * rates  # [pos, pair]
    first, second = (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(0, half), slice(half, width))
    turned = heads.double().cpu().clone()
    x, y = turned[..., first].clone(), turned[..., second].clone()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turned[..., first], turned[..., second] = x * cos - y * sin, x * sin + y * cos
    return turned


def scores_of(queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    """q · k / sqrt(d_head) + bias, later keys masked. [head, query, key]"""
    keys = repeated(keys, queries.shape[1])
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / queries.shape[-1] ** 0.5 + bias
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))


@pytest.mark.parametrize(
    ("name", "width", "interleaved"), [("gptj", 4, True), ("falcon", 8, False), ("falcon_grouped", 8, False)]
)
def test_scores_outside_the_interface_are_those_of_rotated_queries_and_keys(
    name: str, width: int, interleaved: bool, device: str
) -> None:
    family = family_named(name)
    for block in block_values(resident(family, device), prompt_ids(family)[0]):
        queries, keys = (rotated(block[site], width, interleaved=interleaved) for site in (Site.ATTN_Q, Site.ATTN_K))
        close(scores_of(queries, keys), block[Site.ATTN_SCORES], ROUNDING[device])


def test_scores_of_bloom_add_a_slope_per_head_times_the_distance(device: str) -> None:
    family = family_named("bloom")
    ids = prompt_ids(family)[0]
    slopes = 2.0 ** (-8 / 4 * torch.arange(1, 5, dtype=torch.float64))  # four heads
    alibi = (slopes[:, None] * torch.arange(len(ids)))[:, None]  # [head, 1, key]
    for block in block_values(resident(family, device), ids):
        queries, keys = block[Site.ATTN_Q].double().cpu(), block[Site.ATTN_K].double().cpu()
        close(scores_of(queries, keys, alibi), block[Site.ATTN_SCORES], ROUNDING[device])


@every_family
def test_rotated_queries_and_keys_give_the_scores(family: Family, device: str) -> None:
    """Scaled and capped as configured; masks are looked at elsewhere."""
    model = resident(family, device)
    if Site.ATTN_ROT_Q not in model.facts.site_info:
        assert family.name in {"gpt2", "gptj", "bloom", "falcon", "falcon_grouped"}
        return
    scale, cap = family.settings.get("query_pre_attn_scalar"), family.settings.get("attn_logit_softcapping")
    for block in block_values(model, prompt_ids(family)[0]):
        queries, scores = block[Site.ATTN_ROT_Q], block[Site.ATTN_SCORES]
        assert isinstance(scale, int | None) and isinstance(cap, float | None)
        ours = torch.einsum("qhd,khd->hqk", queries, repeated(block[Site.ATTN_ROT_K], queries.shape[1]))
        ours = ours / (scale or queries.shape[-1]) ** 0.5
        ours = torch.tanh(ours / cap) * cap if cap else ours
        close(ours.masked_fill(scores.isneginf(), float("-inf")), scores, ROUNDING[device])


# The others have an RMSNorm, which does not centre.
LAYER_NORM = {"gpt2", "gpt_neox", "gpt_neox_sequential", "gptj", "phi", "bloom", "falcon", "falcon_grouped"}


@every_family
def test_the_norms_obey_their_definition(family: Family, device: str) -> None:
    """Whatever a norm reads: the divisor is the root of mean square plus epsilon, the input over it is normalized."""
    centred = family.name in LAYER_NORM
    reads = {
        Site.LN1_SCALE: Site.RESID_PRE,
        Site.LN2_SCALE: Site.MLP_IN,
        Site.LN1_POST_SCALE: Site.ATTN_OUT_RAW,
        Site.LN2_POST_SCALE: Site.MLP_OUT_RAW,
    }
    normalized = {Site.LN1_SCALE: Site.LN1_NORMALIZED, Site.LN2_SCALE: Site.LN2_NORMALIZED}
    for block in block_values(resident(family, device), prompt_ids(family)[0]):
        for site, source in reads.items():
            if site not in block:
                continue
            rows = block[source]
            rows = rows - rows.mean(-1, keepdim=True) if centred else rows
            scale = (rows.square().mean(-1, keepdim=True) + 0.01).sqrt()
            close(block[site], scale, ROUNDING[device], site)
            if site in normalized:
                close(block[normalized[site]], rows / scale, ROUNDING[device], normalized[site])


@every_family
def test_the_neurons_through_the_down_projection_are_the_mlp_output(family: Family, device: str) -> None:
    model = resident(family, device)
    for layer, block in enumerate(block_values(model, prompt_ids(family)[0])):
        parts = model.runner.adapter.layout.blocks[layer].mlp
        if parts.experts is None:
            assert parts.down is not None
            out = parts.down.forward(block[Site.MLP_POST])
        else:
            weights = parts.experts.down_proj
            assert isinstance(weights, torch.Tensor)
            out = torch.einsum("pe,pem,edm->pd", block[Site.ROUTER_WEIGHTS], block[Site.EXPERT_POST], weights)
        close(out, block[Site.MLP_OUT_RAW], ROUNDING[device])


def tanh_gelu(rows: torch.Tensor) -> torch.Tensor:
    return functional.gelu(rows, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **dict.fromkeys(("gpt2", "gptj", "phi", "bloom", "gemma2", "gemma3"), tanh_gelu),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential", "falcon", "falcon_grouped"), functional.gelu),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2"), functional.silu),
}


@every_family
def test_the_neurons_are_the_activation_of_pre_times_the_linear_branch(family: Family, device: str) -> None:
    one = torch.ones((), device=device)
    for block in block_values(resident(family, device), prompt_ids(family)[0]):
        if Site.MLP_POST in block:
            neurons = ACTIVATIONS[family.name](block[Site.MLP_PRE]) * block.get(Site.MLP_PRE_LINEAR, one)
            close(neurons, block[Site.MLP_POST], ROUNDING[device])


@every_family
def test_an_expert_is_silent_for_tokens_that_are_not_sent_to_it(family: Family, device: str) -> None:
    for block in block_values(resident(family, device), prompt_ids(family)[0]):
        if Site.EXPERT_POST not in block:
            assert "num_experts_per_tok" not in family.settings
            continue
        sent = block[Site.ROUTER_WEIGHTS] > 0
        assert set(sent.sum(-1).tolist()) == {family.settings["num_experts_per_tok"]}
        assert torch.equal((block[Site.EXPERT_POST] != 0).any(-1), sent)


@every_family
def test_logits_are_the_unembedded_final_norm(family: Family, device: str) -> None:
    model = resident(family, device)
    ids = prompt_ids(family)[0]
    seen = look(model, [ids])
    unembed = model.runner.adapter.unembed
    cap = family.settings.get("final_logit_softcapping")
    logits = unembed.head.forward(seen.values[HookPoint(Site.LN_FINAL)][0])
    assert isinstance(cap, float | None)
    close(torch.tanh(logits / cap) * cap if cap else logits, seen.logits[0], ROUNDING[device])
