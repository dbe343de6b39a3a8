"""Names of hook points: one table, the proto's and the server's alike."""

import re
from pathlib import Path

import pytest

import patchclamp as pc
from patchclamp._hookpoints import ALIASES, OUTSIDE_BLOCKS, SITES, HookName, parse
from patchclamp.v1 import hook_point_pb2
from patchclamp_server.hookpoints import Site


def test_names_cover_the_enum_exactly() -> None:
    stated = set(hook_point_pb2.Site.values()) - {hook_point_pb2.SITE_UNSPECIFIED}
    assert sorted(SITES.values()) == sorted(stated)
    for name, number in SITES.items():
        assert hook_point_pb2.Site.Name(number) == f"SITE_{name.replace('.', '_').upper()}"


def test_names_are_the_servers() -> None:
    assert list(SITES) == [site.value for site in Site]
    assert {site.value for site in Site if not site.in_block} == OUTSIDE_BLOCKS


def test_aliases_lead_to_sites_and_hide_none() -> None:
    assert set(ALIASES.values()) <= set(SITES)
    assert not set(ALIASES) & set(SITES)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("blocks.3.resid_post", "blocks.3.resid_post"),
        ("blocks.*.resid_post", "blocks.*.resid_post"),
        ("resid_post", "blocks.*.resid_post"),
        ("embed", "embed"),
        ("ln_final.scale", "ln_final.scale"),
        ("hook_embed", "embed"),
        ("hook_pos_embed", "pos_embed"),
        ("blocks.3.hook_resid_post", "blocks.3.resid_post"),
        ("blocks.*.hook_resid_mid", "blocks.*.resid_mid"),
        ("blocks.3.attn.hook_z", "blocks.3.attn.z"),
        ("blocks.3.attn.hook_rot_q", "blocks.3.attn.rot_q"),
        ("blocks.*.attn.hook_pattern", "blocks.*.attn.pattern"),
        ("blocks.0.attn.hook_attn_scores", "blocks.0.attn.scores"),
        ("blocks.0.attn.hook_result", "blocks.0.attn.result"),
        ("blocks.0.hook_attn_in", "blocks.0.attn.in"),
        ("blocks.0.hook_q_input", "blocks.0.attn.q_input"),
        ("blocks.0.hook_attn_out", "blocks.0.attn.out"),
        ("blocks.0.hook_mlp_in", "blocks.0.mlp.in"),
        ("blocks.0.hook_mlp_out", "blocks.0.mlp.out"),
        ("blocks.0.mlp.hook_pre_linear", "blocks.0.mlp.pre_linear"),
        ("blocks.0.mlp.hook_post", "blocks.0.mlp.post"),
        ("blocks.0.ln1.hook_scale", "blocks.0.ln1.scale"),
        ("blocks.0.ln2.hook_normalized", "blocks.0.ln2.normalized"),
        ("ln_final.hook_scale", "ln_final.scale"),
        ("ln_final.hook_out", "ln_final"),
        ("blocks.0.ln1.hook_normalized", "blocks.0.ln1.normalized"),
        ("blocks.0.ln2_post.hook_scale", "blocks.0.ln2_post.scale"),
        ("blocks.0.attn.q_norm.hook_scale", "blocks.0.attn.q_norm.scale"),
        ("blocks.0.attn.hook_out", "blocks.0.attn.out_raw"),
        ("blocks.0.mlp.hook_out", "blocks.0.mlp.out_raw"),
        ("blocks.0.mlp.gate.hook_out", "blocks.0.router.logits"),
        ("blocks.0.mlp.hook_expert_weights", "blocks.0.router.weights"),
    ],
)
def test_parses(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


def test_aliases_are_those_of_the_golden_table() -> None:
    """Where the table writes out both names of a row, in order."""
    table = (Path(__file__).parents[1] / "golden" / "README.md").read_text().split("## Sites")[1].split("## ")[0]
    rows = [re.findall(r"^\| (.*?) \| (.*?) \|", line)[0] for line in table.splitlines() if line.startswith("| `")]
    pairs = {
        theirs: ours
        for left, right in rows
        for ours, theirs in zip(re.findall("`(.*?)`", left), re.findall("`(.*?)`", right), strict=False)
    }
    assert len(pairs) >= 22
    assert {theirs: ALIASES.get(theirs) for theirs in pairs} == pairs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ln_final.hook_normalized", ["before the final norm's weight and bias", "'ln_final'", "'ln_final.scale'"]),
        ("blocks.0.ln1.hook_out", ["after the norm's weight", "'ln1.normalized'"]),
        ("blocks.0.attn.hook_in", ["'attn.in' is the stream before it"]),
        ("blocks.0.mlp.hook_in", ["'mlp.in' is the stream before it"]),
        ("unembed.hook_out", ["before the final soft cap"]),
        ("blocks.0.attn.hook_q_nput", ["did you mean 'blocks.0.attn.q_input'"]),
    ],
)
def test_what_only_resembles_a_site_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(pc.InvalidArgument, match="hook") as caught:
        parse(text)
    for word in words:
        assert word in str(caught.value)


def test_every_canonical_name_parses_to_itself() -> None:
    for name in SITES:
        hook = HookName(name) if name in OUTSIDE_BLOCKS else HookName(name, 7)
        assert parse(str(hook)) == hook


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blocks.3.resid_pots", ["'blocks.3.resid_pots'", "did you mean", "'blocks.3.resid_post'"]),
        ("blocks.*.attn.patern", ["'blocks.*.attn.pattern'"]),
        ("xyzzy", ["describe().sites"]),
        ("", ["describe().sites"]),
        ("blocks.3.embed", ["outside the blocks"]),
        ("blocks.x.resid_post", ["'x' is no layer", "blocks.0.resid_post"]),
        ("blocks.-1.resid_post", ["'-1' is no layer"]),
        ("blocks.99999999999.resid_post", ["is no layer"]),
        ("blocks.³.resid_post", ["is no layer"]),
        ("blocks..resid_post", ["'' is no layer"]),
    ],
)
def test_refuses_with_advice(text: str, words: list[str]) -> None:
    with pytest.raises(pc.InvalidArgument) as caught:
        parse(text, "read[2]")
    (violation,) = caught.value.field_violations
    assert violation.field == "read[2]"
    assert caught.value.reason == "INVALID_FIELD"
    for word in words:
        assert word in str(caught.value)
