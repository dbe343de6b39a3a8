"""What holds for one forward of every family: hooked equals un-hooked, sums add up, batched equals alone."""

from __future__ import annotations

import torch

from engine.models import (
    LENGTHS,
    ROUNDING,
    block_values,
    close,
    every_family,
    look,
    plain_logits,
    plain_model,
    resident,
)
from families import Family, prompt_ids
from patchclamp_server.hookpoints import HookPoint, Site


@every_family
def test_looking_at_everything_leaves_the_logits_as_they_are(family: Family, device: str) -> None:
    ids = prompt_ids(family)[0]
    expected = plain_logits(plain_model(family, device), ids)
    close(look(resident(family, device), [ids]).logits[0], expected, ROUNDING[device])


@every_family
def test_running_without_a_look_leaves_the_logits_as_they_are(family: Family, device: str) -> None:
    """Here attention goes through the model's own kernel, not through ours."""
    for ids in prompt_ids(family):
        expected = plain_logits(plain_model(family, device), ids)
        close(look(resident(family, device), [ids], reads=()).logits[0], expected, ROUNDING[device])


@every_family
def test_looking_at_one_site_gives_what_looking_at_all_gives(family: Family, device: str) -> None:
    """Attention takes another kernel where somebody looks inside it."""
    model, ids = resident(family, device), prompt_ids(family)[0]
    everything = look(model, [ids]).values
    for point in model.runner.adapter.read_taps:
        if point.layer in (None, model.facts.dims.n_layers - 1):
            close(look(model, [ids], reads=[point]).values[point], everything[point], ROUNDING[device], point)


@every_family
def test_the_writes_add_up_to_the_stream(family: Family, device: str) -> None:
    for block in block_values(resident(family, device), prompt_ids(family)[0]):
        mid = block[Site.RESID_PRE] + block[Site.ATTN_OUT]
        if Site.RESID_MID in block:
            close(mid, block[Site.RESID_MID], ROUNDING[device])
        close(mid + block[Site.MLP_OUT], block[Site.RESID_POST], ROUNDING[device])


@every_family
def test_each_block_begins_where_the_one_before_ended(family: Family, device: str) -> None:
    model, ids = resident(family, device), prompt_ids(family)[0]
    values = look(model, [ids]).values
    start = values[HookPoint(Site.EMBED)]
    if HookPoint(Site.POS_EMBED) in values:
        start = start + values[HookPoint(Site.POS_EMBED)]
    close(start, values[HookPoint(Site.RESID_PRE, 0)], ROUNDING[device])
    for layer in range(1, model.facts.dims.n_layers):
        assert torch.equal(values[HookPoint(Site.RESID_POST, layer - 1)], values[HookPoint(Site.RESID_PRE, layer)])


@every_family
def test_patterns_are_causal_distributions_inside_the_window(family: Family, device: str) -> None:
    model, ids = resident(family, device), prompt_ids(family)[0]
    types = family.settings.get("layer_types") or ["sliding_attention"] * model.facts.dims.n_layers
    assert isinstance(types, list)
    windows = [family.settings.get("sliding_window") if kind == "sliding_attention" else None for kind in types]
    distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))  # query - key
    for block, window in zip(block_values(model, ids), windows, strict=True):
        assert isinstance(window, int | None)
        hidden = (distance < 0) | (distance >= (window or len(ids)))
        pattern, scores = block[Site.ATTN_PATTERN].cpu(), block[Site.ATTN_SCORES].cpu()
        close(pattern.sum(-1), torch.ones(pattern.shape[:-1]), 1e-6)  # a float32 softmax over seven keys
        assert not pattern[:, hidden].any()
        assert (pattern[:, ~hidden] > 0).all()
        assert (scores.isneginf() == hidden).all()


@every_family
def test_a_row_in_a_batch_gives_what_it_gives_alone(family: Family, device: str) -> None:
    """At every site and in the logits, whichever row it is and however much it is padded."""
    model = resident(family, device)
    together = look(model, LENGTHS)
    for row, ids in enumerate(LENGTHS):
        alone = look(model, [ids])
        own = alone.row(0, len(ids))
        for point, value in together.row(row, len(ids)).items():
            close(value, own[point], ROUNDING[device], f"{point} of row {row}")
        close(together.logits[row], alone.logits[0], ROUNDING[device], f"logits of row {row}")


@every_family
def test_every_site_has_the_declared_axes(family: Family, device: str) -> None:
    """Of a prompt whose length is no other size of the model."""
    model = resident(family, device)
    ids = tuple(range(9))
    values = look(model, [ids]).values
    for info in model.facts.sites:
        assert [name for name, _ in info.axes] == list(info.site.axes) or info.site.value.endswith("_norm.scale")
        for layer in info.layers or (None,):
            if info.site is not Site.LOGITS:
                shape = values[HookPoint(info.site, layer)].shape[1:]
                assert tuple(shape) == tuple(size or len(ids) for _, size in info.axes), HookPoint(info.site, layer)
