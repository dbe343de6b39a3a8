"""An edit at any writable site changes its own row and nothing else, and says what it says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch

from engine.models import ROUNDING, SAME_LENGTH, close, every_family, look, resident, same_for_all
from families import Family, family_named
from patchclamp_server.hookpoints import HookPoint, Site

EDITED = 1  # the row of SAME_LENGTH that edits change
# Looking inside attention or a mixture takes another kernel than the model's own.
OTHER_KERNEL = {Site.ATTN_SCORES, Site.ATTN_PATTERN, Site.EXPERT_POST}


@dataclass(frozen=True, eq=False)
class Edited:
    """One hook point of one model: the same batch under an edit that changes nothing, and under one that changes one
    row; what the edit asked for, and what a read of the hook point gave."""

    point: HookPoint
    idle: tuple[torch.Tensor, ...]
    active: tuple[torch.Tensor, ...]
    asked: torch.Tensor
    read: torch.Tensor


@cache
def edits_of(family: Family, device: str) -> tuple[Edited, ...]:
    """Every writable hook point of a model, edited."""
    model = resident(family, device)
    found = []
    for point in model.runner.adapter.write_taps:
        asked: list[torch.Tensor] = []

        def change(value: torch.Tensor, point: HookPoint = point, asked: list[torch.Tensor] = asked) -> torch.Tensor:
            new = value.clone()
            if point.site in (Site.ATTN_SCORES, Site.ATTN_PATTERN):
                new[EDITED].diagonal(dim1=-2, dim2=-1).add_(1.0)  # an edge that every mask allows
            else:
                new[EDITED] = new[EDITED] * 1.5 + torch.linspace(0.5, 1.0, new.shape[-1], device=device)
            asked.append(new.clone())
            return new

        idle = look(model, SAME_LENGTH, reads=[point], edits={point: lambda value: value})
        active = look(model, SAME_LENGTH, reads=[point], edits={point: change})
        found.append(Edited(point, idle.logits, active.logits, asked[0], active.values[point]))
    return tuple(found)


@every_family
def test_an_edit_changes_its_own_row(family: Family, device: str) -> None:
    unmoved = [str(e.point) for e in edits_of(family, device) if torch.equal(e.idle[EDITED], e.active[EDITED])]
    assert not unmoved


@every_family
def test_an_edit_leaves_the_other_rows_bit_for_bit(family: Family, device: str) -> None:
    """In a mixture of experts the other rows share products with the edited one, whose tokens go to other experts when
    it changes: there the sums are of the same terms, but the kernel may group them in another way."""
    mixture = resident(family, device).facts.dims.n_experts > 0
    for edited in edits_of(family, device):
        for row in {0, 1, 2} - {EDITED}:
            if mixture:
                close(edited.active[row], edited.idle[row], ROUNDING[device], edited.point)
            else:
                assert torch.equal(edited.active[row], edited.idle[row]), edited.point


@every_family
def test_an_edit_that_changes_nothing_leaves_the_logits_bit_for_bit(family: Family, device: str) -> None:
    """But for sites inside attention and mixtures: those take another kernel, with another order of sums."""
    untouched = look(resident(family, device), SAME_LENGTH, reads=()).logits
    for edited in edits_of(family, device):
        for row, expected in enumerate(untouched):
            if edited.point.site in OTHER_KERNEL:
                close(edited.idle[row], expected, ROUNDING[device], edited.point)
            else:
                assert torch.equal(edited.idle[row], expected), edited.point


@every_family
def test_a_read_of_an_edited_site_gives_what_the_edit_made_of_it(family: Family, device: str) -> None:
    for edited in edits_of(family, device):
        close(edited.read, edited.asked, ROUNDING[device], edited.point)


@every_family
@pytest.mark.parametrize("site", [Site.RESID_PRE, Site.RESID_MID, Site.RESID_POST])
def test_the_whole_stream_of_another_run_makes_it_that_run(family: Family, site: Site, device: str) -> None:
    """For resid_mid this holds only if the write reaches the MLP and the skip path alike."""
    model = resident(family, device)
    if site is Site.RESID_MID and model.facts.parallel:
        assert site not in model.facts.site_info
        return
    ids, other = [SAME_LENGTH[0]], [SAME_LENGTH[1]]
    for layer in range(model.facts.dims.n_layers):
        point = HookPoint(site, layer)
        source = look(model, other)
        patched = look(model, ids, edits={point: same_for_all(source.values[point])})
        # resid_mid is put in place as a difference, which costs one more rounding of values below ten.
        close(patched.logits[0], source.logits[0], ROUNDING[device] / 4, point)
        for later, value in patched.values.items():
            if later.layer is not None and later.layer > layer:
                close(value, source.values[later], ROUNDING[device], f"{later} after {point}")


@every_family
def test_a_write_to_resid_mid_is_what_the_mlp_reads_and_what_the_block_passes_on(family: Family, device: str) -> None:
    model = resident(family, device)
    for layer in range(model.facts.dims.n_layers):
        point = HookPoint(Site.RESID_MID, layer)
        if point not in model.runner.adapter.write_taps:
            assert model.facts.parallel
            continue
        new = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0)).to(device)
        values = look(model, [SAME_LENGTH[0]], edits={point: same_for_all(new)}).values
        close(values[HookPoint(Site.MLP_IN, layer)], new, ROUNDING[device])
        skipped = values[HookPoint(Site.RESID_POST, layer)] - values[HookPoint(Site.MLP_OUT, layer)]
        close(skipped, new, ROUNDING[device])


@every_family
def test_a_write_to_the_mlps_input_leaves_the_stream_alone(family: Family, device: str) -> None:
    model, ids = resident(family, device), [SAME_LENGTH[0]]
    point, stream = HookPoint(Site.MLP_IN, 0), HookPoint(Site.RESID_MID, 0)
    if stream not in model.runner.adapter.read_taps or point not in model.runner.adapter.write_taps:
        assert model.facts.parallel
        return
    idle, edited = look(model, ids), look(model, ids, edits={point: lambda value: value + 1})
    close(edited.values[point], idle.values[point] + 1, ROUNDING[device])
    assert torch.equal(edited.values[stream], idle.values[stream])
    skipped = edited.values[HookPoint(Site.RESID_POST, 0)] - edited.values[HookPoint(Site.MLP_OUT, 0)]
    close(skipped, idle.values[stream], ROUNDING[device])


@every_family
def test_edits_of_a_block_compose_in_the_order_of_the_data_flow(family: Family, device: str) -> None:
    """However many sites of a block are edited at once, a value put into resid_mid is the one that goes on."""
    model = resident(family, device)
    point = HookPoint(Site.RESID_MID, 0)
    if point not in model.runner.adapter.write_taps:
        assert model.facts.parallel
        return
    new = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)).to(device)
    before = [Site.RESID_PRE, Site.LN1_SCALE, Site.LN1_POST_SCALE, Site.ATTN_Z, Site.ATTN_OUT_RAW, Site.ATTN_OUT]
    edits = {
        HookPoint(site, 0): (lambda value: value * 1.25 + 0.5)
        for site in before
        if HookPoint(site, 0) in model.runner.adapter.write_taps
    }
    alone = look(model, [SAME_LENGTH[0]], edits={point: same_for_all(new)})
    among = look(model, [SAME_LENGTH[0]], edits={**edits, point: same_for_all(new)})
    close(among.values[point], new, ROUNDING[device])
    close(among.logits[0], alone.logits[0], ROUNDING[device])


@every_family
def test_a_norms_divisor_divides(family: Family, device: str) -> None:
    """Doubling the scale of a norm halves what it normalizes; a value put into normalized then stands as it is."""
    model, ids = resident(family, device), [SAME_LENGTH[0]]
    for scale, normalized in ((Site.LN1_SCALE, Site.LN1_NORMALIZED), (Site.LN2_SCALE, Site.LN2_NORMALIZED)):
        point, result = HookPoint(scale, 0), HookPoint(normalized, 0)
        if point not in model.runner.adapter.write_taps:
            continue
        idle = look(model, ids)
        doubled = look(model, ids, edits={point: lambda value: value * 2})
        close(doubled.values[result], idle.values[result] / 2, ROUNDING[device])
        both = look(model, ids, edits={point: lambda value: value * 2, result: same_for_all(idle.values[result])})
        close(both.logits[0], idle.logits[0], ROUNDING[device])


def test_a_positions_embedding_can_differ_between_the_rows_of_a_batch(device: str) -> None:
    model = resident(family_named("gpt2"), device)
    point = HookPoint(Site.POS_EMBED)

    def forget(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[0] = 0
        return value

    seen = look(model, SAME_LENGTH[:2], edits={point: forget})
    start = HookPoint(Site.RESID_PRE, 0)
    assert torch.equal(seen.values[start][0], seen.values[HookPoint(Site.EMBED)][0])
    assert not torch.equal(seen.values[start][1], seen.values[HookPoint(Site.EMBED)][1])


def test_a_knocked_out_edge_carries_no_attention(device: str) -> None:
    """The same for attention inside the interface and outside it."""
    for name in ("llama", "bloom"):
        point = HookPoint(Site.ATTN_SCORES, 0)

        def cut(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[:, 2, 5, 1] = float("-inf")
            return value

        pattern = look(resident(family_named(name), device), SAME_LENGTH, edits={point: cut}).values[
            HookPoint(Site.ATTN_PATTERN, 0)
        ]
        assert (pattern[:, 2, 5, 1] == 0).all()
        close(pattern.sum(-1), torch.ones(pattern.shape[:-1]), 1e-6)  # a float32 softmax over seven keys
